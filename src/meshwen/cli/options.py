# SPDX-License-Identifier: Apache-2.0
"""The options that commands share, made from what declares them in Python.

`EngineOptions` and `SamplingParams` say what there is, with defaults, limits and help; this file
adds what is the command line's own: short forms of flags, and what stands for "not given".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meshwen.cli.option_groups import group
from meshwen.common.option_fields import Option, options_of
from meshwen.engine.options import EngineOptions
from meshwen.engine.sampling_params import SamplingParams
from meshwen.errors import MeshwenError
from meshwen.models.presets import PRESETS

if TYPE_CHECKING:
    from meshwen.parallel.mesh import MeshSpec

MODEL_HELP = (
    "A model folder, a .gguf file, a hub id such as Qwen/Qwen2.5-0.5B-Instruct, or demo. "
    f"With --load-format dummy also {', '.join(PRESETS)}."
)

# Other flags of an option, after its name.
_FLAGS = {
    "max_num_seqs": ("--batch-size",),
    "max_new_tokens": ("--max-tokens", "-n"),
    "temperature": ("--temp",),
}
# What is to be said of a sampling option on the command line alone.
_MORE_HELP = {
    "max_new_tokens": "Default, for this and the sampling options below: the checkpoint's "
    "generation_config.json; without one, 256.",
    "temperature": "Default without a generation_config.json: 0.",
    "seed": "Default: a fresh one, which is printed.",
    "stop": "May be given several times.",
    "stop_token_ids": "May be given several times.",
    "logprobs": "Needs --json.",
    "top_logprobs": "Needs --logprobs.",
}

# The options that say what is loaded, and how it lies on which devices.
LOADING = ("mesh", "dtype", "numerics", "quantization", "load_format", "revision")
# Those that say how much of it, and what of it, is computed in a step and kept in memory.
MEMORY = ("max_model_len", "kv_cache_memory", "prefix_caching")
BATCHING = ("max_num_seqs", "max_num_batched_tokens")
# Those that say how a text is continued.
SAMPLING = (
    *("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "seed", "stop"),
)

Model = Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)]
System = Annotated[
    str | None,
    typer.Option("--system", help="The system message.", show_default=False),
]
ChatTemplateKwargs = Annotated[
    str | None,
    typer.Option(
        "--chat-template-kwargs",
        metavar="JSON",
        help="Variables for the chat template, such as '{\"enable_thinking\": false}'.",
        show_default=False,
    ),
]
LoadPrefix = Annotated[
    Path | None,
    typer.Option(
        "--load-prefix",
        metavar="FILE",
        help="Put a prefix, which save_prefix of the Python API wrote, into the KV cache: prompts "
        "that begin with it are answered sooner.",
        show_default=False,
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def flag(kind: type, name: str, *, default: Any = ..., **changes: Any) -> tuple[Any, Any]:
    """The command-line option of a field of `EngineOptions` or `SamplingParams`.

    Args:
        kind: the dataclass.
        name: of the field.
        default: another default than the field's.
        changes: other fields of its `Option`, such as another help text.

    Returns:
        The annotation and the default of a parameter, as typer reads them.
    """
    one = replace(options_of(kind)[name], **changes)
    if default is ...:
        default = {f.name: f.default for f in fields(kind)}[name]
    shown = default is not None and default is not False
    flags = _flag(name), *_FLAGS.get(name, ())
    if default is True:
        flags = (f"{_flag(name)}/--no-{_flag(name)[2:]}",)
    declaration = declared(one, *flags, show_default=shown)
    annotation: Any = str if one.type is object else one.type
    if one.many:
        annotation = list[annotation]
    return Annotated[annotation | None if default is None else annotation, declaration], default


def declared(one: Option, *flags: str, **more: Any) -> Any:
    """A command-line option: its value is read, and refused, in the words of the Python API.

    Args:
        one: its help, and the values that are allowed.
        flags: the first is what errors call it.
        more: further arguments of `typer.Option`.
    """

    def read(text: Any) -> Any:
        return one.read(flags[0], text)

    limited = bool(one.choices) or one.type in (int, float)
    return typer.Option(
        *flags,
        help=one.help,
        metavar=_metavar(one),
        autocompletion=(lambda: [*one.choices]) if one.choices else None,
        parser=read if limited else None,
        **more,
    )


def engine_options(*names: str, **defaults: Any) -> Callable[..., EngineOptions]:
    """A group of options of which a command gets `EngineOptions`.

    Args:
        names: the fields that are options; the others have their defaults.
        defaults: further ones, with other defaults.
    """
    options = {name: flag(EngineOptions, name) for name in names}
    options |= {name: flag(EngineOptions, name, default=new) for name, new in defaults.items()}
    order = [name for name in options_of(EngineOptions) if name in options]
    return group(_checked_engine, {name: options[name] for name in order})


def _checked_engine(**given: Any) -> EngineOptions:
    """The options, with a mesh that parses; its devices are looked for by `make_mesh`."""
    with naming_flags(given):
        options = EngineOptions(**given)
        if given.get("mesh", EngineOptions.mesh) != EngineOptions.mesh:
            from meshwen.parallel.mesh import MeshSpec  # Imports JAX.

            MeshSpec.parse(given["mesh"])
    return options


def one_option(kind: type, name: str, **changes: Any) -> Callable[..., Any]:
    """A single option with another default or help, or further choices; arguments as `flag`'s."""
    return group(lambda **given: given[name], {name: flag(kind, name, **changes)})


