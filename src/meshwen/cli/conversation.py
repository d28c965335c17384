# SPDX-License-Identifier: Apache-2.0
"""What was said in a chat, and what is said next."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from meshwen.cli.load import settings_shown
from meshwen.cli.prompts import Prompt, read_prompts
from meshwen.common.json_files import shown, to_json
from meshwen.common.paths import user_path
from meshwen.errors import MeshwenError

if TYPE_CHECKING:
    from meshwen.causal_lm import CausalLM
    from meshwen.engine.request import Completion, Event
    from meshwen.engine.sampling_params import SamplingParams
    from meshwen.tokenizer.tokenizer import Tokenizer


class Answering(Protocol):
    """The tokens of an answer that is being made."""

    def __iter__(self) -> Iterator[Event]:
        """Yields them."""

    def close(self) -> None:
        """Ends the answer; any thread, and a signal's handler, may call it."""


class Conversation:
    """A conversation with a model.

    Attributes:
        messages: `{"role": ..., "content": ...}`, the system message first if there is one.
        template_fields: what the chat template gets beside them, such as `tools`.
        template_kwargs: further variables for the chat template, which are not saved.
        sampling: how answers are drawn.
        keeps_seed: the user chose the seed: other answers are not drawn with others.
    """

    def __init__(self, sampling: SamplingParams, before: Prompt | None = None):
        """Goes on with the conversation that was had before, if any."""
        self.sampling = sampling
        self._running: Answering | None = None
        self._last: str | None = None  # What the user said.
        self.keeps_seed = False
        self.template_kwargs: dict[str, Any] = {}
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
        self._last = None

    def say(self, text: str) -> Generator[Event, None, None]:
        """Takes the user's turn, and yields the answer's tokens.

        Closing the iterator stops the answer, and so does `stop`; what has come of it stays in the
        conversation. Where nothing has, the turn is forgotten.

        Raises:
            MeshwenError: the conversation no longer fits the context; it stays as it was.
        """
        messages = [*self.messages, _message("user", text)]
        running = self._answering(messages)
        before, self.messages, self._last = self.messages, messages, text
        answer, tokens = "", 0
        try:
            with closing(running) as self._running:
                for event in running:
                    answer, tokens = answer + event.text, tokens + (event.token >= 0)
                    yield event
        finally:
            self._running = None
            said = [*messages, _message("assistant", answer)]
            self.messages = said if tokens else before

    def _answering(self, messages: list[Any]) -> Answering:
        """The answer to what was said."""
        raise NotImplementedError

    def stop(self) -> None:
        """Ends the answer that is being made, between two steps of the engine; any thread may."""
        if (running := self._running) is not None:
            running.close()

    def take_back(self) -> str:
        """Forgets the last turn and its answer; returns what the user said.

        Raises:
            MeshwenError: nothing was said yet.
        """
        if [message["role"] for message in self.messages[-2:]] == ["user", "assistant"]:
            self._last = self.messages[-2]["content"]
            del self.messages[-2:]
        if not isinstance(self._last, str):
            raise MeshwenError("nothing was said yet, so there is nothing to say again")
        return self._last

    @property
    def greedy(self) -> bool:
        """Whether an answer is the same whenever it is drawn."""
        return self.sampling.temperature == 0

    @property
    def settings(self) -> Mapping[str, Any]:
        """The sampling parameters by name, for the user."""
        return chat_settings(self.sampling)

    def set(self, sampling: SamplingParams, name: str) -> None:
        """Takes sampling parameters in which the user has changed the one of this name."""
        self.sampling = sampling
        self.keeps_seed |= name == "seed"

    def prefilled(self) -> tuple[int, int] | None:
        """Tokens of the prompt that the model has read, and of how many; None: it reads none."""
        return None

    def is_full(self, completion: Completion) -> bool:
        """Whether an answer ended because the context was full, as far as is known."""
        return False

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


class LoadedConversation(Conversation):
    """A conversation with a model that this process has loaded."""

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        sampling: SamplingParams,
        before: Prompt | None = None,
    ):
        super().__init__(sampling, before)
        self._model, self._tokenizer = model, tokenizer

    def prefilled(self) -> tuple[int, int] | None:
        """Tokens of the prompt that the model has read, and of how many; None: it reads none."""
        return self._model.engine.prefilled

    def is_full(self, completion: Completion) -> bool:
        """Whether an answer ended because the context was full."""
        length = len(completion.prompt_tokens) + len(completion.tokens)
        return length >= self._model.engine.max_model_len

    def _answering(self, messages: list[Any]) -> Answering:
        from meshwen.engine.request import Request

        token_ids = self._tokenizer.encode_chat(
            messages, **self.template_kwargs | self.template_fields
        )
        context = self._model.engine.max_model_len
        if len(token_ids) >= context:
            raise MeshwenError(
                f"with this turn the conversation has {len(token_ids)} tokens, which leaves no "
                f"room for an answer in the model's context of {context}: say less, or begin anew "
                "with /reset (/save FILE keeps what was said)"
            )
        return self._model.engine.run([Request(tuple(token_ids), self.sampling)])


def load_conversation(path: Path) -> Prompt:
    """The last conversation that `Conversation.save` put in a file.

    Raises:
        MeshwenError: there is none, or the file cannot be read.
    """
    last = read_prompts(None, str(path))[-1]
    if isinstance(last.content, str) or last.is_token_ids:
        raise MeshwenError(f"{last.where} holds no conversation, as /save writes it")
    return last


def chat_settings(sampling: SamplingParams) -> dict[str, Any]:
    """The sampling parameters of a chat by name: a turn has one answer, not `n`."""
    return {name: value for name, value in settings_shown(sampling).items() if name != "n"}


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}
