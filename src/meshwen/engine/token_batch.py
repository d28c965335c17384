# SPDX-License-Identifier: Apache-2.0
"""A batch of token ids with padding, as a user gives it, and as the logits step takes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from meshwen.errors import MeshwenError
from meshwen.models.config import ModelConfig
from meshwen.runtime.shape_buckets import shape_bucket


@dataclass(frozen=True)
class TokenBatch:
    """Token ids whose padding stands behind them: no token sees it, and all begin at position 0.

    Attributes:
        ids: int [batch, sequence].
        order: int [batch, sequence], where each of them stood in what the user gave.
    """

    ids: np.ndarray
    order: np.ndarray

    @classmethod
    def of(
        cls, input_ids: ArrayLike, attention_mask: ArrayLike | None, config: ModelConfig
    ) -> Self:
        """Checks what a user gave.

        Args:
            input_ids: int [batch, sequence].
            attention_mask: int or bool [batch, sequence], 0 at padding, which is before or behind
                a sequence, and 1 at its tokens; None: no padding.
            config: the model's.

        Raises:
            MeshwenError: they are not a batch, an id is outside the vocabulary, a sequence is
                longer than the model's context, or the mask is no such mask.
        """
        ids = _array("input_ids", input_ids)
        if ids.ndim != 2 or not ids.size or ids.dtype.kind not in "iu":
            raise MeshwenError(
                f"input_ids must be int [batch, sequence], not {ids.dtype} {ids.shape}"
            )
        if ids.min() < 0 or ids.max() >= config.vocab_size:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise MeshwenError(
                f"input_ids must be from 0 to {config.vocab_size - 1}, but one is {wrong}"
            )
        mask = np.ones_like(ids) if attention_mask is None else _mask(attention_mask, ids.shape)
        longest = (mask != 0).sum(axis=1).max()
        if longest > config.context_length:
            raise MeshwenError(
                f"input_ids has a sequence of {longest} tokens, but the model's "
                f"context is {config.context_length} tokens"
            )
        order = np.argsort(mask == 0, axis=1, kind="stable")
        return cls(np.take_along_axis(ids, order, axis=1), order)

    def padded(self, rows: int) -> np.ndarray:
        """The ids, int32, with rows up to a multiple, and a length that few programs have."""
        batch, length = self.ids.shape
        extra = ((0, -batch % rows), (0, shape_bucket(length) - length))
        return np.pad(self.ids, extra).astype(np.int32)

    def restored(self, logits: Array) -> Array:
        """Logits of `padded` ids, in the order and the shape of what the user gave.

        Args:
            logits: [batch, sequence, vocab_size], or more rows and positions.
        """
        batch, length = self.ids.shape
        logits = logits[:batch, :length]
        if (np.diff(self.order, axis=1) == 1).all():
            return logits
        return jnp.take_along_axis(logits, self.order.argsort(axis=1)[..., None], axis=1)


def _mask(attention_mask: ArrayLike, shape: tuple[int, ...]) -> np.ndarray:
    """The mask as an array. Refuses what says anything but where the padding is."""
    mask = _array("attention_mask", attention_mask)
    if mask.dtype.kind not in "biu":
        raise MeshwenError(
            f"attention_mask must be int or bool, 1 at tokens and 0 at padding, not {mask.dtype}"
        )
    if mask.shape != shape:
        raise MeshwenError(f"attention_mask {mask.shape} must have the shape {shape} of input_ids")
    other = np.argwhere((mask != 0) & (mask != 1))
    if len(other):
        row, position = other[0]
        raise MeshwenError(
            "attention_mask must be 1 at tokens and 0 at padding, but at position "
            f"{position} of row {row} it is {mask[row, position]}"
        )
    tokens = mask != 0
    before = np.logical_or.accumulate(tokens, axis=1)
    behind = np.logical_or.accumulate(tokens[:, ::-1], axis=1)[:, ::-1]
    holes = np.argwhere(before & behind & ~tokens)
    if len(holes):
        row, position = holes[0]
        raise MeshwenError(
            f"attention_mask is 0 at position {position} of row {row}, which is between tokens: "
            "padding can only be before or behind a sequence; leave the token out of input_ids"
        )
    return mask


def _array(name: str, value: Any) -> np.ndarray:
    try:
        return np.asarray(value)
    except ValueError as error:
        raise MeshwenError(f"{name} must have rows of one length: {error}") from None
