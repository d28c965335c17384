# SPDX-License-Identifier: Apache-2.0
"""The process in which a checkpoint's unusual tokenizer runs; `backend.py` starts it."""

from typing import Any

import tokenizers

from meshwen.common.contained_worker import Reply, serve
from meshwen.tokenizer.backend import build


class Worker:
    """Answers `{"content": ...}`, the first request, and then `{"text": ...}` or `{}`."""

    def __init__(self) -> None:
        self._backend: tokenizers.Tokenizer | None = None

    def reply_to(self, request: dict[str, Any]) -> Reply:
        """Return `{}` for the content, `{"ids": [...]}` for a text, else the tokenizer.json."""
        if self._backend is None:
            self._backend = build(request["content"])
            return {}
        if "text" not in request:
            return {"tokenizer": self._backend.to_str(pretty=True)}
        special = request["add_special_tokens"]
        return {"ids": self._backend.encode(request["text"], add_special_tokens=special).ids}


if __name__ == "__main__":
    serve(Worker().reply_to)
