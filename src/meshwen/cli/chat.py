# SPDX-License-Identifier: Apache-2.0
"""`meshwen chat`: a conversation, on a terminal or through a pipe."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from meshwen.cli import options
from meshwen.cli.console import Meter, before_first_token, note, working, write
from meshwen.cli.conversation import (
    Conversation,
    LoadedConversation,
    chat_settings,
    load_conversation,
)
from meshwen.cli.files import check_readable
from meshwen.cli.interrupt import ctrl_c
from meshwen.cli.load import load_model, opened, put_prefix, sampling_params
from meshwen.cli.option_groups import with_groups
from meshwen.cli.prompts import Prompt, ignored_fields, read_template_kwargs
from meshwen.cli.served import AskedServer, ModelOrServed, asked_server, refuse_engine
from meshwen.cli.served_conversation import served_conversation
from meshwen.common.arguments import meant
from meshwen.common.json_files import parse_json, to_json
from meshwen.engine.options import EngineOptions
from meshwen.errors import MeshwenError

_HELP = """\
/retry        forget the last answer, and answer again: with a new seed, unless
              one was given
/set NAME X   change a setting, e.g. /set temperature 0.7; without NAME: show
              them
/system TEXT  begin the conversation with this system message; without TEXT:
              with none
/reset        forget the conversation, but not the system message
/save FILE    append the conversation to FILE: one JSON object, for --load and
              --prompts-file
/quit, /exit  leave; Ctrl-D does too
//TEXT        say something that begins with a slash
Alt-Enter     begin another line of a turn; what is pasted is one turn, whatever
              its lines
