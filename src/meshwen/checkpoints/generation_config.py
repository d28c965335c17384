# SPDX-License-Identifier: Apache-2.0
"""The keys of a generation_config.json that are read: those that tokens depend on.

They mean what they do in transformers' `GenerationConfig`.
"""

from __future__ import annotations

from typing import Any

from typing_extensions import TypedDict

from meshwen.common.json_files import TokenId, check_shape


class GenerationConfig(TypedDict, total=False):
    """The keys that are read; null stands for "not given"."""

    do_sample: bool | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    encoder_repetition_penalty: float | None
    max_new_tokens: int | None
    max_length: int | None
    min_new_tokens: int | None
    min_length: int | None
    no_repeat_ngram_size: int | None
    encoder_no_repeat_ngram_size: int | None
    eos_token_id: TokenId | list[TokenId] | None
    forced_bos_token_id: TokenId | None
    forced_eos_token_id: TokenId | list[TokenId] | None
    suppress_tokens: list[TokenId] | None
    begin_suppress_tokens: list[TokenId] | None
    bad_words_ids: list[list[TokenId]] | None
    stop_strings: str | list[str] | None


def check_generation_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The config itself, once what is read of it is known to have the right types.

    Raises:
        MeshwenError: a key has not; names it, its value, and `where`.
    """
    check_shape(config, GenerationConfig, where)
    return config
