# SPDX-License-Identifier: Apache-2.0
"""GSM8K: asks a model every problem, grades the answers, and sums up."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from meshwen.engine import Engine
from meshwen.errors import MeshwenError
from meshwen.evals.run_file import Record, RunFile
from meshwen.evals.statistics import wilson_interval
from meshwen.evals.styles import Problem, PromptStyle
from meshwen.request import Completion, Request
from meshwen.sampling import SamplingParams
from meshwen.tokenizer import Tokenizer


@dataclass(frozen=True)
class Question:
    """A problem as the model gets it.

    Attributes:
        problem: the problem.
        token_ids: the prompt; () where it has none.
        error: why there is no prompt.
    """

    problem: Problem
    token_ids: tuple[int, ...]
    error: str | None = None


def question(
    problem: Problem, style: PromptStyle, examples: Sequence[Problem], tokenizer: Tokenizer
) -> Question:
    """The prompt of a problem; one that cannot be made is an answer that is wrong, not dropped."""
    text = style.text(problem, examples)
    try:
        if not style.conversation:
            return Question(problem, tuple(tokenizer.encode(text)))
        system = [] if style.system is None else [{"role": "system", "content": style.system}]
        messages = [*system, {"role": "user", "content": text}]
        return Question(problem, tuple(tokenizer.encode_chat(messages)))
    except MeshwenError as error:
        return Question(problem, (), str(error))


def answer_all(
    engine: Engine,
    questions: Sequence[Question],
    style: PromptStyle,
    sampling: SamplingParams,
    run: RunFile,
    progress: Callable[[int, int, int], None] = lambda done, right, total: None,
) -> None:
    """Answers every question that the run file has no answer to, and writes each as it is whole.

    Args:
        engine: the model's.
        questions: all of the run.
        style: how answers are found and graded.
        sampling: how to continue prompts.
        run: gets the answers.
        progress: told how many answers there are, how many are right, and how many there will be.
    """
    sampling = replace(sampling, stop=style.stop, logprobs=True)
    open_ones = [q for q in questions if q.problem.number not in run.records]
    asked = []
    for one in open_ones:
        error = one.error or _refusal(one, engine)
        if error is None:
            asked.append(one)
        else:
            run.write(_failed(one, error))
    numbers = {one.problem.number for one in questions}
    answered = [record for number, record in run.records.items() if number in numbers]
    done, right = len(answered), sum(record["correct"] for record in answered)
    requests = [Request(one.token_ids, sampling) for one in asked]
    for number, completion in _completions(engine, requests):
        record = _record(asked[number], completion, style)
        run.write(record)
        done, right = done + 1, right + record["correct"]
        progress(done, right, len(questions))


def summary(records: Iterable[Record]) -> dict[str, Any]:
    """What the answers come to.

    Returns:
        problems, correct, accuracy and its 95% interval (Wilson), truncated and failed answers,
        tokens.
    """
    records = list(records)
    right = sum(record["correct"] for record in records)
    low, high = wilson_interval(right, len(records)) if records else (0.0, 1.0)
    return {
        "problems": len(records),
        "correct": right,
        "accuracy": right / len(records) if records else 0.0,
        "interval": [low, high],
        "truncated": sum(record["finish_reason"] == "length" for record in records),
        "failed": [record["id"] for record in records if record["finish_reason"] == "error"],
        "tokens": sum(len(record["tokens"]) for record in records),
    }


def data_sha256(problems: Iterable[Problem]) -> str:
    """A hash of all problems and their solutions."""
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(f"{problem.question}\0{problem.solution}\0".encode())
    return digest.hexdigest()


def _refusal(one: Question, engine: Engine) -> str | None:
    try:
        engine.check(one.token_ids, f"problem {one.problem.number}")
    except MeshwenError as error:
        return str(error)
    return None


def _completions(engine: Engine, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
    for event in engine.run(requests) if requests else ():
        if event.completion is not None:
            yield event.request, event.completion


def _record(one: Question, completion: Completion, style: PromptStyle) -> Record:
    gold = one.problem.gold
    extracted = {name: extract(completion.text) for name, extract in style.extract.items()}
    graded = {name: style.equal(found, gold) for name, found in extracted.items()}
    counts = next(iter(style.extract))
    return _asked(one) | {
        "tokens": list(completion.tokens),
        "text": completion.text,
        "extracted": extracted[counts],
        "gold": gold,
        "correct": graded[counts],
        "graded": graded,
        "finish_reason": completion.finish_reason,
        "logprob": math.fsum(completion.logprobs or ()),
        "seconds": round(completion.timings.running_seconds, 3),
    }


def _failed(one: Question, error: str) -> Record:
    return _asked(one) | {
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


def _asked(one: Question) -> Record:
    prompt = np.array(one.token_ids, "<i4").tobytes()
    return {"id": one.problem.number, "prompt_sha256": hashlib.sha256(prompt).hexdigest()}
