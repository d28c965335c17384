# SPDX-License-Identifier: Apache-2.0
"""Chat templates: a checkpoint's own jinja2 program that turns messages into one prompt.

A template comes with the checkpoint, so it is a stranger's program. It runs in jinja2's immutable
sandbox, which keeps it from files and from Python's internals, and in a process of its own
(`chat_template_worker.py`), which keeps it from running or growing without bound: a sandbox cannot,
since one comparison of nested lists or one padded string can take hours or all memory inside a
single C call that no thread can interrupt.

As in transformers, the text of a message is not escaped: content that holds `<|im_end|>` ends its
turn. Whoever passes on untrusted text as a message decides whether to filter it first.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from meshwen.errors import MeshwenError

TIME_LIMIT_S = 10.0
MEMORY_LIMIT_BYTES = 1 << 30
OUTPUT_LIMIT_CHARACTERS = 1 << 24

Message = Mapping[str, Any]


class ChatTemplate:
    """The named chat templates of one checkpoint, and the process that renders them.

    The process starts at the first `render` (under 0.1 s), answers the later ones in well under a
    millisecond, and ends with this object. Safe to use from several threads.
    """

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, Any]):
        """Take templates by name, and variables (such as `bos_token`) that every render sees."""
        self._templates = dict(templates)
        self._special_tokens = dict(special_tokens)
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None

    def select(self, tools: bool) -> str:
        """Return the template to use, chosen as transformers does.

        Raises:
            MeshwenError: there is no template, or none named `default`.
        """
        if tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" in self._templates:
            return self._templates["default"]
        if self._templates:
            names = ", ".join(sorted(self._templates))
            raise MeshwenError(f"the checkpoint names no default chat template, only: {names}")
        raise MeshwenError(
            "the checkpoint has no chat template: use --raw (encode the text as it is)"
        )

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Return the prompt for a conversation.

        Args:
            messages: `{"role": ..., "content": ...}` and whatever else the template reads.
            tools: JSON schemas of callable functions.
            documents: documents for templates that retrieve.
            add_generation_prompt: end with the opening of the assistant's turn.
            variables: further variables of the template.

        Raises:
            MeshwenError: no template; values that are not plain JSON; the template refuses the
                messages or is faulty; it exceeds the limits on time, memory or output.
        """
        request = {
            "template": self.select(bool(tools)),
            "variables": {
                **self._special_tokens,
                "messages": messages,
                "tools": tools,
                "documents": documents,
                "add_generation_prompt": add_generation_prompt,
                **variables,
            },
            "seconds": TIME_LIMIT_S,
            "max_characters": OUTPUT_LIMIT_CHARACTERS,
        }
        try:
            line = json.dumps(request).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise MeshwenError(f"messages and tools must be plain JSON values: {error}") from error
        with self._lock:
            reply = self._ask(line)
        if not reply:
            raise MeshwenError(
                f"the chat template was stopped: it ran for more than {TIME_LIMIT_S:g} s or grew "
                f"beyond {MEMORY_LIMIT_BYTES >> 20} MiB; use another template or --raw"
            )
        answer = json.loads(reply)
        if "error" in answer:
            raise MeshwenError(f"the chat template failed: {answer['error']}")
        return str(answer["text"])

    def _ask(self, line: bytes) -> bytes:
        """Send one request; return the reply line, empty where the worker died of it."""
        if self._worker is None or self._worker.poll() is not None:
            self._worker = _start_worker()
            self._stop = weakref.finalize(self, _stop_worker, self._worker)
        assert self._worker.stdin is not None
        assert self._worker.stdout is not None
        reply = b""
        try:
            self._worker.stdin.write(line)
            self._worker.stdin.flush()
            reply = self._worker.stdout.readline()
        except BrokenPipeError:
            pass
        finally:
            # Also after Ctrl-C: an unread reply would be taken for the next request's.
            if not reply:
                self._stop()
                self._worker = None
        return reply


def _start_worker() -> "subprocess.Popen[bytes]":
    script = Path(__file__).with_name("chat_template_worker.py")
    search_path = os.pathsep.join(filter(None, sys.path))
    try:
        worker = subprocess.Popen(
            # -P keeps this folder's modules from shadowing others; PYTHONPATH replaces -S's site.
            [sys.executable, "-S", "-P", str(script), str(MEMORY_LIMIT_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": search_path},
        )
        assert worker.stdout is not None
        if worker.stdout.readline():
            return worker
        problem = f"it ended with status {worker.wait()}"
    except OSError as error:
        problem = str(error)
    raise MeshwenError(
        f"cannot start the process that renders chat templates ({sys.executable}): {problem}"
    )


def _stop_worker(worker: "subprocess.Popen[bytes]") -> None:
    worker.kill()
    # Closing the pipe of a process that died early reports the bytes it did not read.
    with contextlib.suppress(OSError), worker:
        pass


def templates_in_folder(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Return a checkpoint folder's chat templates by name.

    They are `chat_template` of tokenizer_config.json (one, or a list of named ones), overridden by
    the newer files chat_template.jinja and additional_chat_templates/NAME.jinja.

    Raises:
        MeshwenError: `chat_template` has another form, or a file cannot be read.
    """
    found = tokenizer_config.get("chat_template") or {}
    if isinstance(found, str):
        templates = {"default": found}
    else:
        try:
            templates = {str(one["name"]): str(one["template"]) for one in found}
        except (TypeError, KeyError) as error:
            raise MeshwenError(
                f"{folder / 'tokenizer_config.json'}: chat_template is neither text nor a list of "
                "named templates"
            ) from error
    try:
        for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
            templates[path.stem] = path.read_text(encoding="utf-8")
        default = folder / "chat_template.jinja"
        if default.is_file():
            templates["default"] = default.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MeshwenError(f"a chat template in {folder} cannot be read: {error}") from error
    return templates
