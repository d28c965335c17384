# SPDX-License-Identifier: Apache-2.0
"""Weights onto the devices: from a checkpoint, shard by shard, or dummies."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding

from meshwen.common.json_files import shown
from meshwen.common.units import bytes_text
from meshwen.errors import MeshwenError
from meshwen.ops.formats import Format, Leaf
from meshwen.ops.hashing import mixed
from meshwen.ops.weight import Weight
from meshwen.parallel.heads import PADDING
from meshwen.runtime.jax_settings import Jitted, own_settings
from meshwen.runtime.memory import free_bytes
from meshwen.weights.declaration import Params, unflatten
from meshwen.weights.finite import check_finite
from meshwen.weights.layout import WeightLayout, WeightTable, matching_slices
from meshwen.weights.source import TensorSource, WeightFile

# Told the number of weights placed so far, and of all.
Progress = Callable[[int, int], None]

_TIED_ROWS = 4096
_PACKED_ROWS = 8192  # a multiple of any format's outputs; in int8 they are float32 meanwhile
_TRANSPOSE_COLUMNS = 256  # A block that stays in cache: 8 times as fast on a large table.
_ALIGNMENT = 64  # bytes, of XLA's CPU buffers
# Buffers that old transformers versions wrote and that hold no parameter.
_IGNORED_SUFFIX = ".rotary_emb.inv_freq"


def check_tensors(file: WeightFile, table: WeightTable) -> None:
    """Holds a checkpoint's tensors against the declared ones.

    Raises:
        MeshwenError: a tensor is missing, unexpected or of another shape; it is named.
    """
    if (problem := _misfit(file, table)) is not None:
        hint = f"; {file.misfit_hint}" if file.misfit_hint else ""
        raise MeshwenError(f"{file.path}: {problem}{hint}")


def _misfit(file: WeightFile, table: WeightTable) -> str | None:
    """What keeps a checkpoint's tensors from being the declared ones, None where they are."""
    for declared in table.declarations:
        name, shape = declared.name, declared.shape(table.plan.sizes)
        if name not in file.tensors:
            return (
                f"tensor {name} {list(shape)} is missing; "
                "the checkpoint does not fit its config, or is incomplete"
            )
        source = file.tensors[name]
        if not jnp.issubdtype(source.dtype, jnp.floating):
            return (
                f"tensor {name} is {source.dtype}, not floating-point: "
                "the checkpoint is quantised in a way that is not supported"
            )
        if source.shape != shape:
            return (
                f"tensor {name} has shape {list(source.shape)}, "
                f"but the config makes it {list(shape)}"
            )
    expected = {name for one in table.declarations for name in (one.name, one.tied)}
    for name in file.tensors:
        if name not in expected and not name.endswith(_IGNORED_SUFFIX):
            return (
                f"unexpected tensor {shown(name)} "
                f"{list(file.tensors[name].shape)}; the model has no such weight"
            )
    return None


def check_memory(table: WeightTable) -> None:
    """Holds the bytes that weights take on a device against those that are free.

    Raises:
        MeshwenError: they do not fit; the process would be killed in the middle of loading.
    """
    needed = table.nbytes
    if needed > (free := free_bytes(table.plan.mesh.local_devices)):
        raise MeshwenError(
            f"the weights need {bytes_text(needed)} on each device, of which {bytes_text(free)} "
            "can be had: use more devices, int8, or a smaller model"
        )


def load_params(
    file: WeightFile, table: WeightTable, progress: Progress = lambda done, total: None
) -> Params:
    """Places a checkpoint's weights on the devices, cast (nearest even) or quantised.

    Every device's part is read straight from the file into its place, one after the other: apart
    from the weights themselves no more than one device's part of one weight, and where it has to be
    expanded, padded or packed a copy of it, is in memory.

    Raises:
        MeshwenError: a tensor is missing, unexpected or of another shape, or holds NaN or infinity;
            or the weights do not fit the devices.
    """
    check_tensors(file, table)
    for one in table.declarations:
        if one.tied is not None and one.tied in file.tensors:
            _check_tied(file, one.name, one.tied)
    check_memory(table)
    tensors = file.tensors
    return _params(
        table,
        lambda weight: _place(tensors[weight.declaration.name], weight, table.dtype, file.path),
        progress,
    )


