# SPDX-License-Identifier: Apache-2.0
"""The tensors of GGUF files, quantised ones included. The block formats are the gguf package's."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from meshwen.checkpoints.base import Index, MappedFile, MappedTensor, TensorSource
from meshwen.checkpoints.gguf_header import DAMAGED, TensorInfo, read_header
from meshwen.checkpoints.gguf_names import hugging_face_name
from meshwen.common.extras import how_to_install
from meshwen.common.json_files import shown
from meshwen.errors import MeshwenError

MAGIC = b"GGUF"

_PLAIN = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
_SUPER_BLOCKS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
_SUPPORTED = (*_PLAIN, *_BLOCKS, *_SUPER_BLOCKS)

# The package's arithmetic is fastest, by measurement, when its temporaries stay in the cache.
_ELEMENTS_AT_A_TIME = 1 << 16


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockTensor(TensorSource):
    """A quantised tensor: blocks of consecutive elements of a row, each packed into a few bytes."""

    file: MappedFile
    offset: int
    block_elements: int
    block_bytes: int
    dequantize: Callable[[np.ndarray], np.ndarray]

    def read(self, index: Index = ()) -> np.ndarray:
        """A new float32 array; only the blocks that `index` touches are read and dequantised."""
        *lead, columns = (*index, *[slice(None)] * (len(self.shape) - len(index)))
        row_bytes = self.shape[-1] // self.block_elements * self.block_bytes
        data = self.file.bytes_at(self.offset, self.nbytes)
        rows = data.reshape(*self.shape[:-1], row_bytes)[tuple(lead)]
        indices = range(self.shape[-1])[columns]
        out = np.empty((*rows.shape[:-1], len(indices)), np.float32)
        if out.size:
            self._fill(out.reshape(-1, len(indices)), rows.reshape(-1, row_bytes), indices)
        return out

    def _fill(self, out: np.ndarray, rows: np.ndarray, indices: range) -> None:
        first = min(indices[0], indices[-1]) // self.block_elements
        stop = max(indices[0], indices[-1]) // self.block_elements + 1
        rows = rows[:, first * self.block_bytes : stop * self.block_bytes]
        covered = (stop - first) * self.block_elements
        columns = np.arange(indices.start, indices.stop, indices.step) - first * self.block_elements
        whole = len(columns) == covered and indices.step == 1
        step = max(1, _ELEMENTS_AT_A_TIME // covered)
        for start in range(0, len(rows), step):
            packed = np.ascontiguousarray(rows[start : start + step]).reshape(1, -1)
            values = self.dequantize(packed).reshape(-1, covered)
            out[start : start + step] = values if whole else values[:, columns]


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, TensorSource], MappedFile]:
    """The metadata by key, the tensors by Hugging Face name, and the file to close.

    Metadata values are plain Python: strings, numbers, booleans, lists. A tensor that the
    architecture does not have keeps the name that it has in the file.

    Raises MeshwenError when the gguf package is missing, when the file is truncated, corrupt or one
    part of several, and when a tensor has a type that cannot be read.
    """
    file = MappedFile(path)
    try:
        header = read_header(file.buffer)
    except DAMAGED as error:
        raise MeshwenError(
            f"{path} is not a whole GGUF file ({error or type(error).__name__}): download it again"
        ) from None
    if (parts := header.metadata.get("split.count", 1)) not in (0, 1):
        raise MeshwenError(
            f"{path} is one of {shown(parts)} parts: join them with `llama-gguf-split --merge` "
            "first"
        )
    tensors: dict[str, TensorSource] = {}
    architecture = str(header.metadata.get("general.architecture"))
    expected = 0
    for info in header.tensors:
        source = _tensor(file, info, header.data_start, architecture)
        if info.offset != expected:  # As in ggml: no gaps, nothing twice.
            raise MeshwenError(
                f"{path}: {shown(info.name)} begins at byte {info.offset} of the weights, and not "
                f"where the tensors before it end ({expected}): download it again"
            )
        if source.name in tensors:
            raise MeshwenError(f"{path}: two tensors are {shown(source.name)}: download it again")
        tensors[source.name] = source
        expected += -(-source.nbytes // header.alignment) * header.alignment
    return header.metadata, tensors, file


def _tensor(file: MappedFile, info: TensorInfo, data_start: int, architecture: str) -> TensorSource:
    constants, quants = _gguf_package()
    try:
        kind = constants.GGMLQuantizationType(info.type_id)
    except ValueError:
        kind = None
    if kind is None or kind.name not in _SUPPORTED:
        raise MeshwenError(
            f"{file.path}: {shown(info.name)} has type {kind.name if kind else info.type_id}, "
            f"which is not supported; use a file with {', '.join(_SUPPORTED)}"
        )
    block_elements, block_bytes = constants.GGML_QUANT_SIZES[kind]
    if info.shape[-1] % block_elements:
        raise MeshwenError(
            f"{file.path}: {shown(info.name)} has shape {list(info.shape)}, whose rows are not "
            f"whole {kind.name} blocks of {block_elements}: download it again"
        )
    place: dict[str, Any] = {
        "name": hugging_face_name(info.name, architecture),
        "shape": info.shape,
        "nbytes": math.prod(info.shape) // block_elements * block_bytes,
        "file": file,
        "offset": data_start + info.offset,
    }
    if place["offset"] + place["nbytes"] > len(file):
        raise MeshwenError(
            f"{file.path} is truncated: {shown(info.name)} would end at byte "
            f"{place['offset'] + place['nbytes']} of {len(file)}; download it again"
        )
    if kind.name in _PLAIN:
        return MappedTensor(**place, dtype=_PLAIN[kind.name])
    return BlockTensor(
        **place,
        dtype=np.dtype(np.float32),
        quantization=kind.name,
        block_elements=block_elements,
        block_bytes=block_bytes,
        dequantize=lambda packed: quants.dequantize(packed, kind),
    )


def _gguf_package() -> tuple[Any, Any]:
    try:
        from gguf import constants, quants
    except ImportError:
        raise MeshwenError(
            f"reading GGUF files needs the package gguf: {how_to_install('gguf')}"
        ) from None
    return constants, quants
