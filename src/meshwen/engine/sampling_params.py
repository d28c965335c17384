# SPDX-License-Identifier: Apache-2.0
"""What one request may ask for: how its answer goes on and where it ends."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from meshwen.common.arguments import brief, number, token_ids, truth, whole_number
from meshwen.common.option_fields import check_names, documented, option
from meshwen.engine.generation_config import sampling_values
from meshwen.errors import MeshwenError

MOST_ANSWERS = 128  # of one prompt
MOST_TOP_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is continued.

    `top_p` is nucleus sampling (arXiv 1904.09751), `min_p` arXiv 2407.01082. `repetition_penalty`
    divides positive and multiplies negative logits of the tokens of prompt and answer (arXiv
    1909.05858); `encoder_repetition_penalty` multiplies and divides those of the prompt's.
    `logit_bias`, `presence_penalty`, `frequency_penalty`, `logprobs` and `top_logprobs` are those
    of OpenAI's API. On the logits act, in this order, the bias, the penalties of the prompt,
    repetition, frequency and presence, what may not come (by a grammar, too), and the temperature.

    Raises MeshwenError at construction when a value is impossible.
    """

    max_new_tokens: int = option(256, "Most tokens of an answer.", type=int, least=1)
    # Whether someone asked for that many: then a request that memory has no room for is refused;
    # else, as for a checkpoint's default, an answer may end where memory does.
    max_new_tokens_asked: bool = field(default=True, compare=False)
    temperature: float = option(
        0.0,
        "0 takes the likeliest token, without the checkpoint's repetition penalties.",
        type=float,
    )
    top_p: float = option(
        1.0, "Sample from the likeliest tokens that make up this probability.", type=float
    )
    top_k: int = option(0, "Sample from this many likeliest tokens; 0: from all.", type=int)
    min_p: float = option(
        0.0, "Drop tokens below this share of the likeliest token's probability.", type=float
    )
    repetition_penalty: float = option(
        1.0, "Above 1: makes tokens of the prompt and the answer so far less likely.", type=float
    )
    encoder_repetition_penalty: float = option(
        1.0, "Above 1: makes the prompt's tokens more likely.", type=float
    )
    presence_penalty: float = option(
        0.0,
        "Subtracted from the logits of the answer's tokens so far: above 0 makes them less likely.",
        type=float,
        least=-2,
        most=2,
    )
    frequency_penalty: float = option(
        0.0,
        "The same, times how often the answer has the token.",
        type=float,
        least=-2,
        most=2,
    )
    logit_bias: tuple[tuple[int, float], ...] = option(
        (),
        "Added to the logits of some tokens, first of all: {token id: from -100 to 100}.",
        type=tuple,
        many=True,
    )
    max_length: int | None = option(
        None, "Most tokens of a prompt and its answer. None: no such limit.", type=int
    )
    min_new_tokens: int = option(
        0,
        "No end-of-text token, and none of stop_token_ids, before this many others; stop strings "
        "still end it. Elsewhere called min_tokens.",
        type=int,
    )
    min_length: int = option(0, "The same, the prompt counted.", type=int)
    no_repeat_ngram_size: int = option(
        0, "No run of this many tokens twice, the prompt's counted; 0: off.", type=int
    )
    encoder_no_repeat_ngram_size: int = option(
        0, "No run of this many tokens that the prompt has too; 0: off.", type=int
    )
    suppress_tokens: tuple[int, ...] = option(
        (), "Token ids that are never drawn.", type=int, many=True
    )
    begin_suppress_tokens: tuple[int, ...] = option(
        (), "Token ids that are not drawn first.", type=int, many=True
    )
    bad_words_ids: tuple[tuple[int, ...], ...] = option(
        (), "Runs of token ids that are never drawn whole.", type=tuple, many=True
    )
    forced_bos_token_id: int | None = option(
        None, "The token after a prompt of one token.", type=int
    )
    forced_eos_token_id: tuple[int, ...] = option(
        (),
        "Token ids, one of which is the last token of an answer of max_new_tokens.",
        type=int,
        many=True,
    )
    n: int = option(1, "Answers to the prompt, each with a seed of its own.", type=int)
    seed: int = option(0, "The same seed draws the same answer.", type=int)
    stop: tuple[str, ...] = option(
        (), "End the answer before this text or special token.", many=True
    )
    include_stop: bool = option(
        False,
        "The stop string that ends the answer is part of its text. Elsewhere called "
        "include_stop_str_in_output.",
        type=bool,
    )
    stop_token_ids: tuple[int, ...] = option(
        (), "Token ids that end the answer, as its last token.", type=int, many=True
    )
    ignore_eos: bool = option(False, "End-of-text tokens do not end the answer.", type=bool)
    grammar: str | None = option(
        None,
        "The answer's text follows this grammar: see meshwen.engine.grammar. None: any text.",
    )
    logprobs: bool = option(
        False, "Return each token's log-probability, from the unmodified logits.", type=bool
    )
    top_logprobs: int = option(
        0,
        "With log-probabilities, return those of this many likeliest tokens too.",
        type=int,
        least=0,
        most=MOST_TOP_LOGPROBS,
    )
    prompt_logprobs: bool = option(
        False, "Return the log-probabilities of the prompt's tokens too.", type=bool
    )

    def __post_init__(self) -> None:
        """Checks the values, and makes tuples of lists."""
        for check, names in (
            (whole_number, _WHOLE),
            (number, _REAL),
            (truth, ("include_stop", "ignore_eos", "logprobs", "prompt_logprobs")),
            (_ids, _IDS),
            (_runs, ("bad_words_ids",)),
            (_biases, ("logit_bias",)),
        ):
            for name in names:
                value = getattr(self, name)
                if value is not None or name not in _OPTIONAL:
                    object.__setattr__(self, name, check(name, value))
        strings = isinstance(self.stop, tuple | list) and all(isinstance(s, str) for s in self.stop)
        if strings:
            object.__setattr__(self, "stop", tuple(map(str, self.stop)))
        forced = self.forced_bos_token_id
        for name, ok, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("max_length", self.max_length is None or self.max_length >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", 0 <= self.top_k < 1 << 31, "from 0 (off) to 2147483647"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("n", 1 <= self.n <= MOST_ANSWERS, f"from 1 to {MOST_ANSWERS}"),
            ("seed", 0 <= self.seed < 1 << 32, "from 0 to 4294967295"),
            ("stop", strings and all(self.stop), "strings that are not empty"),
            ("grammar", self.grammar is None or _is_text(self.grammar), "a grammar's text"),
            ("forced_bos_token_id", forced is None or forced >= 0, "a token id"),
            *((name, 0 < getattr(self, name) < math.inf, "above 0") for name in _PENALTIES),
            *((name, getattr(self, name) >= 0, "0 (off) or more") for name in _COUNTS),
            *((name, -2 <= getattr(self, name) <= 2, "from -2 to 2") for name in _COUNTED),
            (
                "top_logprobs",
                0 <= self.top_logprobs <= MOST_TOP_LOGPROBS,
                f"from 0 to {MOST_TOP_LOGPROBS}",
            ),
        ):
            if not ok:
                raise MeshwenError(f"{name} must be {expected}, not {brief(getattr(self, name))}")
        if self.top_logprobs and not (self.logprobs or self.prompt_logprobs):
            raise MeshwenError(
                f"top_logprobs {self.top_logprobs} needs logprobs or prompt_logprobs: set one of "
                "them"
            )

    @property
    def counted(self) -> bool:
        """Whether it matters how often the answer has each token."""
        return any(getattr(self, name) != 0 for name in _COUNTED)

    @property
    def constrained(self) -> bool:
        """Whether some tokens may not come at some step: see `meshwen.engine.constraints`."""
        return any(
            getattr(self, f.name) != f.default for f in fields(self) if f.name in _CONSTRAINTS
        )

    @classmethod
    def from_generation_config(cls, generation_config: Mapping[str, Any], **given: Any) -> Self:
        """A checkpoint's own defaults, with what the user gave in their place.

        As in transformers, `do_sample` false (or absent) means greedy; but who asks for `top_p`,
        `top_k` or `min_p` without a temperature means to sample, at temperature 1. An explicit
        `temperature=0` also drops the checkpoint's repetition penalties, so that greedy means the
        likeliest token. A number of new tokens goes before a length that counts the prompt, but
        what is given before either of the checkpoint's.

        Args:
            generation_config: the content of `generation_config.json`; {} for none.
            given: fields of this class; None stands for "not given". `stop` may be one string.

        Raises:
            MeshwenError: a value is impossible.
        """
        given = {name: value for name, value in given.items() if value is not None}
        check_names("sampling parameter", given, cls)
        values = sampling_values(generation_config, given)
        values.setdefault(
            "max_new_tokens_asked", bool({"max_new_tokens", "max_length"} & set(given))
        )
        stop = values.get("stop", ())
        several = isinstance(stop, Iterable) and not isinstance(stop, str | bytes)
        values["stop"] = (stop,) if isinstance(stop, str) else tuple(stop) if several else stop
        return cls(**values)


