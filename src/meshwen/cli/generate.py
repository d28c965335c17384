# SPDX-License-Identifier: Apache-2.0
"""`meshwen generate`: answers to one prompt or many."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meshwen.cli import options
from meshwen.cli.console import Meter, before_first_token, note, working, write
from meshwen.cli.files import check_readable
from meshwen.cli.load import load_model, opened, put_prefix, sampling_params, settings_shown
from meshwen.cli.option_groups import with_groups
from meshwen.cli.prompts import Prompt, ignored_fields, read_prompts, read_template_kwargs
from meshwen.common.json_files import to_json
from meshwen.engine.options import EngineOptions
from meshwen.errors import MeshwenError

if TYPE_CHECKING:
    from meshwen.causal_lm import CausalLM
    from meshwen.engine.request import Completion, Event, Request
    from meshwen.engine.sampling_params import SamplingParams
    from meshwen.parallel.mesh import AnyMesh
    from meshwen.tokenizer.tokenizer import Tokenizer

_ANSWER_FIELDS = {
    *("prompt_tokens", "tokens", "text", "finish_reason", "logprobs", "timings", "seed"),
    *("error", "stop_reason", "top_logprobs", "prompt_logprobs", "prompt_top_logprobs"),
    *("cached_tokens", "choice"),
    "model",
    "mesh",
    "dtype",
    "numerics",
    "quantization",
    "sampling",
}
# Fields of a completion that are left out where they are None.
_LEFT_OUT = ("error", "logprobs", "top_logprobs", "prompt_logprobs", "prompt_top_logprobs")


@with_groups(
    engine=options.engine_options(
        *options.LOADING, *options.BATCHING, *options.MEMORY, "prompt_lookup_num_tokens"
    ),
    given=options.sampling_options(
        *options.SAMPLING, "stop_token_ids", "ignore_eos", "logprobs", "top_logprobs"
    ),
)
def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="The prompt. With -, or without one where stdin is a pipe: all of stdin.",
            show_default=False,
        ),
    ] = None,
    prompt_option: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="The prompt, as an option.", show_default=False),
    ] = None,
    model: options.Model = "demo",
    *,
    engine: EngineOptions,
    given: Mapping[str, Any],
    system: options.System = None,
    chat_template_kwargs: options.ChatTemplateKwargs = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text itself, without the chat template.")
    ] = False,
    prompts_file: Annotated[
        str | None,
        typer.Option(
            "--prompts-file",
            metavar="FILE",
            help='A prompt on each line: plain text, or a JSON object with "prompt", "messages" or '
            '"prompt_tokens". Its "tools" and "documents" go to the chat template; --json repeats '
            "all other fields. -: stdin.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object on a line for each prompt.")
    ] = False,
    no_stream: Annotated[
        bool, typer.Option("--no-stream", help="Print an answer when it is complete.")
    ] = False,
    load_prefix: options.LoadPrefix = None,
    debug: options.Debug = False,
) -> None:
    """Answer a prompt, or a file of prompts.

    Answers go to stdout, everything else to stderr.
    """
    if prompt is not None and prompt_option is not None:
        raise MeshwenError("the prompt is given twice, as an argument and as --prompt: drop one")
    if raw and system is not None:
        raise MeshwenError("--system needs the chat template, which --raw leaves out: drop one")
    if raw and chat_template_kwargs is not None:
        raise MeshwenError(
            "--chat-template-kwargs needs the chat template, which --raw leaves out: drop one"
        )
    if given["logprobs"] and not as_json:
        raise MeshwenError("--logprobs needs the JSON output: add --json")
    check_readable(load_prefix)
    variables = read_template_kwargs(chat_template_kwargs)
    render = partial(Prompt.token_ids, raw=raw, system=system, template_kwargs=variables)
    engine.make_mesh()  # Refuses a mesh without its devices before any prompt.
    prompts = _prompts(prompt_option if prompt is None else prompt, prompts_file, as_json)
    loaded, sampling, requests = _loaded(model, engine, given, prompts, render)
    put_prefix(loaded, load_prefix)
    show = _write_answers
    if as_json:
        show = partial(_write_json, settings=_settings(model, engine, loaded.mesh, sampling))
    elif len(prompts) == 1 and not no_stream:
        show = _write_stream
    meter = Meter()
    with working(lambda: before_first_token(loaded.engine.prefilled)) as first_came:
        events = _reporting(first_came, meter.watch(loaded.engine.run(requests)))
        show(events, prompts, loaded.tokenizer)
    _note_cut_off(meter.completions, sampling, loaded.engine.max_model_len)
    note(meter.summary())
    for number, error in sorted(meter.errors.items()):
        count = f"{len(meter.errors)} of {len(prompts)} answers failed; "
        raise MeshwenError(f"{count if len(prompts) > 1 else ''}{prompts[number].where}: {error}")


def _prompts(argument: str | None, file: str | None, as_json: bool) -> list[Prompt]:
    """What is asked: process 0 alone reads it, and all answer."""
    from meshwen.parallel.distributed import shared

    read = shared("prompts", lambda: [asdict(p) for p in read_prompts(argument, file)])
    prompts = [Prompt(**fields) for fields in read]
    if as_json:
        _check_extra_fields(prompts)
    if ignored := ignored_fields(prompts, returned=as_json):
        note(ignored)
    return prompts


def _loaded(
    model: str,
    engine: EngineOptions,
    given: Mapping[str, Any],
    prompts: Sequence[Prompt],
    render: Callable[[Prompt, Tokenizer | None], Sequence[int]],
) -> tuple[CausalLM, SamplingParams, list[Request]]:
    """The model, and what it is asked; what can be refused is, before any weight is read."""
    from meshwen.engine.request import Request, check_prompt
    from meshwen.parallel.distributed import shared
    from meshwen.tokenizer.tokenizer import Tokenizer

    with opened(model, engine) as checkpoint:
        sampling = sampling_params(checkpoint, given)
        tokenizer = Tokenizer.from_checkpoint(checkpoint)
        # Rendered once: a template may give something else every time.
        token_ids = shared("token ids", lambda: [list(render(p, tokenizer)) for p in prompts])
        for one, ids in zip(prompts, token_ids, strict=True):
            check_prompt(ids, checkpoint.config, one.where, engine.max_model_len)
        loaded = load_model(checkpoint, tokenizer, engine)
    return loaded, sampling, [Request(ids, sampling) for ids in token_ids]


def _settings(
    model: str, engine: EngineOptions, mesh: AnyMesh, sampling: SamplingParams
) -> dict[str, Any]:
    """What an answer's JSON says of how it came to be."""
    from meshwen.parallel.mesh import mesh_label

    return {
        "model": model,
        "mesh": mesh_label(mesh),
        "dtype": engine.dtype,
        "numerics": engine.numerics,
        "quantization": engine.quantization,
        "sampling": settings_shown(sampling),
    }


