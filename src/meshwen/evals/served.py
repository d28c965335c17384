# SPDX-License-Identifier: Apache-2.0
"""Asks a server every problem: the same prompts, sampling and grading as for a loaded model."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any, NotRequired

from typing_extensions import TypedDict

from meshwen.client.server import RefusedError, Server
from meshwen.common.json_files import Count, Finite, TokenId, check_shape, to_json
from meshwen.engine.request import Completion, Timings
from meshwen.engine.sampling_params import SamplingParams
from meshwen.errors import MeshwenError
from meshwen.evals.gsm8k import Question, failed, graded
from meshwen.evals.run_file import Record, RunFile
from meshwen.evals.styles import PromptStyle

Prompt = str | list[dict[str, str]]


class _Message(TypedDict):
    content: NotRequired[str | None]


class _Logprob(TypedDict):
    logprob: Finite


class _Logprobs(TypedDict):
    content: NotRequired[list[_Logprob] | None]
    token_logprobs: NotRequired[list[Finite | None] | None]


class _Choice(TypedDict):
    message: NotRequired[_Message]
    text: NotRequired[str]
    finish_reason: NotRequired[str | None]
    logprobs: NotRequired[_Logprobs | None]
    token_ids: NotRequired[list[TokenId] | None]
    prompt_token_ids: NotRequired[list[TokenId] | None]


class _Details(TypedDict):
    cached_tokens: NotRequired[Count | None]


class _Usage(TypedDict):
    completion_tokens: NotRequired[Count]
    prompt_tokens: NotRequired[Count]
    prompt_tokens_details: NotRequired[_Details | None]


class _Answer(TypedDict):
    choices: list[_Choice]
    usage: NotRequired[_Usage | None]
    prompt_token_ids: NotRequired[list[TokenId] | None]
    system_fingerprint: NotRequired[str | None]


# What is asked for beside OpenAI's fields, as far as a server takes it; the first set that it does.
_BEYOND: tuple[tuple[str, ...], ...] = (
    ("return_token_ids", "repetition_penalty", "top_k", "min_p", "logprobs"),
    ("logprobs",),
    (),
)


@dataclass(frozen=True)
class ServedModel:
    """A model of a server, and which fields of requests the server takes.

    Attributes:
        server: the server.
        name: of the model.
        chats: whether it is asked in conversations; else texts are continued.
        fields: beside OpenAI's, those that it takes.
        told_tokens: whether it tells the ids of tokens.
        fingerprint: what it says of itself, if anything.
    """

    server: Server
    name: str
    chats: bool
    fields: tuple[str, ...] = ()
    told_tokens: bool = False
    fingerprint: str | None = None

    @classmethod
    def met(cls, server: Server, name: str, chats: bool) -> ServedModel:
        """A model whose server was asked for a token, to learn what it takes.

        Raises:
            MeshwenError: it gives none.
        """
        prompt: Prompt = [{"role": "user", "content": "Hi"}] if chats else "Hi"
        for fields in _BEYOND:
            model = cls(server, name, chats, fields)
            try:
                found = model.ask(prompt, SamplingParams(max_new_tokens=1))
            except RefusedError as error:
                if error.status not in (400, 422) or not fields:
                    raise
            else:
                told = bool(found["choices"][0].get("token_ids"))
                return replace(model, told_tokens=told, fingerprint=found.get("system_fingerprint"))
        raise AssertionError("the last set of fields is empty")

    def ask(self, prompt: Prompt, sampling: SamplingParams) -> _Answer:
        """The server's answer. Raises MeshwenError where there is none."""
        path = "/chat/completions" if self.chats else "/completions"
        body: dict[str, Any] = {
            "model": self.name,
            "messages" if self.chats else "prompt": prompt,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        values = {
            "return_token_ids": True,
            # What a checkpoint's defaults would add is none of an evaluation's.
            "repetition_penalty": sampling.repetition_penalty,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "logprobs": True if self.chats else 1,
        }
        body |= {name: values[name] for name in self.fields}
        where = f"{self.server.url}/v1{path}"
        found = check_shape(self.server.post(path, body), _Answer, where)
        if not found["choices"]:
            raise MeshwenError(f"{where} gave no answer")
        return found


def answer_from_server(
    model: ServedModel,
    questions: Sequence[tuple[Question, Prompt]],
    style: PromptStyle,
    sampling: SamplingParams,
    run: RunFile,
    concurrency: int,
    progress: Callable[[int, int, int], None] = lambda done, right, tokens: None,
) -> None:
    """Asks every question that the run file has no answer to, and writes each as it is whole.

    Args:
        model: answers.
        questions: all of the run, each with its prompt.
        style: how answers are found and graded.
        sampling: how to continue prompts; each answer has a seed made from `sampling.seed`.
        run: gets the answers.
        concurrency: requests at a time.
        progress: called after each answer: how many there are, how many are right, how many
            tokens this call has got.

    Raises:
        MeshwenError: the server gives no answers any more; what came before is in the file.
    """
    began = time.perf_counter() - run.seconds
    sampling = replace(sampling, stop=style.stop_strings(None))
    before = [run.records[one.key] for one, _ in questions if one.key in run.records]
    done, right, tokens = len(before), sum(record["correct"] for record in before), 0
    pool = ThreadPoolExecutor(concurrency)
    try:
        asked = [
            pool.submit(_answered, model, one, prompt, style, sampling)
            for one, prompt in questions
            if one.key not in run.records
        ]
        for one in as_completed(asked):
            record, count = one.result()
            run.write(record | {"elapsed": round(time.perf_counter() - began, 3)})
            done, right, tokens = done + 1, right + record["correct"], tokens + count
            progress(done, right, tokens)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _answered(
    model: ServedModel, one: Question, prompt: Prompt, style: PromptStyle, sampling: SamplingParams
) -> tuple[Record, int]:
    """One answer for the run file, but for when it came, and how many tokens it has."""
    began = time.perf_counter()
    try:
        found = model.ask(prompt, replace(sampling, seed=one.seed(sampling.seed)))
    except RefusedError as error:
        if error.status != 400:  # The question cannot be asked: its prompt is too long.
            raise
        return failed(one, str(error)) | _prompt_fields(prompt, ()), 0
    choice = found["choices"][0]
    ids = tuple(found.get("prompt_token_ids") or choice.get("prompt_token_ids") or ())
    completion = Completion(
        prompt_tokens=ids,
        tokens=tuple(choice.get("token_ids") or ()),
        text=choice.get("message", {}).get("content") or choice.get("text") or "",
        finish_reason="length" if choice.get("finish_reason") == "length" else "stop",
        logprobs=_logprobs(choice.get("logprobs")),
        timings=Timings(0.0, time.perf_counter() - began, 0.0),
    )
    record = graded(replace(one, token_ids=ids), completion, style)
    usage: _Usage = found.get("usage") or {}
    details: _Details = usage.get("prompt_tokens_details") or {}
    count = len(completion.tokens) or usage.get("completion_tokens", 0)
    return (
        record
        | _prompt_fields(prompt, ids)
        | {
            "prompt_tokens": usage.get("prompt_tokens", len(ids)),
            "cached_tokens": details.get("cached_tokens") or 0,
            "logprob": None if completion.logprobs is None else math.fsum(completion.logprobs),
        },
        count,
    )


def _prompt_fields(prompt: Prompt, ids: Sequence[int]) -> Record:
    """What stands for a prompt whose tokens the server does not tell."""
    if ids:
        return {}
    return {"prompt_sha256": hashlib.sha256(to_json(prompt).encode()).hexdigest()}


def _logprobs(found: _Logprobs | None) -> tuple[float, ...] | None:
    """Those of an answer's tokens, in the shape of chats or of completions."""
    if not found:
        return None
    if content := found.get("content"):
        return tuple(one["logprob"] for one in content)
    given = found.get("token_logprobs")
    return None if given is None else tuple(one for one in given if one is not None)
