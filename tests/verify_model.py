# SPDX-License-Identifier: Apache-2.0
"""A tiny model that the tests of `verify` run on several meshes."""

import functools
from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from mesh_model import memory_checkpoint
from meshwen.checkpoints import Checkpoint
from meshwen.models.parallel_model import ParallelModel
from meshwen.parallel.mesh import make_mesh
from meshwen.verify.localise import Prober, Trace
from meshwen.verify.mesh_run import MeshRun, Observed
from meshwen.verify.workload import Workload
from meshwen.weights.loading import load_params
from tiny_model import TINY, greedy, weights

STEPS = 3
PROMPTS = ((5, 81, 7, 200, 33, 12, 9), (250, 3), (17, 4, 90, 44, 8))


def workload(rows_multiple: int = 2) -> Workload:
    """The prompts, with the tokens that float64 takes."""
    tokens = np.array([greedy(prompt)[0][:STEPS] for prompt in PROMPTS], np.int32)
    return Workload(PROMPTS, STEPS, rows_multiple, tokens)


def checkpoint(**changed: np.ndarray) -> Checkpoint:
    return memory_checkpoint(TINY, weights() | changed)


@functools.cache
def mesh_run(mesh: str, numerics: str = "fast") -> MeshRun:
    model = ParallelModel(TINY, make_mesh(mesh), jnp.dtype(jnp.float32), numerics)
    return MeshRun(model, load_params(checkpoint(), model.weights), workload())


@functools.cache
def observed(mesh: str, numerics: str = "fast") -> Observed:
    return mesh_run(mesh, numerics).observe()


@functools.cache
def prober(mesh: str, numerics: str = "fast") -> Prober:
    return Prober(mesh_run(mesh, numerics))


@functools.cache
def trace(mesh: str, numerics: str = "fast") -> Trace:
    return prober(mesh, numerics).trace(observed(mesh, numerics).whole)


def without_tokens() -> Workload:
    return replace(workload(), continuations=None)