def _reporting(came: Callable[[], None], events: Iterable[Event]) -> Iterator[Event]:
    """Passes events on, and reports each before."""
    for event in events:
        came()
        yield event


def _check_extra_fields(prompts: Sequence[Prompt]) -> None:
    """Refuses fields of a prompt that would stand in the way of its answer's own."""
    for prompt in prompts:
        if taken := sorted(set(prompt.extra) & _ANSWER_FIELDS):
            raise MeshwenError(
                f"{prompt.where}: the field {taken[0]!r} is also one of the answer's; rename it"
            )


def _write_json(
    events: Iterable[Event],
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer | None,
    settings: Mapping[str, Any],
) -> None:
    for number, completion in _in_order(events):
        answer = asdict(completion)
        for name in _LEFT_OUT:
            if answer[name] is None:
                del answer[name]
        write(to_json({**prompts[number].extra, **answer, **settings}))


def _write_stream(
    events: Iterable[Event], prompts: Sequence[Prompt], tokenizer: Tokenizer | None
) -> None:
    for event in events:
        text = event.text if tokenizer or event.token < 0 else f"{event.token} "
        write(text, end="")
    write("")


def _write_answers(
    events: Iterable[Event], prompts: Sequence[Prompt], tokenizer: Tokenizer | None
) -> None:
    for number, completion in _in_order(events):
        if len(prompts) > 1:
            before = "\n" if number else ""
            write(f"{before}[{number + 1}/{len(prompts)}] {prompts[number].title()}")
        write(completion.text if tokenizer else " ".join(map(str, completion.tokens)))


def _in_order(events: Iterable[Event]) -> Iterator[tuple[int, Completion]]:
    """Whole answers in the order of their requests, each as soon as it can be."""
    waiting: dict[int, Completion] = {}
    following = 0
    for event in events:
        if event.completion is not None:
            waiting[event.request] = event.completion
        while following in waiting:
            yield following, waiting.pop(following)
            following += 1


def _note_cut_off(
    completions: Sequence[Completion], sampling: SamplingParams, context: int
) -> None:
    cut_off = [c for c in completions if c.finish_reason == "length"]
    full = sum(len(c.prompt_tokens) + len(c.tokens) == context for c in cut_off)
    answers = f"of {len(completions)} answer{'s' * (len(completions) > 1)}"
    limit, longest = sampling.max_new_tokens, sampling.max_length
    if limited := sum(len(c.tokens) == limit for c in cut_off):
        note(f"cut off after {limit} tokens, see --max-new-tokens: {limited} {answers}")
    if limited := sum(len(c.prompt_tokens) + len(c.tokens) == longest for c in cut_off):
        note(f"cut off at max_length {longest}, see --max-new-tokens: {limited} {answers}")
    if full:
        note(f"cut off where the model's context of {context} tokens is full: {full} {answers}")
