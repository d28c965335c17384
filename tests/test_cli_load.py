# SPDX-License-Identifier: Apache-2.0
"""What is said of weights when they are loaded: what is lost of them, and what it costs."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from mesh_model import MemoryTensor, memory_checkpoint
from meshwen.cli.load import load_model, rounding_note
from meshwen.engine.options import EngineOptions
from meshwen.ops.cpu import kernels
from needs_kernels import needs_kernels
from tiny_model import ONE_LAYER, weights

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def tensor(number: int, kind: str, nbytes: int = 100) -> MemoryTensor:
    plain = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": BFLOAT16}
    return MemoryTensor(
        name=str(number),
        shape=(nbytes,),
        dtype=plain.get(kind, np.dtype(np.float32)),
        quantization=None if kind in plain else kind,
        nbytes=nbytes,
        array=np.zeros(nbytes),
    )


@pytest.mark.parametrize(
    ("kinds", "kept", "said"),
    [
        (["bfloat16"], "bfloat16", None),
        (["bfloat16"], "int8", None),
        (["float32", "bfloat16"], "float32", None),
        (["Q4_K", "float32"], "float32", None),
        ([], "bfloat16", None),
        (["float32"], "bfloat16", "rounded from float32 to bfloat16 (--dtype float32 keeps them)"),
        (["bfloat16", "float16"], "bfloat16", "rounded from float16 and bfloat16 to bfloat16"),
        (
            ["float32", "Q6_K", "Q4_K"],
            "bfloat16",
            "weights: Q4_K, Q6_K and float32 in the file, expanded to 32 bits and rounded to "
            "bfloat16 (--dtype float32 keeps all that the file says)",
        ),
        (["Q8_0"], "int8", "weights: Q8_0 in the file, expanded and rounded again to int8"),
    ],
)
def test_what_is_lost_of_the_files_numbers_is_said_as_it_is(kinds, kept, said):
    checkpoint = memory_checkpoint(ONE_LAYER, {})
    tensors = {str(i): tensor(i, kind, 100 * (i + 1)) for i, kind in enumerate(kinds)}
    found = rounding_note(replace(checkpoint, tensors=tensors), kept)
    assert (found is None) == (said is None)
    assert (said or "") in (found or "")


@pytest.mark.parametrize("with_kernels", [False, pytest.param(True, marks=needs_kernels)])
def test_int8_without_kernels_is_said_to_be_slow(monkeypatch, capsys, with_kernels):
    if not with_kernels:
        monkeypatch.setattr(kernels, "instruction_set", lambda: None)
    checkpoint = memory_checkpoint(
        ONE_LAYER, {n: a.astype(BFLOAT16) for n, a in weights().items() if "layers.1" not in n}
    )
    load_model(
        replace(checkpoint, notes=("a note of the checkpoint",)),
        None,
        EngineOptions(quantization="int8"),
    )
    said = " ".join(capsys.readouterr().err.split())
    assert ("about 6 times on a CPU" in said) == (not with_kernels)
    assert "a note of the checkpoint" in said
