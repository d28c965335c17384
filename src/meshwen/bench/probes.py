# SPDX-License-Identifier: Apache-2.0
"""What the machine can do at best: bytes read and operations a second, measured with JAX itself.

Simulated devices share one machine, so on a CPU one device stands for all.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshwen.common.choices import Quantization
from meshwen.ops.backend import XLA
from meshwen.ops.backends import backend_of
from meshwen.ops.formats import Leaf
from meshwen.parallel.mesh import AnyMesh
from meshwen.runtime.jax_settings import own_settings

_READ_BYTES = 1 << 29  # of each device: far more than its caches hold
_MATRIX = 4096  # rows and columns
_RUNS = 7


@own_settings()
def read_bandwidth(mesh: AnyMesh) -> float:
    """Bytes a second that all devices read together, at most.

    The largest of several runs of a matmul with a vector, whose result is small.
    """
    columns = 1 << 12
    rows = _READ_BYTES // (4 * columns)
    matrix = _on_each(mesh, (rows, columns), jnp.float32)
    vector = jnp.ones((columns, 1), jnp.float32)
    seconds = _least_seconds(jax.jit(lambda m, v: m @ v), matrix, vector)
    return matrix.nbytes / seconds


@own_settings()
def matrix_rate(mesh: AnyMesh, dtype: jnp.dtype, quantization: Quantization | None = None) -> float:
    """Operations a second of all devices together in a matmul of square matrices, at most.

    XLA multiplies, but int8 the kernels, where there are any: XLA has nothing fast for it.
    """
    shape = (_MATRIX, _MATRIX)
    matmul = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    right: Leaf = jnp.ones(shape, dtype)
    backend = backend_of(mesh)
    format = backend.format(quantization)
    if quantization and format and backend.matmul_name(dtype, quantization) != XLA:
        dtype, matmul = jnp.dtype(jnp.float32), jax.jit(backend.matmul)
        right = format.pack(jnp.ones(shape), dtype)
    left = _on_each(mesh, shape, dtype)
    return 2 * left.size * _MATRIX / _least_seconds(matmul, left, right)


def _on_each(mesh: AnyMesh, shape: tuple[int, int], dtype: jnp.dtype) -> Array:
    """Ones, `shape` on every device: [devices * rows, columns]."""
    devices = mesh.devices.reshape(-1)
    if devices[0].platform == "cpu":
        devices = devices[:1]
    line = Mesh(np.array(devices), ("all",))
    sharding = NamedSharding(line, PartitionSpec("all"))
    whole = (len(devices) * shape[0], shape[1])
    return jax.jit(lambda: jnp.ones(whole, dtype), out_shardings=sharding)()


def _least_seconds(run: Callable[..., Array], *arguments: Leaf) -> float:
    jax.block_until_ready(run(*arguments))
    seconds = []
    for _ in range(_RUNS):
        began = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        seconds.append(time.perf_counter() - began)
    return min(seconds)
