# SPDX-License-Identifier: Apache-2.0
"""`meshwen chat`: a conversation, on a terminal or through a pipe."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Annotated

import typer

from meshwen.cli import options
from meshwen.cli.console import Meter, note, write
from meshwen.cli.conversation import Conversation, load_conversation
from meshwen.cli.interrupt import ctrl_c
from meshwen.cli.load import load_model, sampling_params
from meshwen.cli.prompts import unheeded_fields
from meshwen.errors import MeshwenError

_HELP = """\
/system TEXT  begin the conversation with this system message; without TEXT: with none
/reset        forget the conversation, but not the system message
/save FILE    append the conversation to FILE: one JSON object, for --load and --prompts-file
/quit         leave; Ctrl-D does too
//TEXT        say something that begins with a slash
Ctrl-C        stop an answer; what has come of it stays in the conversation
Ctrl-C twice  leave at once, whatever is running"""


def chat(
    model: options.Model = "demo",
    mesh: options.Mesh = "1",
    dtype: options.Dtype = options.DType.BFLOAT16,
    numerics: options.NumericsOption = options.Numerics.FAST,
    quantization: options.QuantizationOption = None,
    load_format: options.LoadFormatOption = options.LoadFormat.AUTO,
    revision: options.Revision = None,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    max_model_len: options.MaxModelLen = None,
    prompt_lookup_num_tokens: options.PromptLookupNumTokens = 0,
    system: options.System = None,
    load: Annotated[
        Path | None,
        typer.Option(
            "--load",
            metavar="FILE",
            help="Go on with the last conversation that /save put in this file.",
            show_default=False,
        ),
    ] = None,
    debug: options.Debug = False,
) -> None:
    """Talk with a model.

    Each line of input is a turn; /help lists the commands. Answers go to stdout, everything else
    to stderr, so that it works in a pipe too.
    """
    from meshwen.checkpoints import open_checkpoint
    from meshwen.parallel.mesh import make_mesh
    from meshwen.sampling import SamplingParams
    from meshwen.tokenizer import Tokenizer

    given = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop,
    }
    SamplingParams.from_generation_config({}, **given)  # Impossible values fail before loading.
    if sys.stdin is None:  # Closed, as `<&-` does.
        raise MeshwenError("there is nothing to answer: stdin is closed")
    devices = make_mesh(mesh)
    before = None if load is None else load_conversation(load)
    if before is not None and (told := unheeded_fields([before], returned=False)):
        note(told)
    with open_checkpoint(model, load_format=load_format, revision=revision) as checkpoint:
        sampling = sampling_params(checkpoint, given)
        tokenizer = Tokenizer.from_checkpoint(checkpoint)
        if tokenizer is None:
            raise MeshwenError("the model has no tokenizer, so it cannot chat")
        loaded = load_model(
            checkpoint,
            tokenizer,
            mesh=devices,
            dtype=dtype,
            numerics=numerics,
            quantization=quantization,
            max_model_len=max_model_len,
            prompt_lookup_num_tokens=prompt_lookup_num_tokens,
        )
    conversation = Conversation(loaded, tokenizer, sampling, before)
    if system is not None:
        conversation.set_system(system)
    interactive = sys.stdin.isatty()
    if interactive:
        note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")
    for line in _terminal_lines() if interactive else _piped_lines():
        try:
            if not _take(line, conversation, interactive):
                return
        except MeshwenError as error:
            if not interactive:
                raise
            note(str(error))


def _take(line: str, conversation: Conversation, interactive: bool) -> bool:
    """Obeys a command or has a turn answered; false to leave."""
    if line.startswith("/") and not line.startswith("//"):
        command, _, argument = line.strip().partition(" ")
        return _obey(command, argument.strip(), conversation)
    if line.strip():
        _answer(line.removeprefix("/"), conversation, interactive)
    return True


def _obey(command: str, argument: str, conversation: Conversation) -> bool:
    if command == "/help":
        note(_HELP)
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
    elif command != "/quit":
        raise MeshwenError(
            f"no command {command}: /help lists them, and //TEXT says something that begins with /"
        )
    return command != "/quit"


def _answer(text: str, conversation: Conversation, interactive: bool) -> None:
    """Prints the answer as it comes, until it ends or Ctrl-C is pressed."""
    meter = Meter()
    completion = None
    with ctrl_c() as pressed, closing(conversation.say(text)) as events:
        for event in meter.watch(events):
            write(event.text, end="")
            completion = event.completion
            if pressed.is_set():
                break
    write("")
    if completion is None:
        note("(stopped)")
    elif conversation.is_full(completion):
        note("(the model's context is full: /reset begins anew)")
    elif completion.finish_reason == "length":
        note(f"(cut off after {len(completion.tokens)} tokens: see --max-new-tokens)")
    if interactive:
        note(f"({meter.summary()})")


def _terminal_lines() -> Iterator[str]:
    """Lines typed, until Ctrl-D; with editing and history where Python has readline."""
    with suppress(ImportError):
        import readline  # noqa: F401
    while True:
        try:
            if sys.stdout.isatty():
                line = input("> ")
            else:
                print("> ", end="", file=sys.stderr, flush=True)
                line = input()
        except EOFError:
            note("")
            return
        except KeyboardInterrupt:
            note("\n(Ctrl-D or /quit leaves)")
        else:
            yield line


def _piped_lines() -> Iterator[str]:
    if isinstance(sys.stdin, io.TextIOWrapper):  # Whatever the terminal's encoding is.
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    try:
        for line in sys.stdin:
            yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise MeshwenError(f"stdin is not UTF-8 text: {error}") from None
