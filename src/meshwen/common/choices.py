# SPDX-License-Identifier: Apache-2.0
"""The settings that take one of a few words, each with its words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from meshwen.common.arguments import brief, one_of
from meshwen.errors import MeshwenError

DType = Literal["float32", "bfloat16"]
Numerics = Literal["fast", "exact"]
Quantization = Literal["int8"]
LoadFormat = Literal["auto", "safetensors", "torch", "gguf", "dummy"]
PromptStyleName = Literal["qwen-boxed", "lm-eval", "lm-eval-cot-zeroshot", "demo"]
# Of programs for other stacks: see `meshwen.handoff`.
ProgramName = Literal["logits", "prefill", "decode"]
Profile = Literal["native", "portable"]
Output = Literal["logits", "tokens"]
Platform = Literal["cpu", "tpu", "cuda", "rocm"]
# Of a served model's answers: see `meshwen.server`.
ToolCallParser = Literal["qwen2_5", "qwen_coder_fenced", "none"]
ReasoningParser = Literal["auto", "think", "none"]

DTYPES: tuple[DType, ...] = get_args(DType)
NUMERICS: tuple[Numerics, ...] = get_args(Numerics)
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)
LOAD_FORMATS: tuple[LoadFormat, ...] = get_args(LoadFormat)
PROMPT_STYLES: tuple[PromptStyleName, ...] = get_args(PromptStyleName)
PROGRAMS: tuple[ProgramName, ...] = get_args(ProgramName)
PROFILES: tuple[Profile, ...] = get_args(Profile)
OUTPUTS: tuple[Output, ...] = get_args(Output)
PLATFORMS: tuple[Platform, ...] = get_args(Platform)
TOOL_CALL_PARSERS: tuple[ToolCallParser, ...] = get_args(ToolCallParser)
REASONING_PARSERS: tuple[ReasoningParser, ...] = get_args(ReasoningParser)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuses a value that is none of the choices.

    Raises:
        MeshwenError: naming the value and the choices.
    """
    if not isinstance(value, str) or value not in choices:
        raise MeshwenError(f"{name} must be {one_of(choices)}, not {brief(value)}")
