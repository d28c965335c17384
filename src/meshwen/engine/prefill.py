# SPDX-License-Identifier: Apache-2.0
"""Prompts on their way into the KV cache, chunk by chunk; answers too, where these are resumed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from meshwen.engine.sequence import SequenceState
from meshwen.runtime.shape_buckets import shape_bucket


class PrefillInputs(NamedTuple):
    """A chunk as `ModelRunner.prefill` takes it, of P parts of the batch."""

    token_ids: np.ndarray  # int32 [P, T]
    rows: np.ndarray  # int32 [P], of the part
    start: np.int32  # position of the chunk
    lengths: np.ndarray  # int32 [P], of the prompts; 0 where there is none
    positions: int  # of the cache that the chunk attends to


@dataclass(frozen=True)
class Prefill:
    """Prompts that are prefilled together, at most one on each part of the batch.

    Attributes:
        sequences: by part.
        chunks: lengths of the chunks; those of the longest prompt.
        done: chunks that are in the cache.
    """

    sequences: Mapping[int, SequenceState]
    chunks: Sequence[int]
    done: int = 0

    @property
    def start(self) -> int:
        """Position of the next chunk."""
        return sum(self.chunks[: self.done])

    @property
    def is_complete(self) -> bool:
        """Whether all chunks are done."""
        return self.done == len(self.chunks)

    @property
    def progress(self) -> tuple[int, int]:
        """Tokens done of the longest prompt, and its length."""
        longest = max(one.length for one in self.sequences.values())
        return min(self.start, longest), longest

    def advanced(self) -> Prefill:
        """The same when the next chunk is done."""
        return replace(self, done=self.done + 1)

    def without(self, numbers: Collection[int]) -> Prefill | None:
        """The same without some requests; None where no other is left."""
        left = {part: s for part, s in self.sequences.items() if s.number not in numbers}
        return replace(self, sequences=left) if left else None

    def lengths(self, parts: int) -> np.ndarray:
        """The prompts' lengths by part, 0 where there is none: int32 [P]."""
        lengths = np.zeros(parts, np.int32)
        for part, sequence in self.sequences.items():
            lengths[part] = sequence.length
        return lengths

    def inputs(self, rows: Sequence[int]) -> PrefillInputs:
        """The next chunk.

        Args:
            rows: each part's row among those of the part; any where it has no prompt.
        """
        start, length = self.start, self.chunks[self.done]
        end = start + length
        token_ids = np.zeros((len(rows), length), np.int32)
        for part, sequence in self.sequences.items():
            tokens = sequence.token_ids[start:end]
            token_ids[part, : len(tokens)] = tokens
        # The first chunk attends to itself alone, later ones to the filled part of the cache.
        positions = shape_bucket(end) if start else length
        return PrefillInputs(
            token_ids, np.array(rows, np.int32), np.int32(start), self.lengths(len(rows)), positions
        )
