# SPDX-License-Identifier: Apache-2.0
"""What was said in a chat, and what is said next."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshwen.cli.prompts import Prompt, read_prompts
from meshwen.errors import MeshwenError
from meshwen.json_files import shown, to_json
from meshwen.paths import user_path

if TYPE_CHECKING:
    from meshwen.causal_lm import Qwen2ForCausalLM
    from meshwen.request import Completion, Event
    from meshwen.sampling import SamplingParams
    from meshwen.tokenizer import Tokenizer


class Conversation:
    """A conversation with a model.

    Attributes:
        messages: `{"role": ..., "content": ...}`, the system message first if there is one.
        template_fields: what the chat template gets beside them, such as `tools`.
    """

    def __init__(
        self,
        model: Qwen2ForCausalLM,
        tokenizer: Tokenizer,
        sampling: SamplingParams,
        before: Prompt | None = None,
    ):
        """Goes on with the conversation that was had before, if any."""
        self._model, self._tokenizer, self._sampling = model, tokenizer, sampling
        self.messages: list[Any] = [] if before is None else [*before.content]
        self.template_fields = {} if before is None else before.template_fields

    def set_system(self, text: str) -> None:
        """Replaces the system message; "" removes it.

        Raises:
            MeshwenError: the text holds half of a character.
        """
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise MeshwenError(f"the system message {shown(text)} is not valid Unicode")
        said = [message for message in self.messages if message["role"] != "system"]
        self.messages = [_message("system", text), *said] if text else said

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self.messages = [message for message in self.messages if message["role"] == "system"]

    def say(self, text: str) -> Generator[Event, None, None]:
        """Takes the user's turn, and yields the answer's tokens.

        Closing the iterator stops the answer; what has come of it stays in the conversation.

        Raises:
            MeshwenError: the conversation no longer fits the context; it stays as it was.
        """
        from meshwen.request import Request

        messages = [*self.messages, _message("user", text)]
        token_ids = self._tokenizer.encode_chat(messages, **self.template_fields)
        context = self._model.engine.max_model_len
        if len(token_ids) >= context:
            raise MeshwenError(
                f"with this turn the conversation has {len(token_ids)} tokens, which leaves no "
                f"room for an answer in the model's context of {context}: say less, or begin anew "
                "with /reset (/save FILE keeps what was said)"
            )
        self.messages = messages
        answer = ""
        try:
            for event in self._model.engine.run([Request(tuple(token_ids), self._sampling)]):
                answer += event.text
                yield event
        finally:
            self.messages.append(_message("assistant", answer))

    def is_full(self, completion: Completion) -> bool:
        """Whether an answer ended because the context was full."""
        length = len(completion.prompt_tokens) + len(completion.tokens)
        return length >= self._model.engine.max_model_len

    def save(self, path: Path) -> None:
        """Appends the conversation to a file: one JSON object on a line.

        Raises:
            MeshwenError: nothing was said, or the file cannot be written.
        """
        if not self.messages:
            raise MeshwenError("nothing was said yet, so there is nothing to save")
        saved = {"messages": self.messages} | self.template_fields
        line = to_json(saved, ensure_ascii=False)
        try:
            with user_path(path).open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")
        except OSError as error:
            raise MeshwenError(f"cannot write {path}: {error.strerror}") from None


def load_conversation(path: Path) -> Prompt:
    """The last conversation that `Conversation.save` put in a file.

    Raises:
        MeshwenError: there is none, or the file cannot be read.
    """
    last = read_prompts(None, str(path))[-1]
    if isinstance(last.content, str) or last.is_token_ids:
        raise MeshwenError(f"{last.where} holds no conversation, as /save writes it")
    return last


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}
