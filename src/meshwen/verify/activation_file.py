# SPDX-License-Identifier: Apache-2.0
"""Activations that another stack wrote with `numpy.savez`, read within limits: a stranger's file.

Each array is named after the module of Hugging Face's model whose output it is. Of every array the
header is read first. Numbers are read only where the header has the shape that the model and the
file's `input_ids` ask for, and only where the archive as a whole unpacks to not much more than its
size, so that a small file cannot ask for much memory.
"""

from __future__ import annotations

import io
import math
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from meshwen.common.arguments import meant, one_of
from meshwen.common.json_files import shown
from meshwen.common.units import bytes_text
from meshwen.errors import MeshwenError
from meshwen.models.config import ModelConfig
from meshwen.verify.operations import LOGITS, Operation

INPUT_IDS = "input_ids"
MOST_TOKENS = 32_768
MOST_PER_PROMPT = 2 << 30  # bytes of an array in float64, in which one prompt at a time is compared
# Zipped floating-point numbers take a fifth of their bytes, or more, unless many are equal.
_MOST_UNPACKED = 256 << 20  # bytes of all arrays, or
_MOST_RATIO = 16  # times the bytes of the file.
_LONGEST_HEADER = 1 << 14  # bytes
_EXAMPLES = "model.embed_tokens, model.layers.0.self_attn, model.layers.0.mlp, lm_head"
_HOW = "save arrays with numpy.savez(FILE, **arrays)"
_FLOATS = ("float16", "float32", "float64")
# numpy writes ml_dtypes' bfloat16 as two bytes without a meaning; torch's can be viewed as uint16.
_BFLOAT16 = ("uint16", "void16")


@dataclass(frozen=True)
class Activations:
    """What another stack gave for some prompts of one length.

    Attributes:
        input_ids: int32 [B, T].
        values: of each operation that the file has, in the order of the forward pass: floating
            point [B, T, D], and [B, T, V] of the logits. All are finite.
    """

    input_ids: np.ndarray
    values: dict[Operation, np.ndarray]