Tab           complete a command; the arrows bring earlier turns back
Ctrl-C        stop an answer; what has come of it stays in the conversation
Ctrl-C twice  leave at once, whatever is running"""

_LEAVE = ("/quit", "/exit")
_COMMANDS = ("/help", "/reset", "/retry", "/save", "/set", "/system", *_LEAVE)


@with_groups(
    engine=options.engine_options(*options.LOADING, *options.MEMORY, "prompt_lookup_num_tokens"),
    given=options.sampling_options(*options.SAMPLING),
    server=asked_server,
)
def chat(
    model: ModelOrServed = None,
    *,
    server: AskedServer | None,
    engine: EngineOptions,
    given: Mapping[str, Any],
    system: options.System = None,
    chat_template_kwargs: options.ChatTemplateKwargs = None,
    load: Annotated[
        Path | None,
        typer.Option(
            "--load",
            metavar="FILE",
            help="Continue the last conversation that /save wrote to this file.",
            show_default=False,
        ),
    ] = None,
    load_prefix: options.LoadPrefix = None,
    debug: options.Debug = False,
) -> None:
    """Chat with a model, or with a server by --url.

    /help lists the commands of a chat. Where stdin is a pipe, each line of it is a turn. Answers go
    to stdout, everything else to stderr.
    """
    variables = read_template_kwargs(chat_template_kwargs)
    if sys.stdin is None:  # Closed, as `<&-` does.
        raise MeshwenError(
            "there is nothing to answer: stdin is closed; use a terminal, or pipe turns in"
        )
    before = None if load is None else load_conversation(load)
    if before is not None and (ignored := ignored_fields([before], returned=False)):
        note(ignored)
    if server is None:
        conversation = _with_model(model or "demo", engine, given, before, load_prefix)
    else:
        refuse_engine(engine, EngineOptions(), load_prefix=load_prefix)
        conversation = served_conversation(server, model, given, before)
    conversation.template_kwargs = variables
    if system is not None:
        conversation.set_system(system)
    interactive = sys.stdin.isatty()
    if interactive:
        note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")
    for line in _typed_turns() if interactive else _piped_lines():
        try:
            if not _take(line, conversation, interactive):
                return
        except MeshwenError as error:
            if not interactive:
                raise
            note(str(error))


def _with_model(
    model: str,
    engine: EngineOptions,
    given: Mapping[str, Any],
    before: Prompt | None,
    load_prefix: Path | None,
) -> Conversation:
    """A conversation with a model, which it loads."""
    from meshwen.tokenizer.tokenizer import Tokenizer

    check_readable(load_prefix)
    engine.make_mesh()  # Refuses a mesh without its devices before loading.
    with opened(model, engine) as checkpoint:
        sampling = sampling_params(checkpoint, given)
        tokenizer = Tokenizer.from_checkpoint(checkpoint)
        if tokenizer is None:
            raise MeshwenError(
                f"{model} has no tokenizer, so it cannot chat: give a checkpoint that has one"
            )
        loaded = load_model(checkpoint, tokenizer, replace(engine, max_num_seqs=1))
    put_prefix(loaded, load_prefix)
    conversation = LoadedConversation(loaded, tokenizer, sampling, before)
    conversation.keeps_seed = given["seed"] is not None
    return conversation


def _take(line: str, conversation: Conversation, interactive: bool) -> bool:
    """Obeys a command or has a turn answered; false to leave."""
    if line.startswith("/") and not line.startswith("//"):
        command, _, argument = line.strip().partition(" ")
        if command == "/retry":
            _answer(_again(conversation), conversation, interactive)
            return True
        return _obey(command, argument.strip(), conversation)
    if line.strip():
        _answer(line.removeprefix("/"), conversation, interactive)
    return True


def _again(conversation: Conversation) -> str:
    """What to answer again."""
    text = conversation.take_back()
    if conversation.greedy:
        note("(at temperature 0 the answer is the same: /set temperature 0.7 draws others)")
    else:
        _renew_seed(conversation)
    return text


def _renew_seed(conversation: Conversation) -> None:
    """Takes a fresh seed where tokens are drawn, and says which, unless the user chose one."""
    from meshwen.engine.sampling_params import with_fresh_seed

    if conversation.sampling.temperature > 0 and not conversation.keeps_seed:
        conversation.sampling = with_fresh_seed(conversation.sampling)
        note(f"seed: {conversation.sampling.seed}")


def _obey(command: str, argument: str, conversation: Conversation) -> bool:
    if command == "/help":
        note(_HELP)
    elif command == "/set":
        _set(argument, conversation)
    elif command == "/reset":
        conversation.reset()
        note("the conversation begins anew")
    elif command == "/system":
        conversation.set_system(argument)
        note("the system message is set" if argument else "there is no system message now")
    elif command == "/save":
        if not argument:
            raise MeshwenError("/save needs the name of a file")
        conversation.save(Path(argument))
        note(f"saved to {argument}")
    elif command not in _LEAVE:
        raise MeshwenError(
            f"there is no command {command}{meant(command, _COMMANDS, most=1)}; /help lists them, "
            "and //TEXT says something that begins with /"
        )
    return command not in _LEAVE


def _set(argument: str, conversation: Conversation) -> None:
    """Changes a sampling parameter, or shows all."""
    settings = conversation.settings
    name, _, text = argument.partition(" ")
    name = name.replace("-", "_")  # As the options are written.
    if name:
        if name not in settings:
            raise MeshwenError(
                f"there is no setting {name}{meant(name, settings, most=1)}; there are "
                f"{', '.join(settings)}"
            )
        try:
            value = parse_json(text, name)
        except MeshwenError:
            value = text  # As for /set stop END.
        if name == "stop":
            one = value if isinstance(value, str) else text  # "END" is END: so it is shown.
            value = tuple(value) if isinstance(value, list) else (one,) if text else ()
        drew = conversation.sampling.temperature > 0
        asked = conversation.sampling.max_new_tokens_asked or name in (
            "max_new_tokens",
            "max_length",
        )
        changed = {name: value, "max_new_tokens_asked": asked}
        conversation.set(replace(conversation.sampling, **changed), name)
        if not drew:
            _renew_seed(conversation)
        settings = {name: conversation.settings[name]}
    note("\n".join(f"{name} {to_json(value)}" for name, value in settings.items()))


def _answer(text: str, conversation: Conversation, interactive: bool) -> None:
    """Prints the answer as it comes, until it ends or Ctrl-C is pressed."""
    meter = Meter()
    completion = None
    with (
        ctrl_c(conversation.stop) as pressed,
        closing(conversation.say(text)) as events,
        working(lambda: before_first_token(conversation.prefilled())) as first_came,
    ):
        for event in meter.watch(events):
            first_came()
            write(event.text, end="")
            completion = event.completion
            if pressed.is_set():
                break
    if meter.count or completion:
        write("")
    if completion is not None and completion.error is not None:
        raise MeshwenError(completion.error)
    if completion is None:
        note("(stopped)")
    elif conversation.is_full(completion):
        note("(the model's context is full: /reset begins anew)")
    elif completion.finish_reason == "length":
        note(f"(cut off after {len(completion.tokens)} tokens: see --max-new-tokens, /set)")
    if interactive:
        note(f"({meter.summary()})")


def _typed_turns() -> Iterator[str]:
    """What is typed on the terminal, until Ctrl-D."""
    from meshwen.cli.terminal_input import typed_turns  # Not for a pipe.
    from meshwen.engine.sampling_params import SamplingParams

    return typed_turns(_COMMANDS, tuple(chat_settings(SamplingParams())))


def _piped_lines() -> Iterator[str]:
    if isinstance(sys.stdin, io.TextIOWrapper):  # Whatever the terminal's encoding is.
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    try:
        for line in sys.stdin:
            yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise MeshwenError(f"stdin is not UTF-8 text: {error}") from None