def dummy_params(
    table: WeightTable,
    progress: Progress = lambda done, total: None,
    seed: int = 0,
) -> Params:
    """Dummy weights: each a function of its name and position, so the same on every mesh.

    Uniform with standard deviation 0.02 (norms: 1 plus that), made in place on the devices; where
    they are packed, by way of the host. Raises MeshwenError when they do not fit the devices.
    """
    check_memory(table)
    return _params(table, lambda weight: _dummy(weight, table.dtype, seed), progress)


def _params(
    table: WeightTable, make: Callable[[WeightLayout], Weight], progress: Progress
) -> Params:
    def made() -> Iterator[tuple[str, Weight]]:
        for done, weight in enumerate(table.stored):
            progress(done, len(table.stored))
            yield weight.path, make(weight)
        progress(len(table.stored), len(table.stored))

    return unflatten(made())


def _check_tied(file: WeightFile, table: str, head: str) -> None:
    """Refuses a head that is stored beside tied embeddings and differs from them."""
    first, second = file.tensors[table], file.tensors[head]
    same = first.shape == second.shape and all(
        _same(first.read((rows,)), second.read((rows,)))
        for start in range(0, first.shape[0], _TIED_ROWS)
        for rows in [slice(start, start + _TIED_ROWS)]
    )
    if not same:
        raise MeshwenError(
            f"{file.path}: the config ties {head} to {table}, but the two "
            'differ; to use both, set "tie_word_embeddings": false in config.json'
        )


def _same(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether numbers are equal, NaN to NaN: that is for `check_finite` to name."""
    return np.array_equal(first, second) or np.array_equal(first, second, equal_nan=True)


@own_settings()
def _place(
    source: TensorSource, weight: WeightLayout, dtype: jnp.dtype, where: Path | None
) -> Weight:
    what = f"{where}: tensor {weight.declaration.name}"
    leaves = tuple(_place_leaf(source, weight, i, dtype, what) for i in range(weight.leaves))
    return Weight(leaves, weight.inputs_first, weight.tree)


def _place_leaf(
    source: TensorSource, weight: WeightLayout, leaf: int, dtype: jnp.dtype, what: str
) -> Leaf:
    shape, positions, format = weight.leaf_shape, weight.positions(leaf), weight.format
    places = weight.array_sharding.addressable_devices_indices_map(shape).items()
    kept = np.dtype(np.float32) if format is not None and format.rounds else dtype

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        """One device's part, its axes in the checkpoint's order."""
        assert index is not None  # Only a sharding that names no devices gives None.
        own = [axis[i] for axis, i in zip(positions, index, strict=True)]
        values = _read(source, own[::-1] if weight.inputs_first else own)
        check_finite(values, kept, what)
        return values

    # One after the other: the host never holds more than one device's part.
    if format is not None:
        parts = [_packed_part(part(index), device, format, dtype) for device, index in places]
        return _packed(parts, weight, format, dtype)
    arrays = []
    for device, index in places:
        own = part(index).T if weight.inputs_first else part(index)
        arrays.append(jax.block_until_ready(jax.device_put(row_major(own, dtype), device)))
    return jax.make_array_from_single_device_arrays(shape, weight.sharding, arrays)


@partial(Jitted, static_argnums=(1, 2))
def _packed_block(part: Array, format: Format, dtype: jnp.dtype) -> list[Array]:
    return jax.tree.leaves(format.pack(part, dtype))


def _packed_part(
    part: np.ndarray, device: jax.Device, format: Format, dtype: jnp.dtype
) -> list[Array]:
    """What is stored of one device's part [out, in], packed some rows at a time.

    By the first device, for the others too: each would compile it for itself.
    """
    whole: list[np.ndarray] = []
    for first in range(0, part.shape[0], _PACKED_ROWS):
        block = part[first : first + _PACKED_ROWS]
        pieces = [np.asarray(piece) for piece in _packed_block(block, format, dtype)]
        length = -(-part.shape[0] // format.outputs)
        whole = whole or [_aligned((length, *piece.shape[1:]), piece.dtype) for piece in pieces]
        at = first // format.outputs
        for target, piece in zip(whole, pieces, strict=True):
            target[at : at + len(piece)] = piece
    return jax.block_until_ready(jax.device_put(whole, device))


def _packed(
    parts: list[list[Array]], weight: WeightLayout, format: Format, dtype: jnp.dtype
) -> Leaf:
    """A leaf of the parts of this process's devices."""
    inputs, outputs = weight.leaf_shard_shape
    whole_inputs, whole_outputs = weight.leaf_shape
    shards = whole_outputs // outputs, whole_inputs // inputs

    def whole(arrays: tuple[Array, ...]) -> Array:
        first, second, *rest = arrays[0].shape
        shape = (first * shards[0], second * shards[1], *rest)
        return jax.make_array_from_single_device_arrays(shape, weight.sharding, list(arrays))

    arrays = [whole(pieces) for pieces in zip(*parts, strict=True)]
    return format.wrap(arrays, (inputs, outputs), dtype)


def _read(source: TensorSource, positions: list[np.ndarray]) -> np.ndarray:
    """The tensor at positions of each axis, zeros where they are `PADDING`."""
    pieces = list(matching_slices(positions))
    shape = tuple(len(of_axis) for of_axis in positions)
    if len(pieces) == 1 and pieces[0][0] == tuple(slice(0, size) for size in shape):
        return source.read(pieces[0][1])
    part = np.zeros(shape, source.dtype)
    for target, original in pieces:
        part[target] = source.read(original)
    return part


def row_major(part: np.ndarray, dtype: jnp.dtype) -> np.ndarray:
    """A row-major copy in `dtype`."""
    result = _aligned(part.shape, dtype)
    if part.flags.c_contiguous or part.ndim < 2:
        result[...] = part
        return result
    for i in range(0, part.shape[1], _TRANSPOSE_COLUMNS):
        block = slice(i, i + _TRANSPOSE_COLUMNS)
        result[:, block] = part.T[block].astype(dtype).T
    return result


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Memory that JAX's CPU back end takes as it is."""
    nbytes = prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)