documented(SamplingParams, "Attributes, with their defaults")(SamplingParams)


def with_fresh_seed(params: SamplingParams) -> SamplingParams:
    """The same with a seed that nobody chose, where tokens are drawn; greedy parameters as is."""
    return replace(params, seed=secrets.randbits(32)) if params.temperature > 0 else params


_PENALTIES = ("repetition_penalty", "encoder_repetition_penalty")
_COUNTED = ("presence_penalty", "frequency_penalty")
_RUNS = ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size")
_COUNTS = ("min_new_tokens", "min_length", *_RUNS)
_OPTIONAL = ("max_length", "forced_bos_token_id")
_WHOLE = ("max_new_tokens", "top_k", "n", "seed", "top_logprobs", *_COUNTS, *_OPTIONAL)
_REAL = ("temperature", "top_p", "min_p", *_PENALTIES, *_COUNTED)
_IDS = ("suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id", "stop_token_ids")
_MOST_BIASES = 1024
_CONSTRAINTS = (
    *_COUNTS,
    *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids"),
    *("forced_bos_token_id", "forced_eos_token_id"),
)


def _is_text(value: Any) -> bool:
    """Whether a value is text that is not empty, and valid Unicode."""
    try:
        return isinstance(value, str) and bool(value.encode())
    except UnicodeEncodeError:
        return False


