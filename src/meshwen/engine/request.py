# SPDX-License-Identifier: Apache-2.0
"""What the engine is asked for, and what it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from meshwen.common.arguments import brief, token_ids
from meshwen.engine.sampling_params import SamplingParams
from meshwen.errors import MeshwenError
from meshwen.models.config import ModelConfig

FinishReason = Literal["stop", "length", "error"]
# Token ids with their log-probabilities, likeliest first.
TopLogprobs = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Request:
    """A prompt, as token ids, and how to continue it.

    Attributes:
        prompt_tokens: the prompt's ids.
        sampling: how to continue it.
        cache_salt: requests share what is in the KV cache only where their salts are alike: who
            must not learn what others asked, by the time that an answer takes, has one of his own.
    """

    prompt_tokens: tuple[int, ...]
    sampling: SamplingParams
    cache_salt: str = ""

    def __post_init__(self) -> None:
        """Takes any sequence of whole numbers for token ids."""
        ids = token_ids("prompt_tokens", self.prompt_tokens)
        object.__setattr__(self, "prompt_tokens", ids)
        if not isinstance(self.cache_salt, str):
            raise MeshwenError(f"cache_salt must be text, not {brief(self.cache_salt)}")

    @property
    def salt(self) -> bytes:
        """What tells its KV blocks from those of other salts, beside their tokens."""
        return self.cache_salt.encode("utf-8", "surrogatepass")

    def answer(self, choice: int) -> Request:
        """What one of its `n` answers is asked for: each has a seed of its own."""
        seed = (self.sampling.seed + choice) % (1 << 32)
        return replace(self, sampling=replace(self.sampling, n=1, seed=seed))


@dataclass(frozen=True)
class Timings:
    """Where a request's time went, in seconds.

    Attributes:
        queue_seconds: from its submission until its prefill began.
        time_to_first_token: from its submission, so with `queue_seconds` in it.
        decode_seconds: from the first token to the last.
    """

    queue_seconds: float
    time_to_first_token: float
    decode_seconds: float

    @property
    def running_seconds(self) -> float:
        """From when its prefill began to the last token."""
        return self.time_to_first_token - self.queue_seconds + self.decode_seconds


@dataclass(frozen=True)
class Completion:
    """A finished request.

    Attributes:
        prompt_tokens: the prompt's ids.
        tokens: the answer's ids, an end-of-text or stop token included.
        text: the answer without special tokens, and without the stop string that ended it (unless
            `include_stop` was asked for).
        finish_reason: "stop" at an end-of-text token, stop token or stop string, "length" at a
            limit, "error" where the model gave no next token.
        logprobs: log-probability of each token, when asked for.
        timings: how long it took.
        seed: that draws the same answer again; None where nothing was drawn (greedy).
        error: what went wrong, in one line; `tokens` and `text` are what came before.
        stop_reason: the stop string, or the id among `stop_token_ids`, that ended the answer; None
            where an end-of-text token or a limit did.
        top_logprobs: for each token the likeliest ones in its place, likeliest first, as
            (id, log-probability), when asked for. The token itself need not be among them.
        prompt_logprobs: log-probability of each of the prompt's tokens, None for the first, when
            asked for.
        prompt_top_logprobs: for each of these, what `top_logprobs` has, None for the first.
        cached_tokens: of the prompt, those that were found in the KV cache, and not computed.
        choice: which of the request's `n` answers this is, from 0 on.
        asked_too_much: an error that is the request's own: by its parameters or its grammar nothing
            may come.
    """

    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[float, ...] | None
    timings: Timings
    seed: int | None = None
    error: str | None = None
    stop_reason: int | str | None = None
    top_logprobs: tuple[TopLogprobs, ...] | None = None
    prompt_logprobs: tuple[float | None, ...] | None = None
    prompt_top_logprobs: tuple[TopLogprobs | None, ...] | None = None
    cached_tokens: int = 0
    choice: int = 0
    asked_too_much: bool = False


@dataclass(frozen=True)
class Event:
    """One token of one request, or an error in a token's place.

    Attributes:
        request: the request's number, as `Engine.submit` or the order in `Engine.run` gave it.
        token: its id; `meshwen.engine.sampling.NO_TOKEN`, -1, where there is an error instead.
        text: what can be shown now: whole characters, and nothing that might begin a stop string.
        logprob: of the token, when asked for.
        completion: with an answer's last token, the whole answer.
        top_logprobs: the likeliest tokens in its place, as in `Completion`, when asked for.
        choice: which of the request's `n` answers it belongs to, from 0 on.
    """

    request: int
    token: int
    text: str
    logprob: float | None
    completion: Completion | None
    top_logprobs: TopLogprobs | None = None
    choice: int = 0


def check_prompt(
    token_ids: Sequence[int], config: ModelConfig, name: str, max_model_len: int | None = None
) -> None:
    """Refuses a prompt that the model cannot continue.

    Args:
        token_ids: the prompt.
        config: the model's.
        name: what to call the prompt: "prompt 3".
        max_model_len: the most tokens of prompt and answer; None: the model's context.

    Raises:
        MeshwenError: it is empty, or leaves no room in the model's context, or has a token id
            outside the vocabulary.
    """
    length, context = len(token_ids), max_model_len or config.context_length
    if not length:
        raise MeshwenError(f"{name} is empty; give it at least one token")
    limit = "model's context" if context == config.context_length else "max_model_len"
    if length >= context:
        raise MeshwenError(
            f"{name} has {length} tokens, but the {limit} is {context} tokens, the answer "
            "included; shorten it"
        )
    for token in token_ids:
        if not 0 <= token < config.vocab_size:
            raise MeshwenError(
                f"{name} has a token id outside the vocabulary of {config.vocab_size}: "
                f"{brief(token)}"
            )


def check_sampling(request: Request, config: ModelConfig, name: str) -> None:
    """Refuses sampling parameters that do not fit a prompt or a model.

    Args:
        request: the prompt, and how to continue it.
        config: the model's.
        name: what to call the prompt: "prompt 3".

    Raises:
        MeshwenError: `max_length` leaves no room for an answer, or a token that is named is outside
            the vocabulary.
    """
    asked, length = request.sampling, len(request.prompt_tokens)
    if asked.max_length is not None and length >= asked.max_length:
        raise MeshwenError(
            f"{name} has {length} tokens, but max_length is {asked.max_length} tokens, the answer "
            "included; give max_new_tokens in its place"
        )
    size, bos = config.vocab_size, asked.forced_bos_token_id
    for key, ids in (
        ("forced_bos_token_id", () if bos is None else (bos,)),
        ("forced_eos_token_id", asked.forced_eos_token_id),
        ("stop_token_ids", asked.stop_token_ids),
        ("logit_bias", [token for token, _ in asked.logit_bias]),
    ):
        if any(token >= size for token in ids):
            raise MeshwenError(f"{key} {max(ids)} is outside the vocabulary of {size}")
    if asked.top_logprobs > size:
        raise MeshwenError(
            f"top_logprobs must be at most the {size} tokens of the vocabulary, "
            f"not {asked.top_logprobs}"
        )
