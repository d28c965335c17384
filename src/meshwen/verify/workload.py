# SPDX-License-Identifier: Apache-2.0
"""What every mesh computes: the same prompts, continued by the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meshwen.errors import MeshwenError
from meshwen.models.config import ModelConfig
from meshwen.runtime.shape_buckets import shape_bucket

# Of different lengths, so that rows of one batch end at different places.
BUILT_IN_PROMPTS = (
    "Maya buys 4 books at $7 each and pays with $50. How much change does she get?",
    "Name three colours.",
    "A train leaves at 9:40 and arrives at 12:05. How many minutes does the journey take? "
    "Answer with one number.",
    "Hi",
)


@dataclass(frozen=True)
class Workload:
    """Prompts as rows of a batch, and how they go on.

    Attributes:
        prompts: token ids of each prompt.
        continuations: int32 [prompts, steps], the tokens that every mesh is fed; None before they
            have been generated.
        steps: tokens after each prompt.
        rows_multiple: batches have a multiple of this many rows, on every mesh.
    """

    prompts: tuple[tuple[int, ...], ...]
    steps: int
    rows_multiple: int = 1
    continuations: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.continuations is not None:
            assert self.continuations.shape == (len(self.prompts), self.steps)

    @property
    def rows(self) -> int:
        """Rows of a batch of all prompts; those beyond the prompts repeat the first."""
        return -(-len(self.prompts) // self.rows_multiple) * self.rows_multiple

    @property
    def lengths(self) -> np.ndarray:
        """Lengths of the rows' prompts: int32 [rows]."""
        lengths = [len(prompt) for prompt in self.prompts]
        return self._to_rows(np.array(lengths, np.int32))

    @property
    def prompt_length(self) -> int:
        """Length of a prefill of all prompts."""
        return shape_bucket(max(len(prompt) for prompt in self.prompts))

    @property
    def length(self) -> int:
        """Length of a cache, or of a whole forward pass, with every prompt and continuation."""
        return shape_bucket(max(len(prompt) for prompt in self.prompts) + self.steps)

    def prompt_rows(self) -> np.ndarray:
        """The prompts, zeros behind them: int32 [rows, prompt_length]."""
        tokens = np.zeros((len(self.prompts), self.prompt_length), np.int32)
        for row, prompt in zip(tokens, self.prompts, strict=True):
            row[: len(prompt)] = prompt
        return self._to_rows(tokens)

    def fed(self) -> np.ndarray:
        """The continuations as rows: int32 [rows, steps]."""
        assert self.continuations is not None
        return self._to_rows(self.continuations)

    def sequences(self) -> tuple[np.ndarray, np.ndarray]:
        """Prompts and continuations: token ids, int32 [rows, length], and lengths, int32 [rows]."""
        tokens = np.zeros((self.rows, self.length), np.int32)
        prompts, fed = self.prompt_rows(), self.fed()
        ends = self.lengths + self.steps - 1  # No logits are compared after the last token.
        for row, (length, end) in enumerate(zip(self.lengths, ends, strict=True)):
            tokens[row, :length] = prompts[row, :length]
            tokens[row, length:end] = fed[row, :-1]
        return tokens, ends

    def compared(self, row: int) -> slice:
        """The positions of a row's sequence whose logits are compared."""
        length = int(self.lengths[row])
        return slice(length - 1, length - 1 + self.steps)

    def _to_rows(self, array: np.ndarray) -> np.ndarray:
        extra = self.rows - len(array)
        return np.concatenate([array, np.repeat(array[:1], extra, axis=0)])


def check_length(prompts: Sequence[Sequence[int]], steps: int, config: ModelConfig) -> None:
    """Refuses prompts that do not fit the model's context with what follows them."""
    longest = max(len(prompt) for prompt in prompts)
    if longest + steps > config.context_length:
        raise MeshwenError(
            f"a prompt of {longest} tokens and {steps} tokens after it do not fit the model's "
            f"context of {config.context_length}; shorten it, or lower --max-new-tokens"
        )


def dummy_prompts(config: ModelConfig) -> tuple[tuple[int, ...], ...]:
    """Prompts for a model without a tokenizer: token ids, the same every time."""
    rng = np.random.default_rng(0)
    lengths = (21, 7, 33, 2)
    return tuple(tuple(rng.integers(0, config.vocab_size, n).tolist()) for n in lengths)
