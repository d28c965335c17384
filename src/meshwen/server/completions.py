# SPDX-License-Identifier: Apache-2.0
"""`/v1/completions`: OpenAI's completions of texts and of token ids."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from pydantic import Field, model_validator
from starlette.responses import Response

from meshwen.engine.request import Request
from meshwen.engine.sampling_params import with_fresh_seed
from meshwen.server.errors import ApiError
from meshwen.server.fields import (
    OpenAIFields,
    Refused,
    TokenId,
    TopLogprobs,
    check_model,
    check_no_prompt_logprobs_in_stream,
    expecting,
)
from meshwen.server.generation import Delta, Generation, generate
from meshwen.server.output_formats import ResponseFormat, StructuredOutputs
from meshwen.server.prompts import check_length, text_prompt
from meshwen.server.replies import Envelope, json_response
from meshwen.server.serving import Serving
from meshwen.server.sse import STREAMED, OpenAIEvents, event_stream
from meshwen.server.structured import grammar_for
from meshwen.server.text_logprobs import TextLogprobs
from meshwen.server.token_texts import TokenTexts

router = APIRouter()

_MOST_PROMPTS = 1024
_DEFAULT_TOKENS = 16  # OpenAI's.


class CompletionRequest(OpenAIFields):
    """The body of a request for completions."""

    prompt: Annotated[
        str
        | Annotated[list[str], Field(min_length=1, max_length=_MOST_PROMPTS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]],
            Field(min_length=1, max_length=_MOST_PROMPTS),
        ],
        expecting(
            f"text, token ids, or a list of up to {_MOST_PROMPTS} texts or lists of token ids, "
            "none of them empty"
        ),
    ]
    add_special_tokens: bool | None = None
    best_of: int | None = None
    echo: bool | None = None
    logprobs: TopLogprobs | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    prompt_embeds: Refused = None
    suffix: Refused = None

    @model_validator(mode="after")
    def _check_best_of(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of must be n: the best of more answers is not chosen here")
        return self

    @property
    def scores_prompt(self) -> bool:
        """Whether the response has log-probabilities of the prompt in the answer's place."""
        return bool(self.echo) and self.logprobs is not None


@router.post("/v1/completions", responses=STREAMED)
async def create_completion(body: CompletionRequest, http_request: HttpRequest) -> Response:
    """Continues texts."""
    serving: Serving = http_request.app.state.serving
    check_model(serving, body.model)
    check_no_prompt_logprobs_in_stream(body, body.stream)
    if body.stream and body.scores_prompt:
        raise ApiError(
            400, "echo with logprobs cannot be streamed: leave out stream", param="stream"
        )
    generation = await _generation(serving, body)
    steps = generate(serving, generation, http_request)
    if body.stream:
        return await event_stream(steps, _CompletionEvents(serving, body, generation))
    return json_response(await _whole(steps, serving, body, generation))


async def _generation(serving: Serving, body: CompletionRequest) -> Generation:
    """What is asked of the engine."""
    grammar = await grammar_for(
        serving,
        response_format=body.response_format,
        structured_outputs=body.structured_outputs,
    )
    asked = _DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    scored = body.scores_prompt and body.prompt_logprobs is None
    fields = body.model_copy(update={"prompt_logprobs": body.logprobs}) if scored else body
    sampling = fields.sampling_params(
        serving, max_tokens=max(asked, 1), logprobs=body.logprobs, grammar=grammar
    )
    prompts = await _prompts(serving, body)
    seeded = body.seed is not None  # Else each prompt has a seed of its own, as if asked alone.
    requests = tuple(
        Request(one, sampling if seeded else with_fresh_seed(sampling), body.cache_salt or "")
        for one in prompts
    )
    return Generation(requests, scoring=asked == 0)


async def _prompts(serving: Serving, body: CompletionRequest) -> list[tuple[int, ...]]:
    special = body.add_special_tokens is not False
    found = []
    for one in _each(body.prompt):
        if isinstance(one, str):
            found.append(await text_prompt(serving, one, add_special_tokens=special))
        else:
            check_length(serving, len(one), "prompt")
            found.append(tuple(one))
    return found


def _each(prompt: Any) -> list[Any]:
    """The prompts of a request: texts, or lists of token ids."""
    several = isinstance(prompt, list) and isinstance(prompt[0], str | list)
    return prompt if several else [prompt]


def _echoes(serving: Serving, body: CompletionRequest, generation: Generation) -> list[str]:
    """The text that each choice begins with: its prompt, if it is echoed."""
    given, tokenizer = _each(body.prompt), serving.tokenizer
    found = []
    for one, request in zip(given, generation.requests, strict=True):
        if not body.echo:
            text = ""
        elif isinstance(one, str):
            text = one
        else:
            text = tokenizer.decode(one, skip_special_tokens=False) if tokenizer else ""
        found += [text] * request.sampling.n
    return found