def sampling_options(*names: str) -> Callable[..., Mapping[str, Any]]:
    """A group of the sampling options: a command gets them by name, None where not given."""
    options = {}
    for name, one in options_of(SamplingParams).items():
        if name in names:
            text = f"{one.help} {_MORE_HELP.get(name, '')}".rstrip()
            default = False if one.type is bool else None
            options[name] = flag(SamplingParams, name, default=default, help=text)
    return group(_checked_sampling, options)


def _checked_sampling(**given: Any) -> Mapping[str, Any]:
    """What was given, unless it is impossible: that is to be heard before anything is loaded."""
    with naming_flags(given):
        SamplingParams.from_generation_config({}, **given)
    return given


@contextmanager
def naming_flags(names: Iterable[str]) -> Iterator[None]:
    """Calls an option by its flag in an error that begins with its name in Python."""
    try:
        yield
    except MeshwenError as error:
        name, _, what = str(error).partition(" ")
        if name not in names:
            raise
        raise MeshwenError(f"{_flag(name)} {what}") from None


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _metavar(one: Option) -> str | None:
    """What stands for the value in the help; None: typer's own."""
    if one.type is str and one.many:
        return "TEXT"
    if one.type in (int, float):
        return f"<{one.type.__name__}{', ' * bool(one.range)}{one.range}>"
    return f"<{'|'.join(one.choices)}>" if one.choices else None


def parse_meshes(text: str) -> list[MeshSpec]:
    """Meshes with `;` or `,` between them; `data=2,model=4` stays together.

    Raises:
        MeshwenError: one does not parse, is there twice, or there is none.
    """
    from meshwen.parallel.mesh import MeshSpec

    found: list[str] = []
    for part in text.split(";"):
        axes: list[str] = []
        for piece in (piece.strip() for piece in part.split(",") if piece.strip()):
            name, is_axis, _ = piece.partition("=")
            if not is_axis or any(axis.partition("=")[0] == name for axis in axes):
                found.append(",".join(axes))
                axes = []
            if is_axis:
                axes.append(piece)
            else:
                found.append(piece)
        found.append(",".join(axes))
    specs = [MeshSpec.parse(mesh) for mesh in found if mesh]
    if not specs:
        raise MeshwenError(f"--meshes must name a mesh, such as 1x1,1x8,2x4, not {text!r}")
    labels = [str(spec) for spec in specs]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise MeshwenError(f"--meshes names {twice[0]} twice: leave one out")
    return specs
