# SPDX-License-Identifier: Apache-2.0
"""Weights for programs, onto the devices of a mesh."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from os import PathLike, fsdecode

from jax.sharding import Mesh

from meshwen.checkpoints import Checkpoint, open_checkpoint
from meshwen.errors import MeshwenError
from meshwen.handoff.plain import Plain, plain_params
from meshwen.models.parallel_model import ParallelModel
from meshwen.weights.loading import Progress, dummy_params, load_params


def load_weights(
    model: ParallelModel,
    checkpoint: str | PathLike[str] | Checkpoint | None,
    progress: Progress = lambda done, total: None,
) -> Plain:
    """The plain weights of a model, each as it lies on the mesh.

    Args:
        model: of `parallel_model`, on a mesh with devices.
        checkpoint: a folder, a GGUF file or a hub id, or one that is open. None, or one that was
            opened without weights: dummy ones, the same on every mesh.
        progress: called with the number of weights placed, and of all.

    Raises:
        MeshwenError: there is no such checkpoint, it does not fit the model's config, or the
            weights do not fit the devices.
    """
    if not isinstance(model.mesh, Mesh):
        raise MeshwenError("a mesh without devices holds no weights: give one with devices")
    opened: AbstractContextManager[Checkpoint | None] = (
        nullcontext(checkpoint)
        if checkpoint is None or isinstance(checkpoint, Checkpoint)
        else open_checkpoint(fsdecode(checkpoint))
    )
    with opened as file:
        if file is None or file.format is None:
            params = dummy_params(model.weights, progress)
        else:
            params = load_params(file, model.weights, progress)
    return plain_params(params, model.weights)
