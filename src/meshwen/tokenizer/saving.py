# SPDX-License-Identifier: Apache-2.0
"""A tokenizer's files, as transformers and `read_folder` read them."""

from typing import Any

from meshwen.common.json_files import to_json
from meshwen.tokenizer.files import TokenizerParts


def tokenizer_files(parts: TokenizerParts) -> dict[str, str]:
    """Return the text of tokenizer.json and tokenizer_config.json.

    Raises:
        MeshwenError: an unusual tokenizer exceeds the limits on time and memory.
    """
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # Takes tokenizer.json as it is.
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": parts.splits_special_tokens,
        **parts.special_tokens,
    }
    if parts.templates.keys() == {"default"}:
        config["chat_template"] = parts.templates["default"]
    elif parts.templates:
        named = [{"name": name, "template": text} for name, text in parts.templates.items()]
        config["chat_template"] = named
    return {
        "tokenizer.json": parts.encoder.to_json(),
        "tokenizer_config.json": to_json(config, indent=2, ensure_ascii=False),
    }
