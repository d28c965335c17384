# SPDX-License-Identifier: Apache-2.0
"""Measurements of engines that take steps: a token of every answer, or more of a prompt.

They need the standard library alone. Each prompt is another, so that no cache of prefixes has it,
unless a measurement is about that.
"""

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from worker import WARM_UP, median_seconds

_ROOM = 1024  # tokens that an answer may have which is cancelled before
_MOST_AHEAD = 128  # tokens of answers before decode steps are measured
_ZERO, _COMMA, _SPACE = 15, 11, 220  # tokens
_random = Random(0)


def _now() -> float:
    return time.perf_counter()


@dataclass
class Answer:
    """What has come of an answer.

    Attributes:
        number: by which its engine knows it.
        prompt: how many tokens.
        tokens: that came.
        times: when each did.
        done: whether it has ended.
        cached: tokens of the prompt that the engine had in its cache; None: it does not say.
        submitted: when.
    """

    number: int
    prompt: int
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    done: bool = False
    cached: int | None = None
    submitted: float = field(default_factory=_now)

    def add(self, tokens: Sequence[int]) -> None:
        """Takes tokens that come now."""
        self.tokens += tokens
        self.times += [_now()] * len(tokens)

    @property
    def first_token(self) -> float:
        """Seconds from its submission."""
        return self.times[0] - self.submitted


