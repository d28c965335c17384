# SPDX-License-Identifier: Apache-2.0
"""The model as the tests run it: any config, weights from memory, any mesh."""

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import reference
from meshwen.cache.kv_cache import KVCache
from meshwen.checkpoints import Checkpoint, TensorSource
from meshwen.engine import steps
from meshwen.engine.runner import ModelRunner
from meshwen.engine.step_inputs import StepInputs, in_parts, step_inputs, tables_in_order
from meshwen.models.parallel_model import ParallelModel
from meshwen.models.qwen2 import Qwen2Config
from meshwen.ops.cpu import kernels
from meshwen.ops.formats import Leaf, Packed
from meshwen.ops.weight import Weight
from meshwen.parallel.mesh import make_mesh
from meshwen.verify import hlo as verify_hlo
from meshwen.weights.declaration import updated
from meshwen.weights.loading import load_params

# 7B's 28 query and 4 key/value heads at 1/16 scale, with a vocabulary that no mesh divides.
SMALL_7B = Qwen2Config(
    vocab_size=1003,
    hidden_size=224,
    intermediate_size=1184,
    num_hidden_layers=2,
    num_attention_heads=28,
    num_key_value_heads=4,
    head_dim=8,
    max_position_embeddings=256,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
)
# 0.5B's 14 query and 2 key/value heads.
SMALL_HALF_B = replace(
    SMALL_7B,
    hidden_size=112,
    intermediate_size=304,
    num_attention_heads=14,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class MemoryTensor(TensorSource):
    """A tensor of a checkpoint that is an array."""

    array: np.ndarray

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        return self.array[index]


def memory_checkpoint(config: Qwen2Config, weights: Mapping[str, np.ndarray]) -> Checkpoint:
    return Checkpoint(
        name="memory",
        path=Path("memory"),
        format="safetensors",
        config=config,
        generation_config={},
        tensors={
            name: MemoryTensor(name=name, shape=a.shape, dtype=a.dtype, nbytes=a.nbytes, array=a)
            for name, a in weights.items()
        },
        tokenizer_files={},
        on_close=lambda: None,
    )


class MeshModel:
    """A model on a mesh, and the two ways to run it: without a cache and with one."""

    def __init__(
        self,
        config: Qwen2Config,
        mesh: str = "1",
        dtype: type = np.float32,
        weights: Mapping[str, np.ndarray] | None = None,
        numerics: str = "fast",
        quantization: str | None = None,
        *,
        kernels: bool = True,
    ):
        model = ParallelModel(
            config, make_mesh(mesh), jnp.dtype(dtype), numerics, quantization, kernels
        )
        self.plan = model.plan
        weights = reference.random_weights(config) if weights is None else weights
        self.params = load_params(memory_checkpoint(config, weights), model.weights)
        self.runner = ModelRunner(model, self.params)
        self._compiled: dict[tuple, jax.stages.Compiled] = {}

    def logits(self, token_ids, params=None) -> np.ndarray:
        """Of one forward pass without a cache: float32 [B, T, V, padding included]."""
        token_ids = np.asarray(token_ids, np.int32)
        compiled = self.compiled(*token_ids.shape)
        return np.asarray(compiled(params or self.params, token_ids))

    def step(self, token_ids, start, cache: KVCache) -> tuple[np.ndarray, KVCache]:
        """Logits of tokens [B, T] at positions from start[b] on, after those in the cache."""
        token_ids = np.asarray(token_ids, np.int32)
        inputs, blocks = self.inputs(token_ids, start, cache), len(cache[0].keys)
        compiled = self.compiled(*token_ids.shape, blocks=blocks)
        out, cache = compiled(self.params, cache, inputs.of_all())
        return np.asarray(out).reshape(*token_ids.shape, -1), cache

    def inputs(self, token_ids: np.ndarray, start, cache: KVCache) -> StepInputs:
        """Such tokens as a step takes them; each sequence has equally many blocks."""
        parts = self.plan.data_devices
        rows = len(token_ids) // parts
        blocks = (len(cache[0].keys) // parts - 1) // rows
        some = in_parts(token_ids, np.asarray(start), parts)
        tables = tables_in_order(parts, rows, blocks)
        return step_inputs(some, rows, rows * token_ids.shape[1], tables)

    def cached_logits(self, token_ids, slots: int = 16) -> np.ndarray:
        """As `logits`, by way of a cache of so many positions: all but two tokens, then each."""
        batch, length = np.shape(token_ids)
        found, cache = [], self.cache(batch, slots)
        for start, end in pairwise((0, length - 2, length - 1, length)):
            out, cache = self.step(token_ids[:, start:end], [start] * batch, cache)
            found.append(out)
        return np.concatenate(found, axis=1)

    def cache(self, batch: int, length: int) -> KVCache:
        """KV blocks for sequences of so many positions, at least."""
        blocks = -(-length // self.runner.model.backend.block_size)
        return self.runner.empty_blocks(1 + batch // self.plan.data_devices * blocks)

    def compiled(self, batch: int, length: int, blocks: int | None = None) -> jax.stages.Compiled:
        """The program for tokens [batch, length], with a cache of so many blocks unless None."""
        # A model may serve files with and without `unoptimised`.
        key = batch, length, blocks, jax.config.values["jax_disable_most_optimizations"]
        if key not in self._compiled:
            tokens = np.zeros((batch, length), np.int32)
            if blocks is None:
                lowered = self.runner.logits_program.lower(self.params, tokens)
            else:
                cache = self.runner.empty_blocks(blocks // self.plan.data_devices)
                inputs = self.inputs(tokens, np.zeros(batch, np.int32), cache)
                program = self.runner.compiled(
                    _paged_logits_step,
                    (self.runner.cache_axes, "batch"),
                    ("batch vocab", self.runner.cache_axes),
                )
                lowered = program.lower(self.params, cache, inputs.of_all())
            self._compiled[key] = lowered.compile()
        return self._compiled[key]


def _paged_logits_step(params, cache, inputs, model):
    x, cache = steps.forward_step(params, cache, inputs, model=model)
    return model.logits(params, x), cache


@functools.cache
def shared_model(
    config: Qwen2Config, mesh: str = "1", dtype: type = np.float32, numerics: str = "fast"
) -> MeshModel:
    """A model that several test files share, so that each program compiles once."""
    return MeshModel(config, mesh, dtype, numerics=numerics)


def whole(weight: Weight) -> np.ndarray:
    """What all devices hold of a weight; a packed one as [in, out], without its padding."""
    return whole_leaf(weight.leaf)


def whole_leaf(leaf: Leaf) -> np.ndarray:
    """The same of a leaf."""
    if not isinstance(leaf, Packed):
        return np.asarray(leaf)
    found = {}
    for i, place in _parts(leaf):
        pieces = [np.asarray(array.addressable_shards[i].data) for array in jax.tree.leaves(leaf)]
        part = leaf.format.wrap(pieces, leaf.shape, leaf.dtype).unpacked()
        found[tuple(axis.start for axis in place)] = np.asarray(part)
    rows = [
        np.concatenate([part for start, part in sorted(found.items()) if start[0] == row], axis=1)
        for row in sorted({start[0] for start in found})
    ]
    return np.concatenate(rows)


def bytes_on_one_device(weights: Mapping[str, np.ndarray]) -> int:
    """What weights take on one device: with kernels, those multiplied with in whole panels."""
    packs = kernels.instruction_set() is not None
    return sum(
        array.nbytes
        if not packs or array.ndim < 2 or "embed" in name
        else -(-array.shape[0] // 32) * 32 * array.shape[1] * array.itemsize
        for name, array in weights.items()
    )


def with_numbers(weight: Weight, numbers: np.ndarray) -> Weight:
    """The weight with other numbers, [in, out], on the same devices."""
    leaf = weight.leaf
    if not isinstance(leaf, Packed):
        return replace(weight, leaves=(jax.device_put(numbers, leaf.sharding),))
    packed = [
        jax.tree.leaves(leaf.format.pack(jnp.asarray(numbers[place].T), leaf.dtype))
        for _, place in _parts(leaf)
    ]
    arrays = [
        jax.make_array_from_single_device_arrays(
            old.shape,
            old.sharding,
            [
                jax.device_put(part, shard.device)
                for part, shard in zip(parts, old.addressable_shards, strict=True)
            ],
        )
        for old, parts in zip(jax.tree.leaves(leaf), zip(*packed, strict=True), strict=True)
    ]
    return replace(weight, leaves=(leaf.format.wrap(arrays, leaf.shape, leaf.dtype),))


def _parts(leaf: Packed) -> Iterator[tuple[int, tuple[slice, slice]]]:
    """The number of each device's part, and where it is in the whole [in, out]."""
    inputs, outputs = leaf.shape
    for i, shard in enumerate(jax.tree.leaves(leaf)[0].addressable_shards):
        column, row = (
            (axis.start or 0) // size
            for axis, size in zip(shard.index, shard.data.shape[:2], strict=False)
        )
        rows = slice(row * inputs, (row + 1) * inputs)
        yield i, (rows, slice(column * outputs, (column + 1) * outputs))


def random_tokens(config: Qwen2Config, batch: int, length: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, config.vocab_size, (batch, length), dtype=np.int32)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference in units of the largest expected value; NaN where one is NaN."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def collectives(hlo: str) -> list[tuple[str, int]]:
    """The collectives of a compiled program's HLO text: (kind, devices in each group), in order."""
    return [(found.kind, found.group_size) for found in verify_hlo.collectives(hlo)]


def count_collectives(hlo: str) -> dict[str, int]:
    return dict(Counter(kind for kind, _ in collectives(hlo)))


def padded_rows(lengths: Sequence[int], token_ids: np.ndarray) -> np.ndarray:
    """The rows cut to `lengths` and filled up with a token that would be noticed if seen."""
    rows = token_ids.copy()
    for row, length in zip(rows, lengths, strict=True):
        row[length:] = 1
    return rows


def with_nan(runner: ModelRunner, token: int) -> dict:
    """A runner's weights, but for the embedding of a token, which is NaN."""

    def broken(weight: Weight) -> Weight:
        set_nan = jax.jit(lambda x: x.at[token].set(np.nan), out_shardings=weight.array.sharding)
        return replace(weight, leaves=(set_nan(weight.array),))

    return updated(runner.params, "model.embed_tokens.weight", broken)