def _ids(name: str, value: Any) -> tuple[int, ...]:
    """Token ids; one stands for a list of one."""
    ids = token_ids(name, value if isinstance(value, Iterable) else [value])
    if ids and min(ids) < 0:
        raise MeshwenError(f"{name} must be token ids, not {brief(value)}")
    return ids


def _runs(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    """Lists of token ids, none of them empty."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise MeshwenError(f"{name} must be lists of token ids, not {brief(value)}")
    runs = tuple(_ids(name, one) for one in value)
    if not all(runs):
        raise MeshwenError(f"{name} must be lists that are not empty, not {brief(value)}")
    return runs


def _biases(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    """Token ids, each with its bias, in the order of the ids."""
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, list | tuple) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs
    ):
        raise MeshwenError(f"{name} must be biases by token id, {{5: -1.5}}, not {brief(value)}")
    if len(pairs) > _MOST_BIASES:
        raise MeshwenError(
            f"{name} must be of at most {_MOST_BIASES} tokens, not {len(pairs)}; suppress_tokens "
            "takes more"
        )
    found: dict[int, float] = {}
    for token, bias in pairs:
        # JSON has no other keys than text.
        is_text = isinstance(token, str) and token.isdecimal() and len(token) < 20
        (whole,) = _ids(name, [int(token) if is_text else token])
        amount = float(number(f"{name} of token {whole}", bias))
        if not -100 <= amount <= 100:
            raise MeshwenError(
                f"{name} must be from -100 to 100, not {brief(bias)} for token {whole}"
            )
        if whole in found:
            raise MeshwenError(f"{name} must name a token once, not {whole} twice")
        found[whole] = amount
    return tuple(sorted(found.items()))
