# SPDX-License-Identifier: Apache-2.0
"""The options that commands share, declared once so that they are spelled and explained alike."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from meshwen.errors import MeshwenError
from meshwen.models.presets import PRESETS

if TYPE_CHECKING:
    from meshwen.parallel.mesh import MeshSpec

MODEL_HELP = (
    "A model folder, a .gguf file, a hub id such as Qwen/Qwen2.5-0.5B-Instruct, or demo. "
    f"With --load-format dummy also {', '.join(PRESETS)}."
)


class DType(StrEnum):
    """What weights, products and the values of the KV cache are kept in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Quantization(StrEnum):
    """What weights are rounded to."""

    INT8 = "int8"


class LoadFormat(StrEnum):
    """What the weights are read from."""

    AUTO = "auto"
    SAFETENSORS = "safetensors"
    TORCH = "torch"
    GGUF = "gguf"
    DUMMY = "dummy"


class Numerics(StrEnum):
    """How products are summed over the devices."""

    FAST = "fast"
    EXACT = "exact"


Model = Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)]
Mesh = Annotated[
    str,
    typer.Option(
        "--mesh",
        help="Devices: 8, 1x8, 2x4 split the model; data=2,model=4 splits the batch too. "
        "On a CPU, devices are simulated.",
    ),
]
Dtype = Annotated[
    DType,
    typer.Option(
        "--dtype",
        help="What weights, products and the KV cache's values are kept in (its keys: float32).",
    ),
]
NumericsOption = Annotated[
    Numerics,
    typer.Option(
        "--numerics",
        help="fast, or exact: the same bits on every mesh and in every batch.",
    ),
]
QuantizationOption = Annotated[
    Quantization | None,
    typer.Option(
        "--quantization",
        help="int8: weights, and with the extra cpu what is multiplied with them, are rounded to a "
        "byte each. With the extra faster than bfloat16, and a little less exact; without it about "
        "6 times slower on a CPU.",
        show_default=False,
    ),
]
LoadFormatOption = Annotated[
    LoadFormat,
    typer.Option("--load-format", help="What to read weights from; dummy makes random weights up."),
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", help="Branch, tag or commit of a hub id.", show_default=False),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        "--max-tokens",
        "-n",
        help="Most tokens of an answer. Default, here and for all below: what "
        "the checkpoint's generation_config.json says, or 256 tokens if it says nothing.",
        show_default=False,
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        "--temp",
        help="0 takes the likeliest token, and no repetition penalty unless one is given. "
        "Without a generation_config.json that says otherwise: 0.",
        show_default=False,
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        help="Sample from the likeliest tokens that make up this probability.",
        show_default=False,
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        "--top-k",
        help="Sample from this many likeliest tokens; 0: from all.",
        show_default=False,
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        "--min-p",
        help="Drop tokens below this share of the likeliest token's probability.",
        show_default=False,
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty",
        help="Above 1: makes tokens that were there already less likely.",
        show_default=False,
    ),
]
MaxNumSeqs = Annotated[
    int,
    typer.Option(
        "--max-num-seqs",
        "--batch-size",
        min=1,
        help="Prompts to answer at the same time; fewer where memory is short.",
    ),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        "--max-model-len",
        min=2,
        help="Most tokens of a prompt and its answer. Default: the model's context.",
        show_default=False,
    ),
]
PromptLookupNumTokens = Annotated[
    int,
    typer.Option(
        "--prompt-lookup-num-tokens",
        min=0,
        max=15,
        help="Guess so many tokens a step from what came before: answers that repeat their prompt "
        "come faster, e.g. with 7. 0: none.",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        help="The same seed draws the same answer. Default: a fresh one, which is printed.",
        show_default=False,
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        "--stop",
        metavar="TEXT",
        help="End the answer before this text, or special token; repeatable.",
        show_default=False,
    ),
]
System = Annotated[
    str | None,
    typer.Option("--system", help="The system message.", show_default=False),
]
ChatTemplateKwargs = Annotated[
    str | None,
    typer.Option(
        "--chat-template-kwargs",
        metavar="JSON",
        help="Variables for the chat template, such as '{\"enable_thinking\": false}'.",
        show_default=False,
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def parse_meshes(text: str) -> list[MeshSpec]:
    """Meshes with `;` or `,` between them; `data=2,model=4` stays together.

    Raises:
        MeshwenError: one does not parse, is there twice, or there is none.
    """
    from meshwen.parallel.mesh import MeshSpec

    found: list[str] = []
    for part in text.split(";"):
        axes: list[str] = []
        for piece in (piece.strip() for piece in part.split(",") if piece.strip()):
            name, is_axis, _ = piece.partition("=")
            if not is_axis or any(axis.partition("=")[0] == name for axis in axes):
                found.append(",".join(axes))
                axes = []
            if is_axis:
                axes.append(piece)
            else:
                found.append(piece)
        found.append(",".join(axes))
    specs = [MeshSpec.parse(mesh) for mesh in found if mesh]
    if not specs:
        raise MeshwenError(f"--meshes {text!r} names no mesh; give e.g. 1x1,1x8,2x4")
    labels = [str(spec) for spec in specs]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise MeshwenError(f"--meshes names {twice[0]} twice")
    return specs
