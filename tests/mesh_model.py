# SPDX-License-Identifier: Apache-2.0
"""The model as the tests run it: any config, weights from memory, any mesh."""

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import reference
from meshwen.cache.kv_cache import KVCache
from meshwen.checkpoints import Checkpoint, TensorSource
from meshwen.engine.runner import ModelRunner
from meshwen.models.qwen2 import Qwen2Config, hidden_states, logits
from meshwen.ops.cpu import kernels
from meshwen.ops.cpu.packing import AnyWeight, PackedWeight, unpacked
from meshwen.parallel.mesh import make_mesh
from meshwen.parallel.plan import ParallelPlan
from meshwen.verify import hlo as verify_hlo
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
    ):
        self.plan = ParallelPlan(config, make_mesh(mesh), numerics, quantization)
        weights = reference.random_weights(config) if weights is None else weights
        dtype = jnp.dtype(dtype)
        self.params = load_params(memory_checkpoint(config, weights), self.plan, dtype)
        self.runner = ModelRunner(self.plan, self.params, dtype)
        self._compiled: dict[tuple, jax.stages.Compiled] = {}

    def logits(self, token_ids, params=None) -> np.ndarray:
        """Of one forward pass without a cache: float32 [B, T, V, padding included]."""
        token_ids = np.asarray(token_ids, np.int32)
        compiled = self.compiled(*token_ids.shape)
        return np.asarray(compiled(params or self.params, token_ids))

    def step(self, token_ids, start, cache: KVCache) -> tuple[np.ndarray, KVCache]:
        """Logits of tokens [B, T] at positions from start[b] on, after those in the cache."""
        token_ids = np.asarray(token_ids, np.int32)
        compiled = self.compiled(*token_ids.shape, slots=cache[0].values.shape[2])
        out, cache = compiled(self.params, token_ids, np.asarray(start, np.int32), cache)
        return np.asarray(out), cache

    def cache(self, batch: int, slots: int) -> KVCache:
        return self.runner.empty_cache(batch, slots)

    def compiled(self, batch: int, length: int, slots: int | None = None) -> jax.stages.Compiled:
        """The program for tokens [batch, length], with a cache of `slots` slots unless None."""
        # A model may serve files with and without `unoptimised`.
        key = batch, length, slots, jax.config.values["jax_disable_most_optimizations"]
        if key not in self._compiled:
            tokens = np.zeros((batch, length), np.int32)
            if slots is None:
                lowered = self.runner._logits.lower(self.params, tokens)
            else:
                start, cache = np.zeros(batch, np.int32), self.cache(batch, slots)
                program = self.runner.compiled(
                    _step,
                    ("batch length", "batch", "batch heads"),
                    ("batch length vocab", "batch heads"),
                )
                lowered = program.lower(self.params, tokens, start, cache)
            self._compiled[key] = lowered.compile()
        return self._compiled[key]


def _step(params, token_ids, start, cache, *, config, tp):
    """What the runner's prefill and decode do, with the logits of all positions and rows."""
    slots = cache[0].values.shape[2]
    x, cache = hidden_states(params, token_ids, start, cache, slots, config, tp)
    return logits(params, x, tp), cache


@functools.cache
def shared_model(
    config: Qwen2Config, mesh: str = "1", dtype: type = np.float32, numerics: str = "fast"
) -> MeshModel:
    """A model that several test files share, so that each program compiles once."""
    return MeshModel(config, mesh, dtype, numerics=numerics)


def whole(weight: AnyWeight) -> np.ndarray:
    """What all devices hold of a weight; a packed one as [in, out], without its padding."""
    if not isinstance(weight, PackedWeight):
        return np.asarray(weight)
    found = {}
    for shard, place in _parts(weight):
        part = unpacked(replace(weight, values=np.asarray(shard.data)))
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


def with_numbers(weight: AnyWeight, numbers: np.ndarray) -> AnyWeight:
    """The weight with other numbers, [in, out], on the same devices."""
    if not isinstance(weight, PackedWeight):
        return jax.device_put(numbers, weight.sharding)
    arrays = [
        jax.device_put(PackedWeight.of(numbers[place].T, weight.dtype).values, shard.device)
        for shard, place in _parts(weight)
    ]
    values = weight.values
    return replace(
        weight,
        values=jax.make_array_from_single_device_arrays(values.shape, values.sharding, arrays),
    )


def _parts(weight: PackedWeight) -> Iterator[tuple[jax.Shard, tuple[slice, slice]]]:
    """Each device's part of a packed weight, and where it is in the whole one [in, out]."""
    inputs, outputs = weight.shape
    for shard in weight.values.addressable_shards:
        panels, steps = (
            (axis.start or 0) // size
            for axis, size in zip(shard.index, shard.data.shape[:2], strict=False)
        )
        rows = slice(steps * inputs, (steps + 1) * inputs)
        yield shard, (rows, slice(panels * outputs, (panels + 1) * outputs))


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
    model = runner.params["model"]
    table = model["embed_tokens"]["weight"]
    broken = jax.jit(lambda x: x.at[token].set(np.nan), out_shardings=table.sharding)(table)
    return runner.params | {"model": model | {"embed_tokens": {"weight": broken}}}