@own_settings()
def _dummy(weight: WeightLayout, dtype: jnp.dtype, seed: int) -> Weight:
    leaves = tuple(_dummy_leaf(weight, i, dtype, seed) for i in range(weight.leaves))
    return Weight(leaves, weight.inputs_first, weight.tree)


def _dummy_leaf(weight: WeightLayout, leaf: int, dtype: jnp.dtype, seed: int) -> Leaf:
    positions = [
        jax.device_put(positions.astype(np.int32), weight.plan.sharding(axis))
        for axis, positions in zip(weight.axes, weight.positions(leaf), strict=True)
    ]
    whole = _fill(
        positions,
        np.uint32(zlib.crc32(weight.declaration.name.encode()) ^ seed),
        mean=weight.declaration.dummy_mean,
        inputs_first=weight.inputs_first,
        dtype=jnp.dtype(dtype),
        sharding=weight.array_sharding,
    )
    if (format := weight.format) is None:
        return whole
    parts = [
        _packed_part(np.asarray(shard.data).T, shard.device, format, dtype)
        for shard in whole.addressable_shards
    ]
    return _packed(parts, weight, format, dtype)


# A function of the module, so that the weights of all layers share what is compiled.
@partial(Jitted, static_argnames=("mean", "inputs_first", "dtype", "sharding"))
def _fill(
    positions: list[Array],
    name_seed: Array,
    mean: float,
    inputs_first: bool,
    dtype: jnp.dtype,
    sharding: NamedSharding,
) -> Array:
    value = dummy_values(positions, name_seed, mean, inputs_first, dtype)
    return lax.with_sharding_constraint(value, sharding)


def dummy_values(
    positions: list[Array],
    name_seed: Array,
    mean: float,
    inputs_first: bool,
    dtype: jnp.dtype,
) -> Array:
    """Numbers hashed from `name_seed` and the positions in the checkpoint, zeros at `PADDING`.

    Args:
        positions: int32, of each axis, as `WeightLayout.positions` has them.
        name_seed: uint32 [].
        mean: of the numbers; their standard deviation is 0.02.
        inputs_first: as of `WeightLayout`.
        dtype: of the result.
    """
    grid = jnp.meshgrid(*(positions[::-1] if inputs_first else positions), indexing="ij")
    bits = name_seed
    for position in grid:
        bits = mixed(bits ^ position.astype(jnp.uint32))
    uniform = (bits >> 8).astype(jnp.float32) / (1 << 24) - 0.5
    padding = jnp.stack([position == PADDING for position in grid]).any(axis=0)
    value = jnp.where(padding, np.float32(0), mean + uniform * (0.02 * 12**0.5))
    return (value.T if inputs_first else value).astype(dtype)
