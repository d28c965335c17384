# SPDX-License-Identifier: Apache-2.0
"""Where a weight's numbers come from: what the loader asks of a checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Index = tuple[slice, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorSource(ABC):
    """One tensor of a checkpoint, not read yet.

    Attributes:
        name: the Hugging Face name, `model.layers.0.self_attn.q_proj.weight`.
        shape: the Hugging Face shape, `[out, in]` for a projection.
        dtype: the numpy dtype of what `read` returns; bfloat16 is `ml_dtypes.bfloat16`, and a
            quantised tensor reads as float32.
        quantization: the name of the block format in the file ("Q4_K"), None when not quantised.
        nbytes: the bytes that the tensor takes in the file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    quantization: str | None = None
    nbytes: int

    @abstractmethod
    def read(self, index: Index = ()) -> np.ndarray:
        """The part of the tensor that `index` covers, as numpy indexing understands it.

        Reads nothing else from the file. The array may be a read-only view of the mapped file: it
        stays valid for as long as it is referenced, but shows whatever the file then holds. Memory
        stays low when it is copied before the next tensor is read (`jax.device_put` copies later).
        """


class WeightFile(Protocol):
    """An open checkpoint, as far as its weights go."""

    @property
    def path(self) -> Path | None:
        """The folder or file, for messages."""

    @property
    def tensors(self) -> Mapping[str, TensorSource]:
        """What it holds, by Hugging Face name."""

    @property
    def misfit_hint(self) -> str | None:
        """Why its tensors may not fit its config, if anything is known."""
