# SPDX-License-Identifier: Apache-2.0
"""What an evaluation asks, and of which model: the options of every command that asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meshwen.cli import options
from meshwen.cli.console import note
from meshwen.cli.signatures import parameters_of, set_parameters
from meshwen.errors import MeshwenError

if TYPE_CHECKING:
    from meshwen.engine.sampling_params import SamplingParams
    from meshwen.evals.styles import Problem, PromptStyle

_DEMO = "demo"

Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="FILE",
        help="GSM8K's test.jsonl, or problems in its form. Default: the test split of the hub's "
        "openai/gsm8k; for the demo model, its own held-out problems.",
        show_default=False,
    ),
]
Train = Annotated[
    Path | None,
    typer.Option(
        "--train",
        metavar="FILE",
        help="GSM8K's train.jsonl, for prompt styles with solved examples. Default: the hub's.",
        show_default=False,
    ),
]
Style = Annotated[
    str | None,
    typer.Option(
        "--prompt-style",
        help="qwen-boxed, lm-eval, lm-eval-cot-zeroshot or demo. Default: demo for the demo model, "
        "lm-eval for base models (without a chat template, or which do not end turns of it), else "
        "qwen-boxed.",
        show_default=False,
    ),
]
Limit = Annotated[
    int | None, typer.Option("--limit", min=1, help="Only so many problems.", show_default=False)
]
Offset = Annotated[int, typer.Option("--offset", min=0, help="Leave out the first ones.")]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        "--max-tokens",
        "-n",
        min=1,
        help="Most tokens of an answer. Default: 256 for lm-eval's styles, as there; else 512.",
        show_default=False,
    ),
]
Temperature = Annotated[
    float, typer.Option("--temperature", "--temp", help="0: the likeliest token.")
]
Samples = Annotated[
    int,
    typer.Option(
        "--samples", min=1, help="Answers to each problem, each drawn with a seed of its own."
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Of what is drawn.")]


@dataclass(frozen=True)
class Asked:
    """What is evaluated, whatever the mesh and the numerics.

    Attributes:
        loading: options of `open_checkpoint`: model, load format, revision.
        dtype: of weights and products.
        quantization: of weights, if any.
        capacity: the most problems that are answered at once, and the most tokens of each.
        style: how problems are asked and graded.
        style_why: why in this style.
        sampling: how answers are drawn.
        samples: answers to each problem.
        problems: those to ask.
        data_sha256: of all problems of the data.
        examples: those that solved examples are drawn from.
    """

    loading: tuple[str, str, str | None]
    dtype: options.DType
    quantization: options.Quantization | None
    capacity: tuple[int, int | None]
    style: PromptStyle
    style_why: str
    sampling: SamplingParams
    samples: int
    problems: Sequence[Problem]
    data_sha256: str
    examples: Sequence[Problem]

    @cached_property
    def weights_sha256(self) -> str:
        """Of the model's weights, which a folder's name does not tell; read once for all meshes."""
        from meshwen.checkpoints import open_checkpoint
        from meshwen.engine.agreement import same_weights

        name, load_format, revision = self.loading
        with open_checkpoint(name, load_format=load_format, revision=revision) as checkpoint:
            return same_weights(checkpoint)


def _asked(
    model: options.Model = _DEMO,
    dtype: options.Dtype = options.DType.BFLOAT16,
    quantization: options.QuantizationOption = None,
    load_format: options.LoadFormatOption = options.LoadFormat.AUTO,
    revision: options.Revision = None,
    data: Data = None,
    train: Train = None,
    prompt_style: Style = None,
    limit: Limit = None,
    offset: Offset = 0,
    max_num_seqs: options.MaxNumSeqs = 32,
    max_model_len: options.MaxModelLen = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = 0.0,
    samples: Samples = 1,
    seed: Seed = 0,
) -> Asked:
    """Reads and checks what can be before any weight is; its parameters are options."""
    from meshwen.engine.sampling_params import SamplingParams
    from meshwen.evals.gsm8k import data_sha256
    from meshwen.evals.styles import prompt_style as style_of
    from meshwen.parallel.distributed import shared

    loading = (model, load_format, revision)
    name, why = shared("style", lambda: _style(prompt_style, loading))
    style = style_of(name)
    longest = style.max_new_tokens if max_new_tokens is None else max_new_tokens
    sampling = SamplingParams(max_new_tokens=longest, temperature=temperature, seed=seed)
    if samples > 1 and temperature == 0:
        raise MeshwenError("--samples needs a --temperature: at 0, all of them are the same")
    problems = _together("problems", lambda: _problems(data, loading))
    examples = _together("examples", lambda: _examples(train, style))
    chosen = problems[offset : None if limit is None else offset + limit]
    if not chosen:
        raise MeshwenError(f"--offset {offset} leaves none of the {len(problems)} problems")
    digest, capacity = data_sha256(problems), (max_num_seqs, max_model_len)
    return Asked(
        loading,
        dtype,
        quantization,
        capacity,
        style,
        why,
        sampling,
        samples,
        chosen,
        digest,
        examples,
    )


def evaluating(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command with `_asked`'s options, which gets what comes of them as its first argument."""
    asked = parameters_of(_asked)
    _, *own = parameters_of(command)

    @wraps(command)
    def run(**given: Any) -> Any:
        return command(_asked(**{p.name: given.pop(p.name) for p in asked}), **given)

    set_parameters(run, [*own, *asked])
    return run


def _style(given: str | None, loading: tuple[str, str, str | None]) -> tuple[str, str]:
    """The name of the prompt style, and why it is this one."""
    from meshwen.checkpoints import open_checkpoint
    from meshwen.evals.default_style import default_style
    from meshwen.tokenizer.tokenizer import Tokenizer

    if given is not None:
        return given, "asked for"
    model, load_format, revision = loading
    if model == _DEMO:
        return _DEMO, "the demo model's own"
    with open_checkpoint(model, load_format=load_format, revision=revision) as checkpoint:
        name, why = default_style(checkpoint, Tokenizer.from_checkpoint(checkpoint))
    note(f"prompt style {name}: {why}")
    return name, why


def _together(name: str, read: Callable[[], Sequence[Problem]]) -> Sequence[Problem]:
    """Process 0 alone reads them: what it asks, all ask."""
    from meshwen.evals.styles import Problem
    from meshwen.parallel.distributed import shared

    return [Problem(**one) for one in shared(name, lambda: [asdict(one) for one in read()])]


def _problems(data: Path | None, loading: tuple[str, str, str | None]) -> Sequence[Problem]:
    from meshwen import demo
    from meshwen.checkpoints import open_checkpoint
    from meshwen.evals.problems import hub_problems, read_problems

    if data is not None:
        return read_problems(data)
    model, load_format, revision = loading
    if model == _DEMO:
        return read_problems(demo.path() / "heldout.jsonl")
    with open_checkpoint(model, load_format=load_format, revision=revision):
        pass  # A model that is not there is to be heard of before the hub is asked for data.
    return hub_problems("test")


def _examples(train: Path | None, style: PromptStyle) -> Sequence[Problem]:
    from meshwen.evals.problems import hub_problems, read_problems

    if not style.shots:
        if train is not None:
            raise MeshwenError(f"prompt style {style.name} has no solved examples: no --train")
        return []
    if train is not None:
        return read_problems(train)
    try:
        return hub_problems("train")
    except MeshwenError as error:
        raise MeshwenError(
            f"prompt style {style.name} shows solved examples, --train or the hub's: {error}; "
            "--prompt-style qwen-boxed needs none"
        ) from None
