# SPDX-License-Identifier: Apache-2.0
"""What `generate` is asked: prompts from the command line, stdin or a file."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshwen.common.json_files import parse_json, shown
from meshwen.errors import MeshwenError

if TYPE_CHECKING:
    from meshwen.tokenizer.tokenizer import Tokenizer

_KINDS = ("prompt", "messages", "prompt_tokens")
# Fields that the chat template gets beside the messages.
_TEMPLATE_FIELDS = ("tools", "documents")
# Fields by which requests to servers set something that is an option here.
_SETTINGS = {
    *("model", "max_new_tokens", "max_tokens", "max_completion_tokens", "temperature", "top_p"),
    *("top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed"),
    *("stop", "logprobs", "top_logprobs", "logit_bias", "n", "tool_choice", "response_format"),
    *("stop_token_ids", "ignore_eos", "min_tokens", "prompt_logprobs"),
    *("functions", "function_call", "chat_template", "chat_template_kwargs", "system"),
    *("add_generation_prompt", "continue_final_message", "enable_thinking"),
}
_MOST_NAMES = 8
_JSON_LINES = (
    'write one prompt a line: text, or an object such as {"prompt": ...} or {"messages": [...]}'
)


@dataclass(frozen=True)
class Prompt:
    """One prompt: text, a conversation or token ids, and what to pass through to its answer.

    Attributes:
        where: where it was given, for error messages.
        content: str, list of messages, or list of int.
        extra: further fields of its JSON object. The chat template sees `tools` and `documents`.
    """

    where: str
    content: str | list[Any]
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_token_ids(self) -> bool:
        """Whether the content needs no tokenizer."""
        return isinstance(self.content, list) and isinstance(self.content[0], int)

    def title(self) -> str:
        """The prompt on one line, shortened."""
        if isinstance(self.content, str):
            text = self.content
        elif self.is_token_ids:
            text = " ".join(map(str, self.content))
        else:
            text = str(self.content[-1].get("content"))
        text = " ".join(text.split())
        return text if len(text) <= 70 else f"{text[:67]}..."

    def token_ids(
        self,
        tokenizer: Tokenizer | None,
        *,
        raw: bool = False,
        system: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[int, ...]:
        """The prompt's token ids.

        Args:
            tokenizer: the model's; None for a model without one.
            raw: encode text as it is, instead of as a user's message in the chat template.
            system: what the conversation begins with, where it has no system message.
            template_kwargs: further variables for the chat template.

        Raises:
            MeshwenError: the prompt does not fit the options or the model; names its place.
        """
        if self.is_token_ids:
            self._refuse_template_fields("prompt_tokens do without")
            if template_kwargs:
                raise MeshwenError(
                    f"{self.where}: --chat-template-kwargs needs the chat template, which "
                    "prompt_tokens do without"
                )
            return tuple(self.content)
        if tokenizer is None:
            raise MeshwenError(
                f"{self.where}: the model has no tokenizer; give token ids instead, as "
                '{"prompt_tokens": [1, 2, 3]} in a --prompts-file'
            )
        if raw and not isinstance(self.content, str):
            raise MeshwenError(f"{self.where}: messages need the chat template: drop --raw")
        if raw:
            self._refuse_template_fields("--raw leaves out")
        try:
            if raw:
                return tuple(tokenizer.encode(str(self.content)))
            variables = {**(template_kwargs or {}), **self.template_fields}
            return tuple(tokenizer.encode_chat(self._messages(system), **variables))
        except MeshwenError as error:
            raise MeshwenError(f"{self.where}: {error}") from error

    @property
    def template_fields(self) -> dict[str, Any]:
        """What the chat template gets beside the messages."""
        return {name: self.extra[name] for name in _TEMPLATE_FIELDS if self.extra.get(name)}

    def _refuse_template_fields(self, without: str) -> None:
        if found := list(self.template_fields):
            raise MeshwenError(
                f"{self.where}: {found[0]} need the chat template, which {without}; "
                f"leave out {found[0]}"
            )

    def _messages(self, system: str | None) -> list[Any]:
        messages = self.content
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if system is None or messages[0].get("role") == "system":
            return messages
        return [{"role": "system", "content": system}, *messages]


def read_template_kwargs(text: str | None) -> dict[str, Any]:
    """The object of --chat-template-kwargs, {} without one; MeshwenError where it is none."""
    from meshwen.tokenizer.chat_template import check_template_kwargs

    return {} if text is None else check_template_kwargs(parse_json(text, "--chat-template-kwargs"))


def read_prompts(argument: str | None, prompts_file: str | None) -> list[Prompt]:
    """The prompts of a run.

    Args:
        argument: PROMPT; `-`, or None where stdin is no terminal, reads all of stdin.
        prompts_file: --prompts-file; `-` is stdin.

    Raises:
        MeshwenError: there is no prompt, there are two sources, or a line is malformed.
    """
    if prompts_file is not None:
        if argument is not None:
            raise MeshwenError("there are a prompt and --prompts-file: give one of them, not both")
        return _parse_lines(prompts_file, _read(prompts_file))
    if argument is None and sys.stdin is not None and sys.stdin.isatty():
        raise MeshwenError(
            "there is no prompt: give one as an argument, pipe it in, or use --prompts-file"
        )
    if argument is None or argument == "-":
        argument = _read("-").removesuffix("\n")
    if not argument.strip():
        raise MeshwenError(
            "the prompt is empty: give one as an argument, pipe it in, or use --prompts-file"
        )
    return [Prompt("the prompt", argument)]


def _read(path: str) -> str:
    if path == "-" and sys.stdin is None:  # Closed, as `<&-` does.
        raise MeshwenError("there is no prompt: stdin is closed; give one as an argument")
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return data.decode("utf-8-sig")  # Without the mark that some editors put first.
    except (OSError, ValueError) as error:
        name = "stdin" if path == "-" else path or "a file without a name"
        if isinstance(error, UnicodeDecodeError):
            raise MeshwenError(f"{name} is not UTF-8 text: {error}") from None
        reason = error.strerror if isinstance(error, OSError) else error
        raise MeshwenError(f"cannot read {name}: {reason}") from None


def _parse_lines(path: str, text: str) -> list[Prompt]:
    """One prompt a line; blank lines hold none."""
    name = "stdin" if path == "-" else path
    # A mark begins each of several files put one after the other.
    lines = [line.removesuffix("\r").lstrip("\ufeff") for line in text.split("\n")]
    if sum(map(bool, map(str.strip, lines))) > 1 and _is_json(text):
        raise MeshwenError(f"{name} is one JSON value over several lines; {_JSON_LINES}")
    numbered = enumerate(lines, start=1)
    prompts = [_parse(f"{name} line {n}", line) for n, line in numbered if line.strip()]
    if not prompts:
        raise MeshwenError(f"{name} holds no prompt: put one on each line")
    return prompts


def _is_json(text: str) -> bool:
    """Whether a text is a JSON array or object: a bracket alone also begins `[1] Why?`."""
    try:
        return text.lstrip()[:1] in ("[", "{") and isinstance(parse_json(text, ""), list | dict)
    except MeshwenError:
        return False


def _parse(where: str, line: str) -> Prompt:
    if not line.lstrip().startswith("{"):
        if _is_json(line):
            raise MeshwenError(f"{where} is a JSON array; {_JSON_LINES}")
        return Prompt(where, line)
    fields = parse_json(line, f"{where}, which begins with {{")
    kinds = [kind for kind in _KINDS if kind in fields]
    if len(kinds) != 1:
        found = " and ".join(kinds) or ", ".join(fields) or "nothing"
        raise MeshwenError(f"{where} must have one of {', '.join(_KINDS)}; found {found}")
    (kind,) = kinds
    content = fields.pop(kind)
    if not _CHECKS[kind](content):
        raise MeshwenError(f"{where}: {kind} must be {_EXPECTED[kind]}, not {shown(content)}")
    for name in _TEMPLATE_FIELDS:
        if not _is_objects(fields.get(name) or []):
            raise MeshwenError(
                f"{where}: {name} must be a list of objects, not {shown(fields[name])}"
            )
    return Prompt(where, content, fields)


def ignored_fields(prompts: Iterable[Prompt], returned: bool) -> str | None:
    """A line that names the fields of prompts which change nothing, if there are any.

    Args:
        prompts: the prompts.
        returned: whether fields come back with the answers: then only those are named that look
            like settings, as a request to a server may have.
    """
    found = {name: None for prompt in prompts for name in prompt.extra}
    names = [n for n in found if n not in _TEMPLATE_FIELDS and (not returned or n in _SETTINGS)]
    if not names:
        return None
    shown = ", ".join(map(repr, names[:_MOST_NAMES])) + ", ..." * (len(names) > _MOST_NAMES)
    if returned:
        return f"fields of the prompts that only come back, and set nothing: {shown}; use options"
    return f"fields of the prompts that change nothing: {shown}"


def _is_messages(content: Any) -> bool:
    return _is_list(content) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in content
    )


def _is_token_ids(content: Any) -> bool:
    return _is_list(content) and all(type(token) is int for token in content)


def _is_objects(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(one, dict) for one in content)


def _is_list(content: Any) -> bool:
    return isinstance(content, Sequence) and not isinstance(content, str) and len(content) > 0


_CHECKS = {
    "prompt": lambda content: isinstance(content, str) and content.strip() != "",
    "messages": _is_messages,
    "prompt_tokens": _is_token_ids,
}
_EXPECTED = {
    "prompt": "text that is not empty",
    "messages": 'a list of {"role": ..., "content": ...}, not empty',
    "prompt_tokens": "a list of integers, not empty",
}
