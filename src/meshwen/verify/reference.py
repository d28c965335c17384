# SPDX-License-Identifier: Apache-2.0
"""Reference outputs: from a file, or what transformers generates (PyTorch, CPU, float32)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NotRequired

from annotated_types import Ge, MinLen
from typing_extensions import TypedDict

from meshwen.checkpoints import Checkpoint
from meshwen.common.extras import how_to_install
from meshwen.common.json_files import Finite, TokenId, read_json
from meshwen.errors import MeshwenError

_LIMIT_BYTES = 64 << 20


class _Case(TypedDict):
    input_ids: Annotated[list[TokenId], MinLen(1)]
    greedy: Annotated[list[TokenId], MinLen(1)]
    margins: NotRequired[list[Annotated[Finite, Ge(0)]]]


class _Golden(TypedDict):
    cases: Annotated[list[_Case], MinLen(1)]


def read_golden(path: Path) -> list[dict[str, Any]]:
    """The cases of a file of reference outputs, in the form that `transformers_cases` returns.

    Raises:
        MeshwenError: it cannot be read, or has another form; names the key.
    """
    expected = (
        'expected {"cases": [{"input_ids": [...], "greedy": [...]}]}, with as many "margins" as '
        "tokens or none"
    )
    content = read_json(path, _Golden, hint=expected, limit_bytes=_LIMIT_BYTES)
    for at, case in enumerate(content["cases"]):
        if "margins" in case and len(case["margins"]) != len(case["greedy"]):
            raise MeshwenError(
                f"{path}: cases[{at}].margins has {len(case['margins'])} numbers for "
                f"{len(case['greedy'])} tokens: {expected}"
            )
    return [dict(case) for case in content["cases"]]


def transformers_cases(
    checkpoint: Checkpoint, prompts: Sequence[Sequence[int]], steps: int
) -> list[dict[str, Any]]:
    """Greedy continuations by transformers, as the cases of a file of reference outputs.

    Args:
        checkpoint: of a folder that transformers can read.
        prompts: token ids.
        steps: tokens after each prompt, past an end of text too.

    Returns:
        For each prompt its "input_ids", its "greedy" tokens and their "margins": by how much each
        token's logit exceeds the second-best.

    Raises:
        MeshwenError: transformers is not installed, or cannot read the checkpoint.
    """
    if checkpoint.path is None or not checkpoint.path.is_dir() or checkpoint.format is None:
        raise MeshwenError(
            f"transformers cannot read {checkpoint.name}: --reference needs a folder with "
            "config.json and safetensors or PyTorch weights"
        )
    try:
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig
    except ImportError as error:
        raise MeshwenError(
            f"--reference transformers needs {error.name}: {how_to_install('transformers')}"
        ) from None
    try:
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.path, dtype=torch.float32, local_files_only=True
        )
    except Exception as error:  # The library raises whatever its parts raise.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise MeshwenError(f"transformers cannot read {checkpoint.path}: {reason}") from error
    # In the place of the checkpoint's own, with its penalties and end-of-text tokens.
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=steps,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return [_case(model, list(prompt)) for prompt in prompts]


def _case(model: Any, prompt: list[int]) -> dict[str, Any]:
    import torch

    fed = torch.tensor([prompt])
    found = model.generate(fed, attention_mask=torch.ones_like(fed))
    best, second = torch.cat(found.logits).topk(2).values.T
    return {
        "input_ids": prompt,
        "greedy": found.sequences[0, len(prompt) :].tolist(),
        "margins": (best - second).tolist(),
    }