class Stepping(ABC):
    """An engine that takes steps."""

    @abstractmethod
    def submit(
        self, prompt: list[int], limit: int, *, whole: bool = False, stop: Sequence[str] = ()
    ) -> Answer:
        """Asks for a greedy answer of up to `limit` tokens; `whole`: of so many, whatever comes."""

    @abstractmethod
    def step(self) -> None:
        """Takes a step; answers get what came of it."""

    @abstractmethod
    def cancel(self, answer: Answer) -> None:
        """Ends an answer, if it has not ended."""

    def decode(self, batch: int, length: int, steps: int) -> float:
        """Seconds of a step of `batch` sequences that have `length` tokens each, on average."""
        return self.decode_steps(batch, length, steps)["seconds"]

    def decode_steps(self, batch: int, length: int, steps: int) -> dict[str, Any]:
        """The same, and how many tokens they really had when these steps began.

        The first answers begin before the last prompts are read, in each engine so many steps that
        it needs for that. So prompts are shorter, and answers make up for it.
        """
        ahead = min(length // 2, _MOST_AHEAD)
        answers = [self.submit(random_prompt(length - ahead), _ROOM) for _ in range(batch)]
        self._step_until(
            lambda: all(one.tokens for one in answers) and _tokens(answers) >= length * batch
        )
        before = [len(one.tokens) for one in answers]
        context = _tokens(answers) / batch
        seconds = median_seconds(self.step, steps)
        came = {len(one.tokens) - old for one, old in zip(answers, before, strict=True)}
        for one in answers:
            self.cancel(one)
        if came != {WARM_UP + steps}:
            raise RuntimeError(f"{WARM_UP + steps} steps gave answers {sorted(came)} tokens")
        return {"seconds": seconds, "context": context}

    def prefill(self, length: int, runs: int) -> float:
        """Seconds to the first token of an answer to a new prompt of `length` tokens."""
        return median_seconds(lambda: self._finish([self.submit(random_prompt(length), 1)]), runs)

    def prefill_again(self, length: int, runs: int) -> float:
        """The same of a prompt that was read before."""
        prompt = random_prompt(length)
        return median_seconds(lambda: self._finish([self.submit(prompt, 1)]), runs)

    def chat(self, conversations: list[list[list[int]]], limit: int) -> dict[str, Any]:
        """Times of the first tokens in the last of several conversations, which come in turn.

        Args:
            conversations: what a user adds to what there is before each answer.
            limit: tokens of each answer.
        """
        for turns in conversations:
            history, answers = [], []
            for added in turns:
                history += added
                [answer] = self._finish([self.submit(history, limit, whole=True)])
                history += answer.tokens
                answers.append(answer)
        return {
            "seconds": answers[-1].first_token,
            "first_token_seconds": [one.first_token for one in answers],
            "prompt_tokens": [one.prompt for one in answers],
            "cached_tokens": [one.cached for one in answers],
        }

    def answer(
        self, prompts: list[list[int]], warm_up: list[list[int]], limit: int, stop: list[str]
    ) -> dict[str, Any]:
        """All answers to some prompts, submitted at once.

        Args:
            prompts: what to answer.
            warm_up: others, whose answers begin before anything counts.
            limit: tokens of each answer.
            stop: text that ends one.
        """
        first = [self.submit(prompt, limit, stop=stop) for prompt in warm_up]
        self._step_until(lambda: all(len(one.tokens) > 1 or one.done for one in first))
        for one in first:
            self.cancel(one)
        began = _now()
        answers = self._finish([self.submit(prompt, limit, stop=stop) for prompt in prompts])
        seconds = _now() - began
        tokens, read = (sum(len(one.tokens) for one in answers), sum(map(len, prompts)))
        cached = [one.cached for one in answers]
        known = None if None in cached else sum(filter(None, cached))
        return {
            "seconds": seconds,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "prompt_tokens": read,
            "cached_tokens": known,
            "computed_tokens": None if known is None else read - known,
            "first_tokens_seconds": max(one.times[0] for one in answers) - began,
        }

    def arrivals(self, running: int, prompts: int, length: int) -> dict[str, Any]:
        """Seconds between the tokens of answers while long prompts arrive, in the second of two.

        Args:
            running: answers, to prompts of 128 tokens.
            prompts: that arrive together.
            length: tokens of each.
        """
        self._arrivals(running, prompts, length)
        return self._arrivals(running, prompts, length)

    def _arrivals(self, running: int, prompts: int, length: int) -> dict[str, Any]:
        answers = [self.submit(random_prompt(128), _ROOM) for _ in range(running)]
        self._step_until(lambda: all(len(one.tokens) > 4 for one in answers))
        quiet = _now()
        self._step_until(lambda: all(len(one.tokens) > 24 for one in answers))
        arrived = _now()
        new = [self.submit(random_prompt(length), 16) for _ in range(prompts)]
        self._step_until(lambda: all(one.tokens for one in new))
        ended = _now()
        if any(one.done for one in answers):
            raise RuntimeError("an answer ended while prompts were read")
        for one in answers + new:
            self.cancel(one)
        gaps = _gaps(answers, arrived, ended)
        return {
            "seconds": _percentile(gaps, 95),
            "p50": _percentile(gaps, 50),
            "p95": _percentile(gaps, 95),
            "max": max(gaps),
            "quiet_p50": _percentile(_gaps(answers, quiet, arrived), 50),
            "first_token_seconds": [one.first_token for one in new],
        }

    def _finish(self, answers: list[Answer]) -> list[Answer]:
        self._step_until(lambda: all(one.done for one in answers))
        return answers

    def _step_until(self, true: Callable[[], bool]) -> None:
        while not true():
            self.step()


def random_prompt(length: int) -> list[int]:
    """Numbers that count up from a random one, in tokens of Qwen's vocabulary.

    Answers go on counting; after tokens without a pattern they would end soon.
    """
    start = _random.randrange(100_000, 900_000)
    numbers = range(start, start + length // 8 + 1)
    text = [token for number in numbers for token in (*_digits(number), _COMMA, _SPACE)]
    return text[:length]


def _tokens(answers: list[Answer]) -> int:
    """Of prompts and answers together."""
    return sum(one.prompt + len(one.tokens) for one in answers)


def _digits(number: int) -> list[int]:
    return [_ZERO + int(digit) for digit in str(number)]


def _gaps(answers: list[Answer], start: float, end: float) -> list[float]:
    """Seconds between two tokens of an answer, of which the second came between two times."""
    return [
        after - before
        for one in answers
        for before, after in zip(one.times, one.times[1:], strict=False)
        if start < after <= end
    ]


def _percentile(values: list[float], percent: int) -> float:
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
