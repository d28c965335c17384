# SPDX-License-Identifier: Apache-2.0
"""A runner without a model, for tests of the step loop: its KV blocks hold tokens and prefixes.

It reads and writes blocks through block tables alone, as a model of two layers does: what the
second one holds of a token follows from all tokens before it. So it tells where a sequence has a
block that is another's, was overwritten or was never written.
"""

import zlib
from types import SimpleNamespace

import jax
import numpy as np

from meshwen.cache.block_pool import NULL_BLOCK
from meshwen.engine.logprobs import Logprobs
from meshwen.engine.sampling import NO_TOKEN, Sampled
from meshwen.engine.step_inputs import StepInputs
from meshwen.ops.backend import Backend
from meshwen.parallel.mesh import make_mesh
from meshwen.parallel.plan import ParallelPlan
from tiny_model import ONE_LAYER

VOCAB = 7
_POWERS = np.cumprod(np.full(2000, 0x9E3779B97F4A7C15, np.uint64))


def state(tokens) -> int:
    """Of the last of some tokens: by the first and the last three, so that answers repeat."""
    return zlib.crc32(np.asarray([tokens[0], *tokens[-3:]], np.int64).tobytes()) & 0xFFFF


def following(tokens, seed: int) -> int:
    """The token after others."""
    return (state(tokens) + seed) % VOCAB


def answer(prompt, seed: int, count: int) -> list[int]:
    """What follows a prompt that is alone."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(following(tokens, seed))
    return tokens[len(prompt) :]


def logprob(states, targets):
    """Of tokens after others."""
    return -((31 * states + targets) % 101) / 8


class FakeRunner:
    """Has what the step loop asks of a `ModelRunner`.

    Attributes:
        steps: the inputs of all steps.
        programs: what a runner compiles for them: a name, and what the program depends on.
    """

    def __init__(self, mesh: str, block_size: int):
        self.plan, self.config = ParallelPlan(ONE_LAYER.sizes, make_mesh(mesh)), ONE_LAYER
        self.model = SimpleNamespace(backend=Backend())
        self.block_size, self.steps, self.programs = block_size, [], set()
        self._parts = self.plan.data_devices

    def empty_blocks(self, count):
        shape = self._parts, count, self.block_size
        return np.full(shape, -1), np.zeros(shape, np.uint64)

    def copied_blocks(self, cache, source, destination):
        for array in cache:
            for part, (old, new) in enumerate(zip(*self._split(source, destination), strict=True)):
                array[part, new] = array[part, old]
        return cache

    def forward(self, cache, inputs):
        self._compile("forward", inputs)
        return self._forward(cache, inputs)

    def _forward(self, cache, inputs):
        states = self._states(cache, inputs)
        if inputs.asked is not None:
            asked = np.maximum(*self._split(inputs.asked), 0)
            states = np.take_along_axis(states, asked, axis=1)
        return states.reshape(-1), cache

    def step(self, cache, inputs, rows, penalized, method):
        self._compile("step", inputs, method)
        states, cache = self._forward(cache, inputs.of_all())
        return self._sampled(states, inputs, rows), penalized, cache

    def sample(self, hidden, inputs, rows, penalized, method):
        assert inputs.sampler_rows is None
        self._compile("sample", inputs, len(hidden), method)
        return self._sampled(hidden, inputs, rows), penalized

    def logprobs(self, hidden, targets, top):
        assert (len(hidden), top) == (len(targets), 0)
        return Logprobs(jax.device_put(logprob(hidden, targets)))

    def _compile(self, name, inputs, *more):
        # Not on the width of tables, which is always the same for the kernels.
        some = inputs._replace(tables=None)
        shapes = (None if array is None else array.shape for array in some)
        self.programs.add((name, *shapes, *more))

    def _split(self, *arrays):
        """Arrays [P*n, ...] as [P, n, ...]."""
        return tuple(a.reshape(self._parts, -1, *a.shape[1:]) for a in arrays)

    def _sampled(self, states, inputs, rows):
        asked, states, seeds = self._split(inputs.asked, states, np.asarray(rows.seed))
        if inputs.sampler_rows is None:
            assert asked.shape == seeds.shape
        else:
            seeds = np.take_along_axis(seeds, *self._split(inputs.sampler_rows), axis=1)
        found = (np.take_along_axis(states, np.maximum(asked, 0), axis=1) + seeds) % VOCAB
        return Sampled(jax.device_put(np.where(asked < 0, NO_TOKEN, found).reshape(-1)), None)

    def _states(self, cache, inputs: StepInputs) -> np.ndarray:
        """Takes tokens into the cache: `state` of each, [P, N]."""
        self.steps.append(inputs)
        tokens, prefixes = cache
        ids, positions, starts, lengths, tables = self._split(*inputs[:5])
        assert starts.shape[1] == lengths.shape[1] + 1 == tables.shape[1] + 1
        states, written = np.zeros_like(ids), np.zeros(tokens.shape, bool)
        places, S = [], self.block_size
        for part, row in np.ndindex(lengths.shape):
            own = slice(starts[part, row], starts[part, row + 1])
            at, table = positions[part, own], tables[part, row]
            if not len(at):
                continue
            assert (at == np.arange(lengths[part, row] - len(at), lengths[part, row])).all()
            slots = part, table[at // S], at % S
            assert not (slots[1] == NULL_BLOCK).any(), "the null block is written to"
            assert not written[slots].any(), "two tokens are written to one place"
            written[slots] = True
            tokens[slots] = ids[part, own]
            places.append((own, at, slots, (part, table[: -(-lengths[part, row] // S)])))
        for _, at, slots, blocks in places:
            prefixes[slots] = _prefixes(tokens[blocks].reshape(-1))[at]
        for own, at, (part, *_), blocks in places:
            seen, held = tokens[blocks].reshape(-1), prefixes[blocks].reshape(-1)
            length = at[-1] + 1
            assert (held == _prefixes(seen))[:length].all(), "a block is of another sequence"
            states[part, own] = [state(seen[: place + 1]) for place in at]
        return states


def _prefixes(tokens: np.ndarray) -> np.ndarray:
    """A number for the tokens up to each."""
    return np.cumsum((tokens + 2).astype(np.uint64) * _POWERS[: len(tokens)])
