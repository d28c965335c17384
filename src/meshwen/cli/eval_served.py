# SPDX-License-Identifier: Apache-2.0
"""One evaluation of a model that a server has: its run file, and what that lacks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import meshwen
from meshwen.cli.console import note, progress_bar
from meshwen.cli.eval_options import Asked
from meshwen.errors import MeshwenError

if TYPE_CHECKING:
    from meshwen.client.server import Server
    from meshwen.evals.gsm8k import Question
    from meshwen.evals.run_file import RunFile
    from meshwen.evals.served import Prompt, ServedModel
    from meshwen.evals.styles import PromptStyle


def score_server(
    asked: Asked, server: Server, out: Path, resume: bool
) -> tuple[RunFile, dict[str, Any]]:
    """Asks what the run file lacks: the run, of the problems asked alone, and its summary."""
    from meshwen.evals.gsm8k import summary
    from meshwen.evals.run_file import RunFile
    from meshwen.evals.served import ServedModel, answer_from_server
    from meshwen.parallel.distributed import process_count

    if process_count() > 1:
        raise MeshwenError("--url asks a server from one process: leave out --coordinator")
    model = ServedModel.met(server, asked.model, asked.style.conversation)
    if not model.told_tokens:
        note(f"{server.url} does not tell the ids of tokens: runs are compared by their texts")
    questions = _questions(asked)
    run = RunFile.begin(out, _settings(asked, model), resume=resume)
    _check_answers(run, [one for one, _ in questions], asked.style)
    before = sum(one.key in run.records for one, _ in questions)
    started = time.perf_counter()
    try:
        with progress_bar("answering") as bar:
            answer_from_server(
                model,
                questions,
                asked.style,
                asked.sampling,
                run,
                asked.concurrency,
                lambda done, right, tokens: bar(
                    done,
                    len(questions),
                    f"{right} of {done} right, "
                    f"{tokens / (time.perf_counter() - started):.0f} tokens/s",
                ),
            )
    except BaseException:
        note(f"{len(run.records)} answers are saved in {run.path}; go on with --resume")
        raise
    finally:
        run.close()
    run = replace(run, records={one.key: run.records[one.key] for one, _ in questions})
    found = summary(run.records.values())
    return run, found | {"seconds": round(run.seconds, 1), "answers_from_before": before}


def _questions(asked: Asked) -> list[tuple[Question, Prompt]]:
    """Every problem and sample, with its prompt."""
    from meshwen.evals.gsm8k import Question, prompt
    from meshwen.evals.styles import shots

    solved = shots(asked.style, asked.examples, asked.problems[-1].number + 1)
    return [
        (Question(problem, (), sample), prompt(problem, asked.style, solved[problem.number]))
        for problem in asked.problems
        for sample in range(asked.samples)
    ]


def _settings(asked: Asked, model: ServedModel) -> dict[str, Any]:
    """What a run file says of how its answers came to be."""
    from meshwen.evals.gsm8k import data_sha256

    style, sampling = asked.style, asked.sampling
    return {
        "model": asked.model,
        "mesh": "server",
        "server": model.fingerprint or model.server.url,
        "meshwen": meshwen.__version__,
        "token_ids": model.told_tokens,
        "prompt_style": style.name,
        "prompt_style_why": asked.style_why,
        "grading": style.grading,
        "data_sha256": asked.data_sha256,
        "train_sha256": data_sha256(asked.examples) if asked.examples else None,
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "samples": asked.samples,
        "seed": sampling.seed,
    }


def _check_answers(run: RunFile, questions: Sequence[Question], style: PromptStyle) -> None:
    """Refuses answers so far that are graded otherwise than they would be now."""
    from meshwen.evals.gsm8k import is_graded_so

    for one in questions:
        before = run.records.get(one.key)
        if before is not None and not is_graded_so(one, before, style):
            raise MeshwenError(
                f"{run.path}: the answer to problem {one.problem.number} is not graded as its text "
                "would be: the file was edited or damaged, or the rules have changed; give another"
            )
