# SPDX-License-Identifier: Apache-2.0
"""What one request may ask for: how its answer goes on and where it ends."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any, Self

from meshwen.common.arguments import brief, number, token_ids, truth, whole_number
from meshwen.engine.generation_config import sampling_values
from meshwen.errors import MeshwenError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is continued.

    Attributes:
        max_new_tokens: at most so many tokens.
        max_new_tokens_asked: someone asked for that many: a request that memory has no room for is
            refused. Else, as for a checkpoint's default, an answer may end where memory does.
        temperature: 0 takes the likeliest token (greedy).
        top_p: keep the likeliest tokens that together reach this probability (arXiv 1904.09751).
        top_k: keep this many of the likeliest tokens; 0 keeps all.
        min_p: keep tokens at least this fraction as likely as the likeliest (arXiv 2407.01082).
        repetition_penalty: divides positive and multiplies negative logits of tokens that the
            prompt or the answer has already (arXiv 1909.05858); 1 changes nothing.
        encoder_repetition_penalty: multiplies positive and divides negative logits of the prompt's
            tokens: above 1, the answer keeps to them.
        max_length: at most so many tokens of prompt and answer; None: no such limit.
        min_new_tokens: no end-of-text token before so many others; stop strings end the answer.
        min_length: the same, the prompt counted.
        no_repeat_ngram_size: no run of so many tokens twice, the prompt's counted; 0: any.
        encoder_no_repeat_ngram_size: no run of so many of the prompt's tokens in a row; 0: any.
        suppress_tokens: ids that never come.
        begin_suppress_tokens: ids that do not come first.
        bad_words_ids: runs of ids that never come whole.
        forced_bos_token_id: what follows a prompt of one token.
        forced_eos_token_id: ids one of which is the last that `max_new_tokens` leaves room for.
        seed: of the noise; 0 to 2**32 - 1. The same seed draws the same tokens. Who asks a model
            or the command line without one gets a fresh one: see `with_fresh_seed`.
        stop: strings at which the answer ends; they are not part of its text. Special tokens, which
            are not either, are found as they are written: "<|im_end|>".
        logprobs: whether to give each token's log-probability under the unmodified logits.

    Raises MeshwenError at construction when a value is impossible.
    """

    max_new_tokens: int = 256
    max_new_tokens_asked: bool = field(default=True, compare=False)
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    encoder_repetition_penalty: float = 1.0
    max_length: int | None = None
    min_new_tokens: int = 0
    min_length: int = 0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: tuple[int, ...] = ()
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: bool = False

    def __post_init__(self) -> None:
        """Checks the values, and makes tuples of lists."""
        for check, names in (
            (whole_number, _WHOLE),
            (number, _REAL),
            (truth, ("logprobs",)),
            (_ids, ("suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id")),
            (_runs, ("bad_words_ids",)),
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
            ("seed", 0 <= self.seed < 1 << 32, "from 0 to 4294967295"),
            ("stop", strings and all(self.stop), "strings that are not empty"),
            ("forced_bos_token_id", forced is None or forced >= 0, "a token id"),
            *((name, 0 < getattr(self, name) < math.inf, "above 0") for name in _PENALTIES),
            *((name, getattr(self, name) >= 0, "0 (off) or more") for name in _COUNTS),
        ):
            if not ok:
                raise MeshwenError(f"{name} must be {expected}, not {brief(getattr(self, name))}")

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
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(given) - set(known)):
            known.remove("max_new_tokens_asked")  # Not for a caller.
            near = get_close_matches(unknown[0], known, n=1)
            meant = f", did you mean {near[0]}" if near else ""
            raise MeshwenError(
                f"unknown sampling parameter {unknown[0]!r}{meant}; there are {', '.join(known)}"
            )
        values = sampling_values(generation_config, given)
        values.setdefault(
            "max_new_tokens_asked", bool({"max_new_tokens", "max_length"} & set(given))
        )
        stop = values.get("stop", ())
        several = isinstance(stop, Iterable) and not isinstance(stop, str | bytes)
        values["stop"] = (stop,) if isinstance(stop, str) else tuple(stop) if several else stop
        return cls(**values)


def with_fresh_seed(params: SamplingParams) -> SamplingParams:
    """The same with a seed that nobody chose, where tokens are drawn; greedy parameters as is."""
    return replace(params, seed=secrets.randbits(32)) if params.temperature > 0 else params


_PENALTIES = ("repetition_penalty", "encoder_repetition_penalty")
_RUNS = ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size")
_COUNTS = ("min_new_tokens", "min_length", *_RUNS)
_OPTIONAL = ("max_length", "forced_bos_token_id")
_WHOLE = ("max_new_tokens", "top_k", "seed", *_COUNTS, *_OPTIONAL)
_REAL = ("temperature", "top_p", "min_p", *_PENALTIES)
_CONSTRAINTS = (
    *_COUNTS,
    *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids"),
    *("forced_bos_token_id", "forced_eos_token_id"),
)


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
