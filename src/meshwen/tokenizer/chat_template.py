# SPDX-License-Identifier: Apache-2.0
"""Chat templates: a checkpoint's own jinja2 program that turns messages into one prompt.

A template comes with the checkpoint, so it is an untrusted program. It runs in jinja2's immutable
sandbox, which keeps it from files and from Python's internals, and in a process of its own
(`contained.py`), which keeps it from running or growing without bound.

As in transformers, the text of a message is not escaped: content that holds `<|im_end|>` ends its
turn. Whoever passes on untrusted text as a message decides whether to filter it first.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from meshwen.common.contained import Contained
from meshwen.common.json_files import check_shape, read_text, shown
from meshwen.common.paths import exists
from meshwen.errors import MeshwenError

OUTPUT_LIMIT_CHARACTERS = 1 << 24

Message = Mapping[str, Any]


class _NamedTemplate(TypedDict):
    """One of several templates in tokenizer_config.json."""

    name: str
    template: str


class _Templates(TypedDict):
    chat_template: NotRequired[str | list[_NamedTemplate] | None]


class ChatTemplate:
    """The named chat templates of one checkpoint, and the process that renders them.

    It starts at the first `render` and ends with this object. Safe to use from several threads.
    """

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, Any]):
        """Take templates by name, and variables (such as `bos_token`) that every render sees."""
        self._templates = dict(templates)
        self._special_tokens = dict(special_tokens)
        self._process = Contained("meshwen.tokenizer.chat_template_worker", "the chat template")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all templates."""
        return tuple(self._templates)

    @property
    def content(self) -> tuple[dict[str, str], dict[str, Any]]:
        """The templates by name, and the variables that every render sees."""
        return self._templates, self._special_tokens

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
        *,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """Return the prompt for a conversation.

        Args:
            messages: `{"role": ..., "content": ...}` and whatever else the template reads. As in
                transformers, a key whose value is None is left out.
            tools: JSON schemas of callable functions.
            documents: documents for templates that retrieve.
            add_generation_prompt: end with the opening of the assistant's turn.
            continue_final_message: end inside of the last message, for the model to go on with.
            variables: further variables of the template.

        Raises:
            MeshwenError: no template; values that are not plain JSON; the template refuses the
                messages or is faulty; it exceeds the limits on time, memory or output.
        """
        plain = _plain(messages)
        if continue_final_message:
            _check_continuable(plain, add_generation_prompt)
            plain[-1]["content"] += _END_TAG
        request = {
            "template": self.select(bool(tools)),
            "variables": {
                **self._special_tokens,
                "messages": plain,
                "tools": tools,
                "documents": documents,
                "add_generation_prompt": add_generation_prompt,
                **variables,
            },
            "max_characters": OUTPUT_LIMIT_CHARACTERS,
        }
        try:
            text = str(self._process.ask(request)["text"])
        except MeshwenError as error:
            if any(isinstance(message.get("content"), list) for message in plain):
                raise MeshwenError(
                    f"{error}; it may take contents as text only, not in parts"
                ) from None
            raise
        return _before_tag(text) if continue_final_message else text


# What is given in other ways.
_NO_VARIABLES = {"messages", "conversation", "self", "tokenize"}
# What transformers marks the end of the message with that is to be continued.
_END_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


def check_template_kwargs(given: Any) -> dict[str, Any]:
    """Return further variables of a template by name, such as `{"enable_thinking": False}`.

    Raises:
        MeshwenError: they are no mapping of names, or one is no variable of a template's.
    """
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise MeshwenError(
            "chat_template_kwargs must be an object such as "
            f'{{"enable_thinking": false}}, not {shown(given)}'
        )
    if taken := _NO_VARIABLES & set(given):
        raise MeshwenError(f"chat_template_kwargs cannot set {min(taken)}")
    return dict(given)


def _plain(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Check and copy messages; without the keys whose value is None, as in transformers."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise MeshwenError(f"messages must be a list of objects, found {shown(messages)}")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise MeshwenError(f"message {number} must be an object, found {shown(message)}")
    return [{key: value for key, value in one.items() if value is not None} for one in messages]


def _check_continuable(messages: list[dict[str, Any]], add_generation_prompt: bool) -> None:
    if add_generation_prompt:
        raise MeshwenError(
            "continue_final_message goes on with the last message, add_generation_prompt begins "
            "another: give add_generation_prompt=False"
        )
    if not messages or not isinstance(messages[-1].get("content"), str):
        raise MeshwenError("continue_final_message needs a last message whose content is text")


def _before_tag(text: str) -> str:
    """Cut the text where the last message ends; the template may have stripped that message."""
    tag = _END_TAG.strip()
    if tag not in text:
        raise MeshwenError(
            "continue_final_message: the chat template does not show the last message whole"
        )
    at = text.rindex(tag)
    return text[:at] if text[at:].startswith(_END_TAG) else text[:at].rstrip()


def templates_in_folder(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Return a checkpoint folder's chat templates by name.

    They are `chat_template` of tokenizer_config.json (one, or a list of named ones), overridden by
    the newer files chat_template.jinja and additional_chat_templates/NAME.jinja.

    Args:
        folder: the checkpoint's.
        tokenizer_config: its tokenizer_config.json.

    Raises:
        MeshwenError: `chat_template` has another form, or a file cannot be read.
    """
    where = str(folder / "tokenizer_config.json")
    found = check_shape(tokenizer_config, _Templates, where).get("chat_template") or []
    if isinstance(found, str):
        found = [{"name": "default", "template": found}]
    templates = {one["name"]: one["template"] for one in found}
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = read_text(path)
    default = folder / "chat_template.jinja"
    if exists(default):
        templates["default"] = read_text(default)
    return templates
