# SPDX-License-Identifier: Apache-2.0
"""The model as the tests run it: any config, weights from memory, any mesh."""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import reference
from meshwen.checkpoints import Checkpoint, TensorSource
from meshwen.config import Qwen2Config
from meshwen.kv_cache import KVCache
from meshwen.loading import load_params
from meshwen.model import hidden_states, logits
from meshwen.parallel.mesh import make_mesh
from meshwen.parallel.plan import ParallelPlan
from meshwen.runner import ModelRunner
from meshwen.verify import hlo as verify_hlo

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
        key = batch, length, slots
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
