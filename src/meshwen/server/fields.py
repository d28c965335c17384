# SPDX-License-Identifier: Apache-2.0
"""Fields that OpenAI-like requests share, and what they ask of the sampler.

Each field is one of three kinds. It does what its name says; or it is refused, where it would
change the answer and cannot; or it changes no answer, and is ignored. No other field is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WrapValidator,
    model_validator,
)

from meshwen.engine.sampling_params import (
    MOST_ANSWERS,
    MOST_TOP_LOGPROBS,
    SamplingParams,
    with_fresh_seed,
)
from meshwen.errors import MeshwenError
from meshwen.server.errors import ApiError
from meshwen.server.serving import Serving

MOST_STOP_STRINGS = 16
_LONGEST_STOP_STRING = 1024  # characters


class Fields(BaseModel):
    """An object of a request: it has no other fields, and values of no other types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def expecting(expected: str) -> WrapValidator:
    """Refuses what pydantic refuses, in a few words for all reasons."""

    def check(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(f"must be {expected}") from None

    return WrapValidator(check)


def _or_refused(value: Any, handler: Callable[[Any], Any]) -> Any:
    try:
        return handler(value)
    except ValidationError:
        raise ValueError("this is not supported here; leave it out") from None


def _no_number(value: Any) -> Any:
    """Refuses 0 and 1, which pydantic takes for false and true where one of these is expected."""
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


_flag = BeforeValidator(_no_number)
# Marks fields that would change the answer, and cannot: they take what changes nothing.
REFUSES = WrapValidator(_or_refused)
Refused = Annotated[None, REFUSES]
RefusedTrue = Annotated[Annotated[Literal[False], _flag] | None, REFUSES]
RefusedFalse = Annotated[Annotated[Literal[True], _flag] | None, REFUSES]
RefusedList = Annotated[Annotated[list[Any], Field(max_length=0)] | None, REFUSES]
RefusedNumber = Annotated[Annotated[float, Field(ge=0, le=0)] | None, REFUSES]
RefusedFactor = Annotated[Annotated[float, Field(ge=1, le=1)] | None, REFUSES]
# Fields that change no answer.
Ignored = Any

StopString = Annotated[str, Field(min_length=1, max_length=_LONGEST_STOP_STRING)]
TokenId = Annotated[int, Field(ge=0)]
Stop = Annotated[
    StopString | Annotated[list[StopString], Field(max_length=MOST_STOP_STRINGS)] | None,
    expecting(
        f"text that is not empty, or a list of at most {MOST_STOP_STRINGS} such texts, each of at "
        f"most {_LONGEST_STOP_STRING} characters"
    ),
]
TopLogprobs = Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)]


class StreamOptions(Fields):
    """What a stream has beside the answer.

    Attributes:
        include_usage: a last chunk with the number of tokens.
        continuous_usage_stats: the number of tokens so far in every chunk.
        include_obfuscation: ignored: padding against who reads the lengths of chunks.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Ignored = None


class SamplingFields(Fields):
    """How an answer goes on and where it ends: OpenAI's fields and vLLM's."""

    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    logit_bias: dict[str, float] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    prompt_logprobs: TopLogprobs | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Stop = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None

    allowed_token_ids: RefusedList = None
    bad_words: RefusedList = None
    length_penalty: RefusedFactor = None
    logprob_token_ids: RefusedList = None
    repetition_detection: Refused = None
    skip_special_tokens: RefusedFalse = None
    thinking_token_budget: Refused = None
    truncate_prompt_tokens: Refused = None
    use_beam_search: RefusedTrue = None
    vllm_xargs: Refused = None
    watermarking: RefusedTrue = None

    spaces_between_special_tokens: Ignored = None
    stream_interval: Ignored = None
    truncation_side: Ignored = None

    def sampling_params(
        self,
        serving: Serving,
        *,
        max_tokens: int | None,
        logprobs: int | None,
        **further: Any,
    ) -> SamplingParams:
        """What is asked of the sampler, with the checkpoint's defaults.

        Args:
            serving: the model.
            max_tokens: the most tokens of an answer, at least 1; None: up to the context.
            logprobs: how many of the likeliest tokens to give with each; None: no log-probability.
            further: fields of `SamplingParams`.

        Raises:
            ApiError: the fields do not go together.
        """
        most = serving.max_model_len
        if max_tokens is not None and (self.min_tokens or 0) > max_tokens:
            raise ApiError(
                400,
                f"min_tokens must be at most the {max_tokens} of an answer, not {self.min_tokens}",
                param="min_tokens",
            )
        try:
            params = SamplingParams.from_generation_config(
                serving.generation_config,
                **{name: getattr(self, name) for name in _SAME},
                include_stop=self.include_stop_str_in_output,
                top_k=None if self.top_k is None else max(self.top_k, 0),
                seed=None if self.seed is None else self.seed % (1 << 32),
                min_new_tokens=None if self.min_tokens is None else min(self.min_tokens, most),
                max_new_tokens=min(most if max_tokens is None else max_tokens, most),
                logprobs=logprobs is not None,
                prompt_logprobs=self.prompt_logprobs is not None,
                # The sampler gives as many in both places: what is more is left out of answers.
                top_logprobs=max(logprobs or 0, self.prompt_logprobs or 0),
                **further,
            )
        except MeshwenError as error:
            raise ApiError(400, str(error)) from None
        params = replace(params, max_new_tokens_asked=max_tokens is not None)
        return with_fresh_seed(params) if self.seed is None else params


_SAME = (
    *("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "logit_bias", "n", "stop", "stop_token_ids", "ignore_eos"),
)


class RequestFields(Fields):
    """What a request has beside prompt and sampling: whom it asks, and how it wants its answer."""

    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    ec_transfer_params: Refused = None
    kv_transfer_params: Refused = None
    priority: RefusedNumber = None

    request_id: Ignored = None
    session_id: Ignored = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> RequestFields:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk has the number of tokens so far."""
        options = self.stream_options
        return bool(options and options.include_usage and options.continuous_usage_stats)


class OpenAIFields(SamplingFields, RequestFields):
    """What requests for chat and for completions of text share."""

    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    metadata: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    safety_identifier: Ignored = None
    service_tier: Ignored = None
    store: Ignored = None
    user: Ignored = None


def check_model(serving: Serving, name: str | None) -> None:
    """Refuses a request for another model.

    Args:
        serving: the model.
        name: the one that is asked for; None: whichever there is.

    Raises:
        ApiError: 404.
    """
    if name is not None and name not in serving.names:
        raise ApiError(
            404,
            f"there is no model {name[:200]!r} here, only: {', '.join(serving.names)}",
            param="model",
            code="model_not_found",
        )


def check_no_prompt_logprobs_in_stream(fields: SamplingFields, stream: bool | None) -> None:
    """Refuses to stream log-probabilities of a prompt, which are known when the answer is whole."""
    if stream and fields.prompt_logprobs is not None:
        raise ApiError(
            400, "prompt_logprobs cannot be streamed: leave out stream", param="prompt_logprobs"
        )