class _Choice:
    """One answer as it grows.

    Args:
        echo: the text that it begins with.
        logprobs: writes log-probabilities; None: none were asked for.
    """

    def __init__(self, echo: str, logprobs: TextLogprobs | None):
        self.text, self._logprobs = echo, logprobs
        self._tokens: list[int] = []
        self.last: Delta | None = None

    def add(self, delta: Delta) -> None:
        """Adds the text of a delta."""
        self.last = delta
        if not delta.dropped:
            self.text += delta.content
            self._tokens.append(delta.event.token)
            if self._logprobs is not None:
                self._logprobs.add(delta.event)

    def body(self, index: int, body: CompletionRequest, texts: TokenTexts) -> dict[str, Any]:
        """The choice as a response has it."""
        assert self.last is not None
        assert self.last.completion is not None
        done = self.last.completion
        choice: dict[str, Any] = {
            "index": index,
            "text": self.text,
            "logprobs": None if self._logprobs is None else self._logprobs.take(),
            "finish_reason": self.last.finish_reason,
            "stop_reason": done.stop_reason,
        }
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = texts.prompt_logprobs(done, body.prompt_logprobs)
        if body.return_token_ids:
            choice["token_ids"] = self._tokens
            choice["prompt_token_ids"] = list(done.prompt_tokens)
        return choice


async def _whole(
    steps: AsyncGenerator[list[Delta], None],
    serving: Serving,
    body: CompletionRequest,
    generation: Generation,
) -> dict[str, Any]:
    """The response, once all answers are whole."""
    envelope = Envelope(serving, "cmpl-", "text_completion", generation.requests)
    texts = TokenTexts(serving.tokenizer, body.return_tokens_as_token_ids)
    echoes = _echoes(serving, body, generation)
    logprobs = [_logprobs(serving, body, texts) for _ in echoes]
    choices = [_Choice(*one) for one in zip(echoes, logprobs, strict=True)]
    async with aclosing(steps):
        async for deltas in steps:
            envelope.usage.add(deltas)
            for delta in deltas:
                choices[delta.index].add(delta)
    if body.scores_prompt:
        for choice, found in zip(choices, logprobs, strict=True):
            assert found is not None
            assert choice.last is not None
            assert choice.last.completion is not None
            found.put_prompt(choice.last.completion)
    return envelope.body(
        [one.body(i, body, texts) for i, one in enumerate(choices)], usage=envelope.usage.body()
    )


def _logprobs(serving: Serving, body: CompletionRequest, texts: TokenTexts) -> TextLogprobs | None:
    if body.logprobs is None:
        return None
    return TextLogprobs(serving.tokenizer, texts, body.logprobs)


class _CompletionEvents(OpenAIEvents):
    """Chunks of a stream."""

    def __init__(self, serving: Serving, body: CompletionRequest, generation: Generation):
        envelope = Envelope(serving, "cmpl-", "text_completion", generation.requests)
        super().__init__(envelope, body.include_usage, body.continuous_usage)
        self._body = body
        self._echoes = dict(enumerate(_echoes(serving, body, generation)))
        texts = TokenTexts(serving.tokenizer, body.return_tokens_as_token_ids)
        self._logprobs = [_logprobs(serving, body, texts) for _ in self._echoes]
        self._prompts = [
            one.prompt_tokens for one in generation.requests for _ in range(one.sampling.n)
        ]
        self._begun: set[int] = set()

    def chunks(self, delta: Delta) -> Iterable[dict[str, Any]]:
        """A delta's."""
        index, first = delta.index, delta.index not in self._begun
        self._begun.add(index)
        text = self._echoes.pop(index, "") + delta.content
        further: dict[str, Any] = {}
        if self._body.return_token_ids:
            further["token_ids"] = [] if delta.dropped else [delta.event.token]
            if first:
                further["prompt_token_ids"] = list(self._prompts[index])
        logprobs, found = self._logprobs[index], None
        if logprobs is not None and not delta.dropped:
            logprobs.add(delta.event)
            found = logprobs.take()
        if text or found or further:
            yield self._chunk(index, text, found, **further)
        if delta.completion is not None:
            reason, stop = delta.finish_reason, delta.completion.stop_reason
            yield self._chunk(index, "", finish_reason=reason, stop_reason=stop)

    def _chunk(self, index: int, text: str, logprobs: Any = None, **further: Any) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}
        return self.envelope.body([choice | further])