def read_activations(path: Path, config: ModelConfig, modules: dict[str, Operation]) -> Activations:
    """Reads a file of activations.

    Args:
        path: an archive of arrays, as `numpy.savez` and `numpy.savez_compressed` write it.
        config: the model's.
        modules: the names that an array may have, in the order of the forward pass.

    Raises:
        MeshwenError: it cannot be read, is none, or does not fit the model; names the array.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check_unpacked(archive, path)
            return _read(_arrays(archive, str(path)), config, modules, str(path))
    except OSError as error:
        raise MeshwenError(f"cannot read {path}: {error.strerror or error}") from None
    except MeshwenError:
        raise
    except Exception as error:  # zipfile raises anything on damaged files.
        reason = str(error) or type(error).__name__
        raise MeshwenError(f"{path} is no .npz file ({reason}): {_HOW}") from None


def _check_unpacked(archive: zipfile.ZipFile, path: Path) -> None:
    """Raises MeshwenError for an archive that unpacks to more than activations would."""
    unpacked = sum(info.file_size for info in archive.infolist())
    packed = path.stat().st_size
    if unpacked > max(_MOST_UNPACKED, _MOST_RATIO * packed):
        raise MeshwenError(
            f"{path} unpacks from {bytes_text(packed)} to {bytes_text(unpacked)}, more than "
            f"{_MOST_RATIO} times as much: save it unpacked, with numpy.savez"
        )


def _read(
    arrays: dict[str, _Array], config: ModelConfig, modules: dict[str, Operation], where: str
) -> Activations:
    if INPUT_IDS not in arrays:
        raise MeshwenError(
            f"{where} has no {INPUT_IDS}, the tokens that were fed: save them too, as integers"
        )
    names = [name for name in modules if name in arrays]
    for name in arrays:
        if name not in modules and name != INPUT_IDS:
            raise MeshwenError(
                f"{where}: {shown(name)} is no activation of this model"
                f"{_meant(name, modules, config)}: name arrays after Hugging Face's modules, such "
                f"as {_EXAMPLES}"
            )
    if not names:
        raise MeshwenError(f"{where} has no activation beside {INPUT_IDS}")
    input_ids = _input_ids(arrays[INPUT_IDS], config)
    values = {}
    for name in names:
        size = config.vocab_size if modules[name] == LOGITS else config.hidden_size
        values[modules[name]] = arrays[name].activation((*input_ids.shape, size))
    return Activations(input_ids, values)


def _meant(name: str, modules: dict[str, Operation], config: ModelConfig) -> str:
    layer = re.match(r"model\.layers\.([0-9]{1,9})(\.|$)", name)
    if layer and int(layer[1]) >= config.num_hidden_layers:
        return f", whose layers are 0 to {config.num_hidden_layers - 1}"
    return meant(name[:200], [*modules, INPUT_IDS], most=1)


def _input_ids(array: _Array, config: ModelConfig) -> np.ndarray:
    """int32 [B, T]: one prompt, or several of one length."""
    shape = array.shape
    if array.dtype.kind not in "iu" or len(shape) not in (1, 2) or min(shape) < 1:
        raise MeshwenError(
            f"{array.where} must be integers [T] or [B, T], not {array.dtype} {list(shape)}"
        )
    limit = config.context_length
    if shape[-1] > limit:
        raise MeshwenError(
            f"{array.where} has {shape[-1]} tokens, but the model's context is {limit} tokens"
        )
    if math.prod(shape) > MOST_TOKENS:
        raise MeshwenError(
            f"{array.where} has {math.prod(shape)} tokens: give at most {MOST_TOKENS}"
        )
    ids = array.numbers().reshape(-1, shape[-1])
    outside = (ids < 0) | (ids >= config.vocab_size)
    if outside.any():
        raise MeshwenError(
            f"{array.where} has the token id {ids[outside][0]}, outside of the vocabulary of "
            f"{config.vocab_size}"
        )
    return ids.astype(np.int32)


@dataclass(frozen=True)
class _Array:
    """One array of the archive, whose header has been read.

    Attributes:
        archive, info: where it is.
        where: what to call it in an error.
        shape, fortran, dtype: as its header says.
        offset: bytes of the header.
    """

    archive: zipfile.ZipFile
    info: zipfile.ZipInfo
    where: str
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    offset: int

    def activation(self, shape: tuple[int, int, int]) -> np.ndarray:
        """Its numbers, floating point [B, T, D]; with one prompt the first axis may be missing."""
        expected = [shape] if shape[0] > 1 else [shape, shape[1:]]
        if self.shape not in expected:
            texts = [str(list(one)) for one in expected]
            raise MeshwenError(f"{self.where} must be {one_of(texts)}, not {list(self.shape)}")
        if self.dtype.name not in (*_FLOATS, *_BFLOAT16):
            raise MeshwenError(
                f"{self.where} must be {', '.join(_FLOATS)}, or bfloat16 as uint16, not "
                f"{self.dtype.name}"
            )
        if 8 * math.prod(shape[1:]) > MOST_PER_PROMPT:
            raise MeshwenError(
                f"{self.where} has {shape[1]} x {shape[2]} numbers for a prompt: give prompts of "
                f"at most {MOST_PER_PROMPT // (8 * shape[2])} tokens, or leave the array out"
            )
        values = self.numbers()
        if self.dtype.name in _BFLOAT16:
            values = values.view(ml_dtypes.bfloat16)
        values = values.reshape(shape)
        for prompt, rows in enumerate(values):
            with np.errstate(over="ignore"):
                finite = np.isfinite(rows.astype(np.float32, copy=False))
            if not finite.all():
                position, element = np.argwhere(~finite)[0]
                raise MeshwenError(
                    f"{self.where} is {rows[position, element]} at prompt {prompt}, position "
                    f"{position}, element {element}: it is the first activation of the forward "
                    "pass that is not finite in float32"
                )
        return values

    def numbers(self) -> np.ndarray:
        """Its numbers, in this machine's byte order."""
        nbytes = math.prod(self.shape) * self.dtype.itemsize
        if self.info.file_size != self.offset + nbytes:
            raise MeshwenError(
                f"{self.where} has {self.info.file_size - self.offset} bytes, not the {nbytes} of "
                f"{self.dtype.name} {list(self.shape)}: {_HOW}"
            )
        with self.archive.open(self.info) as file:  # No more than so many bytes are unpacked.
            data = file.read(self.info.file_size)
        flat = np.frombuffer(data, self.dtype, offset=self.offset)
        values = flat.reshape(self.shape, order="F" if self.fortran else "C")
        return np.ascontiguousarray(values, self.dtype.newbyteorder("="))


def _arrays(archive: zipfile.ZipFile, where: str) -> dict[str, _Array]:
    """The arrays by name, of which the headers alone are read."""
    found: dict[str, _Array] = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        named = f"{where}: {shown(name)}"
        if name in found:
            raise MeshwenError(f"{named} is there twice")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise MeshwenError(f"{named} is compressed in a way that numpy does not use: {_HOW}")
        found[name] = _array(archive, info, named)
    return found


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, named: str) -> _Array:
    try:
        with archive.open(info) as file:
            start = io.BytesIO(file.read(_LONGEST_HEADER))
        read_header = _HEADERS[np.lib.format.read_magic(start)]
        with warnings.catch_warnings(action="ignore"):
            shape, fortran, dtype = read_header(start)
    except Exception as error:  # numpy's parser raises anything, in several lines.
        reason = str(error).split("\n")[0] or type(error).__name__
        raise MeshwenError(f"{named} is no array of numpy's ({reason}): {_HOW}") from None
    if dtype.hasobject:
        raise MeshwenError(f"{named} holds pickled Python objects, which are not read: {_HOW}")
    return _Array(archive, info, named, shape, fortran, dtype, start.tell())


# By the version of the format; the third has what only structured arrays need.
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
