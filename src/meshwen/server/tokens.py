# SPDX-License-Identifier: Apache-2.0
"""`/inference/v1/generate`: token ids in, token ids and log-probabilities out.

With `max_tokens` 0 and `prompt_logprobs` it scores given tokens: none is generated.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from pydantic import Field
from starlette.responses import Response

from meshwen.engine.request import Request
from meshwen.server.fields import (
    Ignored,
    Refused,
    RequestFields,
    SamplingFields,
    TokenId,
    TopLogprobs,
    check_model,
    check_no_prompt_logprobs_in_stream,
)
from meshwen.server.generation import Delta, Generation, generate
from meshwen.server.output_formats import StructuredOutputs
from meshwen.server.prompts import check_length
from meshwen.server.replies import Envelope, json_response
from meshwen.server.serving import Serving
from meshwen.server.sse import STREAMED, OpenAIEvents, event_stream
from meshwen.server.structured import grammar_for
from meshwen.server.token_texts import TokenTexts

router = APIRouter()

_DEFAULT_TOKENS = 16  # vLLM's.


class TokenSampling(SamplingFields):
    """How given tokens are continued."""

    logprobs: TopLogprobs | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    structured_outputs: StructuredOutputs | None = None

    extra_args: Refused = None

    detokenize: Ignored = None
    output_kind: Ignored = None


class TokensRequest(RequestFields):
    """The body of a request to continue or score token ids."""

    token_ids: Annotated[list[TokenId], Field(min_length=1)]
    sampling_params: TokenSampling = Field(default_factory=TokenSampling)

    features: Refused = None


@router.post("/inference/v1/generate", responses=STREAMED)
async def generate_tokens(body: TokensRequest, http_request: HttpRequest) -> Response:
    """Continues token ids."""
    serving: Serving = http_request.app.state.serving
    check_model(serving, body.model)
    check_no_prompt_logprobs_in_stream(body.sampling_params, body.stream)
    check_length(serving, len(body.token_ids), "token_ids", "token_ids")
    generation = await _generation(serving, body)
    steps = generate(serving, generation, http_request)
    if body.stream:
        return await event_stream(steps, _TokenEvents(serving, body, generation))
    return json_response(await _whole(steps, serving, body, generation))


async def _generation(serving: Serving, body: TokensRequest) -> Generation:
    """What is asked of the engine."""
    asked = body.sampling_params
    grammar = await grammar_for(serving, structured_outputs=asked.structured_outputs)
    most = _DEFAULT_TOKENS if asked.max_tokens is None else asked.max_tokens
    sampling = asked.sampling_params(
        serving, max_tokens=max(most, 1), logprobs=asked.logprobs, grammar=grammar
    )
    request = Request(tuple(body.token_ids), sampling, body.cache_salt or "")
    return Generation((request,), scoring=most == 0)


class _Choice:
    """One answer's tokens as they come.

    Args:
        texts: writes tokens.
        count: how many of the likeliest tokens each has; None: no log-probabilities.
    """

    def __init__(self, texts: TokenTexts, count: int | None):
        self._texts, self._count = texts, count
        self._tokens: list[int] = []
        self._logprobs: list[dict[str, Any]] = []

    def add(self, delta: Delta) -> None:
        """Adds a delta's token."""
        if delta.dropped:
            return
        event = delta.event
        self._tokens.append(event.token)
        if self._count is not None:
            assert event.logprob is not None
            top = (event.top_logprobs or ())[: self._count]
            self._logprobs += self._texts.chat_logprobs([(event.token, event.logprob, top)])

    def take(self, delta: Delta) -> dict[str, Any]:
        """The choice with what was added since this was last called.

        Args:
            delta: the last that was.
        """
        choice: dict[str, Any] = {
            "index": delta.index,
            "token_ids": self._tokens,
            "logprobs": None if self._count is None else {"content": self._logprobs},
            "finish_reason": delta.finish_reason,
        }
        if delta.completion is not None:
            choice["stop_reason"] = delta.completion.stop_reason
        self._tokens, self._logprobs = [], []
        return choice


def _choices(body: TokensRequest, generation: Generation) -> list[_Choice]:
    (request,) = generation.requests
    texts = TokenTexts(None, as_ids=True)
    return [_Choice(texts, body.sampling_params.logprobs) for _ in range(request.sampling.n)]


async def _whole(
    steps: AsyncGenerator[list[Delta], None],
    serving: Serving,
    body: TokensRequest,
    generation: Generation,
) -> dict[str, Any]:
    """The response, once all answers are whole."""
    envelope = Envelope(serving, "gen-", "token_completion", generation.requests)
    choices = _choices(body, generation)
    last: dict[int, Delta] = {}
    async with aclosing(steps):
        async for deltas in steps:
            envelope.usage.add(deltas)
            for delta in deltas:
                choices[delta.index].add(delta)
                last[delta.index] = delta
    scored, done = body.sampling_params.prompt_logprobs, last[0].completion
    assert done is not None
    texts = TokenTexts(serving.tokenizer)
    return envelope.body(
        [one.take(last[i]) for i, one in enumerate(choices)],
        prompt_logprobs=None if scored is None else texts.prompt_logprobs(done, scored),
        usage=envelope.usage.body(),
        request_id=envelope.id,
    )


class _TokenEvents(OpenAIEvents):
    """Chunks of a stream: a token each."""

    def __init__(self, serving: Serving, body: TokensRequest, generation: Generation):
        envelope = Envelope(serving, "gen-", "token_completion.chunk", generation.requests)
        super().__init__(envelope, body.include_usage, body.continuous_usage)
        self._choices = _choices(body, generation)

    def chunks(self, delta: Delta) -> Iterable[dict[str, Any]]:
        """A delta's."""
        choice = self._choices[delta.index]
        choice.add(delta)
        yield self.envelope.body([choice.take(delta)], request_id=self.envelope.id)
