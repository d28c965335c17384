# SPDX-License-Identifier: Apache-2.0
"""GSM8K: asks a model every problem, grades the answers, and sums up."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from meshwen.engine.engine import Engine
from meshwen.engine.request import Completion, Request
from meshwen.engine.sampling_params import SamplingParams
from meshwen.errors import MeshwenError
from meshwen.evals.numerals import number
from meshwen.evals.run_file import Key, Record, RunFile
from meshwen.evals.statistics import clustered_interval, wilson_interval
from meshwen.evals.styles import Problem, PromptStyle
from meshwen.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Question:
    """A problem as the model gets it.

    Attributes:
        problem: the problem.
        token_ids: the prompt.
        sample: which of the answers to the problem.
    """

    problem: Problem
    token_ids: tuple[int, ...]
    sample: int = 0

    @property
    def key(self) -> Key:
        """Of its answer in a run file."""
        return self.problem.number, self.sample

    @property
    def prompt_sha256(self) -> str:
        """Of the tokens, as little-endian int32."""
        return hashlib.sha256(np.array(self.token_ids, "<i4").tobytes()).hexdigest()

    def seed(self, base: int) -> int:
        """The seed of this answer: another for every problem and sample."""
        entropy = [base, self.problem.number, self.sample]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def prompt(
    problem: Problem, style: PromptStyle, examples: Sequence[Problem]
) -> str | list[dict[str, str]]:
    """A problem as a style asks it: text to be continued, or a conversation to be answered."""
    text = style.text(problem, examples)
    if not style.conversation:
        return text
    system = [] if style.system is None else [{"role": "system", "content": style.system}]
    return [*system, {"role": "user", "content": text}]


def question(
    problem: Problem, style: PromptStyle, examples: Sequence[Problem], tokenizer: Tokenizer
) -> Question:
    """A problem as a model gets it.

    Raises:
        MeshwenError: there is no chat template, or it fails: that is no fault of the answers.
    """
    asked = prompt(problem, style, examples)
    ids = tokenizer.encode(asked) if isinstance(asked, str) else tokenizer.encode_chat(asked)
    return Question(problem, tuple(ids))


def answer_all(
    engine: Engine,
    questions: Sequence[Question],
    style: PromptStyle,
    sampling: SamplingParams,
    run: RunFile,
    eos_token: str | None = None,
    progress: Callable[[int, int, int], None] = lambda done, right, tokens: None,
) -> None:
    """Answers every question that the run file has no answer to, and writes each as it is whole.

    Args:
        engine: the model's.
        questions: all of the run.
        style: how answers are found and graded.
        sampling: how to continue prompts; each answer has a seed made from `sampling.seed`.
        run: gets the answers.
        eos_token: the tokenizer's, for styles that stop at it.
        progress: called after each token: how many answers there are, how many are right, how
            many tokens this call has got.
    """
    began = time.perf_counter() - run.seconds
    sampling = replace(sampling, stop=style.stop_strings(eos_token), logprobs=True)
    open_ones = [q for q in questions if q.key not in run.records]
    pending, requests = [], []
    for one in open_ones:
        request = Request(one.token_ids, replace(sampling, seed=one.seed(sampling.seed)))
        error = _refusal(one, request, engine)
        if error is None:
            pending.append(one)
            requests.append(request)
        else:
            run.write(failed(one, error) | {"elapsed": run.seconds})
    answered = [run.records[one.key] for one in questions if one.key in run.records]
    done, right = len(answered), sum(record["correct"] for record in answered)
    for tokens, event in enumerate(engine.run(requests), start=1):
        if event.completion is not None:
            one, error = pending[event.request], event.completion.error
            record = failed(one, error) if error else graded(one, event.completion, style)
            run.write(record | {"elapsed": round(time.perf_counter() - began, 3)})
            done, right = done + 1, right + record["correct"]
        progress(done, right, tokens)


def summary(records: Iterable[Record]) -> dict[str, Any]:
    """What the answers come to.

    Returns:
        problems; answers; how many are correct; accuracy, the share of correct answers, and its 95%
        interval (Wilson's; with several samples a problem that of the problems' means, because
        answers to one problem are not independent); truncated answers; ids of those that failed;
        tokens; prompt_tokens, and cached_tokens, those of them that were found in the KV cache, of
        the answers that say so; and a hash of the tokens of all answers, in the order of the
        problems, by which runs that are not at hand can be told identical. With several samples
        also any_correct, problems with a correct answer, and majority_correct, those whose most
        frequent answer (the earliest, of several) is correct.
    """
    records = list(records)
    problems: dict[int, list[Record]] = {}
    for record in sorted(records, key=lambda r: (r["id"], r["sample"])):
        problems.setdefault(record["id"], []).append(record)
    right = sum(record["correct"] for record in records)
    found: dict[str, Any] = {
        "problems": len(problems),
        "answers": len(records),
        "correct": right,
        "accuracy": right / len(records) if records else 0.0,
        "interval": list(_interval(problems, right)),
        "truncated": sum(record["finish_reason"] == "length" for record in records),
        "failed": sorted({r["id"] for r in records if r["finish_reason"] == "error"}),
        "tokens": sum(len(record["tokens"]) for record in records),
        "prompt_tokens": sum(record.get("prompt_tokens", 0) for record in records),
        "cached_tokens": sum(record.get("cached_tokens", 0) for record in records),
        "tokens_sha256": _tokens_sha256(answer for some in problems.values() for answer in some),
    }
    if len(records) > len(problems):
        found["any_correct"] = sum(any(r["correct"] for r in some) for some in problems.values())
        found["majority_correct"] = sum(_majority(some)["correct"] for some in problems.values())
    return found


def _tokens_sha256(records: Iterable[Record]) -> str:
    """A hash of problem, sample, number of tokens and tokens, as little-endian int32."""
    digest = hashlib.sha256()
    for record in records:
        head = [record["id"], record["sample"], len(record["tokens"])]
        digest.update(np.array([*head, *record["tokens"]], "<i4").tobytes())
    return digest.hexdigest()


def _interval(problems: Mapping[int, Sequence[Record]], right: int) -> tuple[float, float]:
    if not problems:
        return 0.0, 1.0
    if all(len(some) == 1 for some in problems.values()):
        return wilson_interval(right, len(problems))
    return clustered_interval([[r["correct"] for r in some] for some in problems.values()])


def _majority(answers: Sequence[Record]) -> Record:
    """The first answer with the value that most have; answers without a value have no say."""
    votes = Counter(_value(answer) for answer in answers if answer["extracted"] is not None)
    most = votes.most_common(1)[0][0] if votes else None
    return next((a for a in answers if _value(a) == most), answers[0])


def _value(answer: Record) -> object:
    """Equal for answers of equal value: 1,000 is 1000.0."""
    text = answer["extracted"]
    found = None if text is None else number(text)
    return text if found is None else found


def data_sha256(problems: Iterable[Problem]) -> str:
    """A hash of all problems and their solutions."""
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(f"{problem.question}\0{problem.solution}\0".encode())
    return digest.hexdigest()


def _refusal(one: Question, request: Request, engine: Engine) -> str | None:
    try:
        engine.check(request, f"problem {one.problem.number}")
    except MeshwenError as error:
        return str(error)
    return None


def graded(one: Question, completion: Completion, style: PromptStyle) -> Record:
    """An answer for a run file, but for when it came."""
    answer = {"tokens": list(completion.tokens), "text": completion.text}
    return (
        _question_fields(one)
        | answer
        | _graded(one, completion.text, style)
        | {
            "finish_reason": completion.finish_reason,
            "logprob": math.fsum(completion.logprobs or ()),
            "prompt_tokens": len(completion.prompt_tokens),
            "cached_tokens": completion.cached_tokens,
            "seconds": round(completion.timings.running_seconds, 3),
        }
    )


def is_graded_so(one: Question, record: Record, style: PromptStyle) -> bool:
    """Whether an answer in a run file has the gold answer and the grade that it would get now."""
    expected = _graded(one, record["text"], style)
    if record["finish_reason"] == "error":
        expected |= {"extracted": None, "correct": False}
    return all(record[name] == expected[name] for name in ("gold", "extracted", "correct"))


def _graded(one: Question, text: str, style: PromptStyle) -> Record:
    gold = one.problem.gold
    extracted = {name: extract(text) for name, extract in style.extract.items()}
    graded = {name: style.equal(found, gold) for name, found in extracted.items()}
    counts = next(iter(style.extract))
    return {
        "extracted": extracted[counts],
        "gold": gold,
        "correct": graded[counts],
        "graded": graded,
    }


def failed(one: Question, error: str) -> Record:
    """What a run file has for a question that could not be asked, but for when."""
    return _question_fields(one) | {
        "tokens": [],
        "text": "",
        "extracted": None,
        "gold": one.problem.gold,
        "correct": False,
        "graded": {},
        "finish_reason": "error",
        "error": error,
        "logprob": None,
        "seconds": 0.0,
    }


def _question_fields(one: Question) -> Record:
    return {
        "id": one.problem.number,
        "sample": one.sample,
        "question": one.problem.question,
        "prompt_sha256": one.prompt_sha256,
    }
