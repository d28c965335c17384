# SPDX-License-Identifier: Apache-2.0
"""One evaluation on one mesh: its run file, and what that lacks."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import meshwen
from meshwen.cli.console import note, progress_bar
from meshwen.cli.eval_options import Asked
from meshwen.cli.load import load_model, opened
from meshwen.engine.options import EngineOptions
from meshwen.errors import MeshwenError

if TYPE_CHECKING:
    from meshwen.checkpoints import Checkpoint
    from meshwen.evals.gsm8k import Question
    from meshwen.evals.run_file import Record, RunFile
    from meshwen.evals.styles import PromptStyle
    from meshwen.models.parallel_model import ParallelModel


@dataclass(frozen=True)
class Evaluation:
    """An evaluation on one mesh.

    Attributes:
        asked: what is evaluated.
        engine: how the model is loaded and run.
        questions: of every problem and sample.
        run: the run file, with the answers so far.
    """

    asked: Asked
    engine: EngineOptions
    questions: Sequence[Question]
    run: RunFile

    @classmethod
    def begin(cls, asked: Asked, engine: EngineOptions, out: Path, resume: bool) -> Self:
        """Refuses what can be refused before any weight is read, and opens the run file."""
        from meshwen.evals.gsm8k import question
        from meshwen.evals.styles import shots
        from meshwen.tokenizer.tokenizer import Tokenizer

        style = asked.style
        with opened(asked.model, engine) as checkpoint:
            model = engine.parallel_model(checkpoint.config)
            tokenizer = Tokenizer.from_checkpoint(checkpoint)
            if tokenizer is None:
                raise MeshwenError(
                    f"{checkpoint.name} has no tokenizer: it cannot be asked a problem"
                )
            solved = shots(style, asked.examples, asked.problems[-1].number + 1)
            once = [question(p, style, solved[p.number], tokenizer) for p in asked.problems]
            questions = [replace(one, sample=k) for one in once for k in range(asked.samples)]
            settings = _settings(asked, engine, checkpoint, model)
        run = _begin(out, settings, resume)
        _check_answers(run, questions, style)
        return cls(asked, engine, questions, run)

    def finish(self) -> tuple[RunFile, dict[str, Any]]:
        """Asks what the run file lacks: the run, of the problems asked alone, and its summary."""
        from meshwen.evals.gsm8k import answer_all, summary
        from meshwen.tokenizer.tokenizer import Tokenizer

        asked, run, questions = self.asked, self.run, self.questions
        before = sum(one.key in run.records for one in questions)
        with opened(asked.model, self.engine) as checkpoint:
            loaded = load_model(checkpoint, Tokenizer.from_checkpoint(checkpoint), self.engine)
        started = time.perf_counter()
        try:
            with progress_bar("answering") as bar:
                answer_all(
                    loaded.engine,
                    questions,
                    asked.style,
                    asked.sampling,
                    run,
                    loaded.tokenizer.eos_token if loaded.tokenizer else None,
                    lambda done, right, tokens: bar(
                        done,
                        len(questions),
                        f"{right} of {done} right, "
                        f"{tokens / (time.perf_counter() - started):.0f} tokens/s",
                    ),
                )
        except KeyboardInterrupt:
            note(f"{len(run.records)} answers are saved in {run.path}; go on with --resume")
            raise
        run.close()
        run = replace(run, records={one.key: run.records[one.key] for one in questions})
        found = summary(run.records.values())
        return run, found | {"seconds": round(run.seconds, 1), "answers_from_before": before}


def _settings(
    asked: Asked, engine: EngineOptions, checkpoint: Checkpoint, model: ParallelModel
) -> dict[str, Any]:
    """What a run file says of how its answers came to be."""
    import jax

    from meshwen.evals.gsm8k import data_sha256
    from meshwen.ops.numerics.exact import Exact
    from meshwen.parallel.mesh import mesh_label

    style, sampling = asked.style, asked.sampling
    return {
        "model": checkpoint.name,
        "weights_sha256": asked.weights_sha256,
        "revision": engine.revision,
        "load_format": engine.load_format,
        "config_sha256": _sha256(checkpoint.config.to_dict(), checkpoint.generation_config),
        "meshwen": meshwen.__version__,
        "jax": jax.__version__,
        "mesh": mesh_label(model.mesh),
        "dtype": engine.dtype,
        "quantization": engine.quantization,
        "products": model.matmuls_by,
        "numerics": engine.numerics,
        **({"exact_version": Exact.version} if engine.numerics == "exact" else {}),
        "prompt_style": style.name,
        "prompt_style_why": asked.style_why,
        "grading": style.grading,
        "data_sha256": asked.data_sha256,
        "train_sha256": data_sha256(asked.examples) if asked.examples else None,
        "max_model_len": engine.max_model_len,
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "samples": asked.samples,
        "seed": sampling.seed,
    }


def _begin(out: Path, settings: Mapping[str, Any], resume: bool) -> RunFile:
    """The run file, which process 0 writes; the others keep the same answers in memory."""
    from meshwen.evals.run_file import RunFile, UnwrittenRun
    from meshwen.parallel.distributed import process_index, shared

    begun: list[RunFile] = []

    def begin() -> list[Record]:
        begun.append(RunFile.begin(out, settings, resume=resume))
        return list(begun[0].records.values())

    records = shared(f"answers in {out}", begin)
    return begun[0] if process_index() == 0 else UnwrittenRun.of(out, settings, records)


def _check_answers(run: RunFile, questions: Sequence[Question], style: PromptStyle) -> None:
    """Refuses answers so far to other prompts, or graded otherwise; and those of process 0."""
    from meshwen.evals.gsm8k import is_graded_so
    from meshwen.parallel.distributed import gathered

    for one in questions:
        before = run.records.get(one.key)
        if before is not None and before["prompt_sha256"] != one.prompt_sha256:
            raise MeshwenError(
                f"{run.path}: the prompt of problem {one.problem.number} was another: the model's "
                "tokenizer or chat template has changed; give another file"
            )
        if before is not None and not is_graded_so(one, before, style):
            raise MeshwenError(
                f"{run.path}: the answer to problem {one.problem.number} is not graded as its text "
                "would be: the file was edited or damaged, or the rules have changed; give another"
            )
    ours = _sha256([one.prompt_sha256 for one in questions])
    for index, theirs in enumerate(gathered(f"prompts of {run.path}", ours)):
        if theirs != ours:
            raise MeshwenError(
                f"process {index} makes other prompts than this one: its model is another"
            )


def _sha256(*content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
