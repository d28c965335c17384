# SPDX-License-Identifier: Apache-2.0
"""What an evaluation asks, and of which model: the options of every command that asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meshwen.cli import options
from meshwen.cli.console import note
from meshwen.cli.load import opened
from meshwen.cli.option_groups import group, with_groups
from meshwen.cli.served import AskedServer, ModelOrServed, asked_server, refuse_engine
from meshwen.common.choices import PROMPT_STYLES
from meshwen.common.option_fields import Option
from meshwen.engine.options import EngineOptions
from meshwen.engine.sampling_params import SamplingParams
from meshwen.errors import MeshwenError

if TYPE_CHECKING:
    from meshwen.client.server import Server
    from meshwen.evals.styles import Problem, PromptStyle

_DEMO = "demo"
_CONVERSATION = "qwen-boxed"
_AT_A_TIME = 32

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
    options.declared(
        Option(
            "How problems are asked and answers graded. Default: demo for the demo model, lm-eval "
            "for base models (no chat template, or no end token that ends its turns), else "
            "qwen-boxed.",
            choices=PROMPT_STYLES,
        ),
        "--prompt-style",
        show_default=False,
    ),
]
Limit = Annotated[
    int | None,
    options.declared(
        Option("Ask at most this many problems.", int, least=1), "--limit", show_default=False
    ),
]
Offset = Annotated[
    int, options.declared(Option("Skip this many problems.", int, least=0), "--offset")
]
Samples = Annotated[
    int,
    options.declared(
        Option("Answers to each problem, each drawn with a seed of its own.", int, least=1),
        "--samples",
    ),
]
Concurrency = Annotated[
    int,
    options.declared(
        Option("With --url, requests at a time.", int, least=1, most=1024), "--concurrency"
    ),
]
_DRAWING = group(
    dict,
    {
        "max_new_tokens": options.flag(
            SamplingParams,
            "max_new_tokens",
            default=None,
            help="Most tokens of an answer. Default: 256 for lm-eval's styles, as in the harness; "
            "else 512.",
        ),
        "temperature": options.flag(
            SamplingParams, "temperature", help="0 takes the likeliest token."
        ),
        "seed": options.flag(SamplingParams, "seed", help="The same seed draws the same answers."),
    },
)


@dataclass(frozen=True)
class Asked:
    """What is evaluated.

    Attributes:
        model: its name.
        engine: how it is loaded and run; where there are several meshes, but for the mesh.
        style: how problems are asked and graded.
        style_why: why in this style.
        sampling: how answers are drawn.
        samples: answers to each problem.
        problems: those to ask.
        data_sha256: of all problems of the data.
        examples: those that solved examples are drawn from.
        server: that has the model; None: it is to be loaded.
        concurrency: requests to the server at a time.
    """

    model: str
    engine: EngineOptions
    style: PromptStyle
    style_why: str
    sampling: SamplingParams
    samples: int
    problems: Sequence[Problem]
    data_sha256: str
    examples: Sequence[Problem]
    server: Server | None = None
    concurrency: int = 1

    @cached_property
    def weights_sha256(self) -> str:
        """Of the model's weights, which a folder's name does not tell; read once for all meshes."""
        from meshwen.engine.agreement import same_weights

        with opened(self.model, self.engine) as checkpoint:
            return same_weights(checkpoint)


def asking(*names: str, served: bool = False, **defaults: Any) -> Callable[..., Asked]:
    """The group of options of every command that asks: the command gets `Asked`.

    Args:
        names: fields of `EngineOptions` that are options beside those of all these commands.
        served: whether a server may be asked.
        defaults: the same, with other defaults.
    """
    shared = "dtype", "quantization", "load_format", "revision", *options.MEMORY
    engine = options.engine_options(
        *shared, "max_num_batched_tokens", *names, max_num_seqs=_AT_A_TIME, **defaults
    )
    model = (ModelOrServed, None) if served else (options.Model, _DEMO)
    return with_groups(
        model=group(lambda model: model, {"model": model}),
        engine=engine,
        drawing=_DRAWING,
        server=with_groups(server=asked_server)(_served) if served else _not_served,
    )(_asked)


def _served(
    server: AskedServer | None, concurrency: Concurrency = _AT_A_TIME
) -> tuple[AskedServer, int] | None:
    """The server to ask, and how many requests at a time. Its parameters are options."""
    return None if server is None else (server, concurrency)


def _not_served() -> None:
    """No server may be asked."""


def _asked(
    model: str | None,
    *,
    engine: EngineOptions,
    data: Data = None,
    train: Train = None,
    prompt_style: Style = None,
    limit: Limit = None,
    offset: Offset = 0,
    drawing: Mapping[str, Any],
    samples: Samples = 1,
    server: tuple[AskedServer, int] | None,
) -> Asked:
    """Reads and checks what can be before any weight is; its parameters are options."""
    from meshwen.evals.gsm8k import data_sha256
    from meshwen.evals.styles import prompt_style as style_of
    from meshwen.parallel.distributed import shared

    connected = None
    if server is None:
        loaded = model = model or _DEMO
        name, why = shared("style", lambda: _style(prompt_style, loaded, engine))
    else:
        refuse_engine(engine, EngineOptions(max_num_seqs=_AT_A_TIME))
        connected = server[0].connect()
        model = connected.model(model)
        name, why = _served_style(prompt_style, model)
    style = style_of(name)
    given = {name: value for name, value in drawing.items() if value is not None}
    with options.naming_flags(given):
        sampling = SamplingParams(**{"max_new_tokens": style.max_new_tokens} | given)
    if samples > 1 and sampling.temperature == 0:
        raise MeshwenError("--samples needs a --temperature: at 0, all of them are the same")
    problems = _together("problems", lambda: _problems(data, model, None if connected else engine))
    examples = _together("examples", lambda: _examples(train, style))
    chosen = problems[offset : None if limit is None else offset + limit]
    if not chosen:
        raise MeshwenError(
            f"--offset must be below {len(problems)}, the number of problems, not {offset}"
        )
    return Asked(
        model=model,
        engine=engine,
        style=style,
        style_why=why,
        sampling=sampling,
        samples=samples,
        problems=chosen,
        data_sha256=data_sha256(problems),
        examples=examples,
        server=connected,
        concurrency=server[1] if server else 1,
    )


def _style(given: str | None, model: str, engine: EngineOptions) -> tuple[str, str]:
    """The name of the prompt style, and why it is this one."""
    from meshwen.evals.default_style import default_style
    from meshwen.tokenizer.tokenizer import Tokenizer

    if given is not None:
        return given, "asked for"
    if model == _DEMO:
        return _DEMO, "the demo model's own"
    with opened(model, engine) as checkpoint:
        name, why = default_style(checkpoint, Tokenizer.from_checkpoint(checkpoint))
    note(f"prompt style {name}: {why}")
    return name, why


def _served_style(given: str | None, model: str) -> tuple[str, str]:
    """The same for a server's model, whose tokenizer is not at hand."""
    if given is not None:
        return given, "asked for"
    if model == _DEMO:
        return _DEMO, "the demo model's own"
    note(f"prompt style {_CONVERSATION}: that of models that converse")
    return _CONVERSATION, "the default for a server's model"


def _together(name: str, read: Callable[[], Sequence[Problem]]) -> Sequence[Problem]:
    """Process 0 alone reads them: what it asks, all ask."""
    from meshwen.evals.styles import Problem
    from meshwen.parallel.distributed import shared

    return [Problem(**one) for one in shared(name, lambda: [asdict(one) for one in read()])]


def _problems(data: Path | None, model: str, engine: EngineOptions | None) -> Sequence[Problem]:
    from meshwen import demo
    from meshwen.evals.problems import hub_problems, read_problems

    if data is not None:
        return read_problems(data)
    if model == _DEMO:
        return read_problems(demo.path() / "heldout.jsonl")
    if engine is not None:
        with opened(model, engine):
            pass  # A model that is not there is to be heard of before the hub is asked for data.
    return hub_problems("test")


def _examples(train: Path | None, style: PromptStyle) -> Sequence[Problem]:
    from meshwen.evals.problems import hub_problems, read_problems

    if not style.shots:
        if train is not None:
            raise MeshwenError(
                f"prompt style {style.name} has no solved examples: leave out --train"
            )
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
