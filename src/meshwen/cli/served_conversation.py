# SPDX-License-Identifier: Apache-2.0
"""A conversation with a model that a server has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from meshwen.cli.console import note
from meshwen.cli.conversation import Answering, Conversation
from meshwen.cli.load import settings_shown
from meshwen.cli.served import AskedServer
from meshwen.engine.request import Completion, Event, Timings
from meshwen.engine.sampling_params import SamplingParams
from meshwen.errors import MeshwenError

if TYPE_CHECKING:
    from meshwen.cli.prompts import Prompt
    from meshwen.client.chat_stream import ChatStream
    from meshwen.client.server import Server

# What requests call the sampling parameters that they may have.
_FIELDS = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    **{
        name: name
        for name in (
            *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop"),
            *("presence_penalty", "frequency_penalty", "stop_token_ids", "ignore_eos"),
        )
    },
}
_UNKNOWN = 0  # A token's id: how many there are is all that a chat asks.


def served_conversation(
    asked: AskedServer, model: str | None, given: Mapping[str, Any], before: Prompt | None
) -> ServedConversation:
    """A conversation with the model of this name; None: with the server's first.

    Raises:
        MeshwenError: the server cannot be reached, or has no such model.
    """
    server = asked.connect()
    name = server.model(model)
    note(f"model: {name} at {server.url}")
    return ServedConversation(server, name, given, before)


class ServedConversation(Conversation):
    """A conversation with a server's model, whose sampling defaults are the server's."""

    def __init__(
        self, server: Server, name: str, given: Mapping[str, Any], before: Prompt | None = None
    ):
        super().__init__(SamplingParams.from_generation_config({}, **given), before)
        self._server, self._name = server, name
        self._asked = {name for name, value in given.items() if value is not None}
        self.keeps_seed = True  # The server draws a fresh one for each answer that has none.

    @property
    def greedy(self) -> bool:
        """Whether an answer is the same whenever it is drawn."""
        return "temperature" in self._asked and self.sampling.temperature == 0

    @property
    def settings(self) -> Mapping[str, Any]:
        """The sampling parameters by name; None for those that the server chooses."""
        values = settings_shown(self.sampling)
        return {name: values[name] if name in self._asked else None for name in _FIELDS}

    def set(self, sampling: SamplingParams, name: str) -> None:
        """Takes sampling parameters in which the user has changed the one of this name."""
        super().set(sampling, name)
        self._asked.add(name)

    def _answering(self, messages: list[Any]) -> Answering:
        from meshwen.client.chat_stream import ChatStream

        body: dict[str, Any] = {"model": self._name, "messages": messages, **self.template_fields}
        if self.template_kwargs:
            body["chat_template_kwargs"] = self.template_kwargs
        for name, field in _FIELDS.items():
            if name in self._asked:
                value = getattr(self.sampling, name)
                body[field] = list(value) if isinstance(value, tuple) else value
        return _Events(ChatStream(self._server, body))


class _Events:
    """A server's answer as the events of an engine; a piece of text counts as a token."""

    def __init__(self, stream: ChatStream):
        self._stream = stream

    def close(self) -> None:
        self._stream.close()

    def __iter__(self) -> Iterator[Event]:
        text, tokens, reason = "", 0, None
        for piece in self._stream:
            if piece.text:
                text, tokens = text + piece.text, tokens + 1
                yield Event(0, _UNKNOWN, piece.text, None, None)
            reason = piece.finish_reason or reason
            if piece.usage is not None:
                tokens = piece.usage.get("completion_tokens", tokens)
        if reason is not None:
            yield Event(0, -1, "", None, _completion(text, tokens, reason))


def _completion(text: str, tokens: int, reason: str) -> Completion:
    if reason == "content_filter":
        raise MeshwenError("the server withheld the rest of the answer (content_filter)")
    return Completion(
        prompt_tokens=(),
        tokens=(_UNKNOWN,) * tokens,
        text=text,
        finish_reason="length" if reason == "length" else "stop",
        logprobs=None,
        timings=Timings(0.0, 0.0, 0.0),
    )
