# SPDX-License-Identifier: Apache-2.0
"""Times of a warm model: programs are compiled and caches filled before anything counts."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count
from math import ceil
from typing import Self

import jax
import numpy as np

from meshwen.cache.kv_cache import KVCache
from meshwen.engine.engine import Engine
from meshwen.engine.request import Request
from meshwen.engine.runner import ModelRunner
from meshwen.engine.sampling import SamplerRows, SamplingMethod
from meshwen.engine.sampling_params import SamplingParams
from meshwen.engine.step_inputs import in_parts, step_inputs, tables_in_order
from meshwen.errors import MeshwenError

_GREEDY = SamplingMethod(candidates=1, penalize=False, logprobs=False)
_WARM_UP = 2
_prompts = count()  # That were measured in this process.


@dataclass(frozen=True)
class Seconds:
    """Seconds of several runs: the median, and the least and the most."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, runs: Iterable[float]) -> Self:
        """What several runs took."""
        seconds = sorted(runs)
        return cls(statistics.median(seconds), seconds[0], seconds[-1])


def decode(runner: ModelRunner, batch: int, length: int, steps: int) -> Seconds:
    """A greedy decode step of `batch` sequences, from `length` tokens on, sampling included."""
    rows = SamplerRows.of([SamplingParams(temperature=0)] * batch)
    parts, block_size = runner.plan.data_devices, runner.model.backend.block_size
    size, blocks = batch // parts, ceil((length + _WARM_UP + steps) / block_size)
    tables = tables_in_order(parts, size, blocks)
    cache = _filled_blocks(runner, tables)
    tokens = np.ones(batch, np.int32)

    def step(number: int) -> None:
        nonlocal cache, tokens
        some = in_parts(tokens[:, None], np.full(batch, length + number), parts)
        inputs = step_inputs(some, size, size, tables)
        sampled, _, cache = runner.step(cache, inputs, rows, None, _GREEDY)
        tokens = np.asarray(sampled.tokens)

    return _timed(step, steps)


def _filled_blocks(runner: ModelRunner, tables: np.ndarray) -> KVCache:
    """KV blocks which all hold what some block of tokens has.

    An array that nothing was written to may be no memory yet, and is read faster, or hold NaN.
    """
    parts, length = runner.plan.data_devices, runner.model.backend.block_size
    size, blocks = len(tables) // parts, tables.shape[1]
    cache = runner.empty_blocks(1 + size * blocks)
    tokens = in_parts(np.ones((parts, length), np.int32), np.zeros(parts, np.int32), parts)
    first = step_inputs(tokens, 1, length, tables_in_order(parts, 1, 1))
    _, cache = runner.forward(cache, first)
    for row in range(size):  # Not at once: copies take memory.
        destination = tables[row::size].reshape(-1)
        cache = runner.copied_blocks(cache, np.ones_like(destination), destination)
    return cache


def first_token(engine: Engine, length: int, runs: int) -> Seconds:
    """From a prompt of `length` tokens to the first token of its answer."""
    sampling = SamplingParams(max_new_tokens=1, temperature=0)

    def prefill(_: int) -> None:
        # With a salt of its own: nothing of a prompt before it is found in the KV cache.
        request = Request((1,) * length, sampling, f"prompt {next(_prompts)}")
        for event in engine.run([request]):
            if event.completion and event.completion.error:
                raise MeshwenError(event.completion.error)

    return _timed(prefill, runs)


def _timed(run: Callable[[int], None], runs: int) -> Seconds:
    seconds = []
    for number in range(_WARM_UP + runs):
        began = time.perf_counter()
        run(number)
        seconds.append(time.perf_counter() - began)
    return Seconds.of(seconds[_WARM_UP:])


def peak_bytes(devices: Iterable[jax.Device]) -> int:
    """The most memory that was taken so far: of the fullest device, on a CPU of the process."""
    peaks = [
        stats["peak_bytes_in_use"]
        for device in devices
        if (stats := device.memory_stats()) and "peak_bytes_in_use" in stats
    ]
    if peaks:
        return int(max(peaks))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB.
