# SPDX-License-Identifier: Apache-2.0
"""The `meshwen` command: its sub-commands, and what it says and returns when something goes wrong.

Exit status: 0 done; 1 a check failed, or nobody reads stdout any more; 2 the user must change
something; 3 a defect of meshwen or of the machine; 130 stopped with Ctrl-C,
143 with SIGTERM.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterable, Sequence
from typing import Annotated

import typer

import meshwen
from meshwen.cli.bench import bench
from meshwen.cli.chat import chat
from meshwen.cli.console import note
from meshwen.cli.eval import app as evals
from meshwen.cli.export import export
from meshwen.cli.generate import generate
from meshwen.cli.inspect import inspect
from meshwen.cli.interrupt import INTERRUPTED, take, take_last
from meshwen.cli.processes import over_processes
from meshwen.cli.serve import serve
from meshwen.cli.streams import check_stdout, drop_output, open_streams, output_failure
from meshwen.cli.verify import verify
from meshwen.common.arguments import meant
from meshwen.errors import MeshwenError

USER_MUST_CHANGE, DEFECT = 2, 3
_LONGEST_LINE = 2000  # characters of an error

app = typer.Typer(
    name="meshwen",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"meshwen {meshwen.__version__}")
        raise typer.Exit


_ONE_PERSON = (
    "chat runs in one process, where its user is; over several, use generate with --prompts-file, "
    'whose "messages" go on with a conversation'
)


@app.callback()
def _meshwen(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            "-V",
            callback=_print_version,
            is_eager=True,
            help="Print the version and exit.",
        ),
    ] = False,
) -> None:
    """Qwen2.5 and Qwen3 in JAX, tensor-parallel on any mesh of devices."""


app.command("generate")(over_processes(generate))
app.command("chat")(over_processes(chat, refusal=_ONE_PERSON))
app.command("inspect")(inspect)
app.command("verify")(over_processes(verify))
app.command("bench")(over_processes(bench))
app.command("serve")(over_processes(serve))
app.command("export")(export)
app.add_typer(evals, name="eval")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status.

    Args:
        arguments: without the program's name; None takes the process's own.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    open_streams()
    try:
        status = _run(arguments)
    except SystemExit as stop:  # SIGTERM, or nobody reads stdout any more.
        take(stop)
        status = stop.code if isinstance(stop.code, int) else DEFECT
    _leave(status)
    return status


def _run(arguments: list[str]) -> int:
    try:
        check_stdout()
        status = app(arguments, prog_name="meshwen", standalone_mode=False)
        if status == INTERRUPTED:  # All that typer leaves of Ctrl-C.
            take_last()
    except (KeyboardInterrupt, typer.Abort) as stop:
        take(stop)
        return INTERRUPTED
    except Exception as error:
        if "--debug" in arguments:
            note(traceback.format_exc())
        if output_failure() is None:
            status, message = _explain(error, arguments)
            note(f"meshwen: error: {message}")
    if (failure := output_failure()) is not None:
        status, message = drop_output(failure)
        if message:
            note(f"meshwen: error: {message}")
    return status if isinstance(status, int) else 0


def _leave(status: int) -> None:
    """Parts from other processes, where the command joined any: at once where this one failed."""
    if "meshwen.parallel.distributed" in sys.modules:  # Importing it takes its time.
        from meshwen.parallel.distributed import leave, wait_for_others

        if status:
            leave(status)
        wait_for_others()


def _explain(error: Exception, arguments: Sequence[str]) -> tuple[int, str]:
    """An exit status, and one line."""
    if isinstance(error, MeshwenError):
        return USER_MUST_CHANGE, _one_line(str(error))
    # A usage error. Its class has lived in click and in typer, by version; this marks it in both.
    if callable(format_message := getattr(error, "format_message", None)):
        return USER_MUST_CHANGE, _one_line(_usage(error, format_message(), arguments))
    if isinstance(error, OSError) and error.strerror:  # The disk is full, a file may not be read.
        where = "cannot read or write" if error.filename is None else error.filename
        return USER_MUST_CHANGE, _one_line(f"{where}: {error.strerror}")
    what = _one_line(f"{type(error).__name__}: {error}")
    return DEFECT, f"unexpected {what} (--debug shows the traceback)"


# Names that other programs have for what is here.
_NAMES_ELSEWHERE = {
    **dict.fromkeys(("--n-predict", "--num-predict", "--max-length"), "--max-new-tokens"),
    **dict.fromkeys(("--ctx-size", "--n-ctx", "--num-ctx", "-c"), "--max-model-len"),
    **dict.fromkeys(("--tensor-parallel-size", "--tp", "-tp", "--devices"), "--mesh"),
    **dict.fromkeys(("--precision", "--torch-dtype"), "--dtype"),
    **dict.fromkeys(("--repeat-penalty", "--frequency-penalty"), "--repetition-penalty"),
    **dict.fromkeys(("--file", "-f", "--input"), "--prompts-file"),
    **dict.fromkeys(("server", "api_server", "listen"), "serve"),
    **dict.fromkeys(("gen", "run", "complete", "completion", "infer"), "generate"),
    **dict.fromkeys(("test", "check", "validate"), "verify"),
    **dict.fromkeys(("info", "show", "ls"), "inspect"),
}


def _usage(error: Exception, message: str, arguments: Sequence[str]) -> str:
    """A usage error in the style of all others: what was wrong, what may be meant, where to look.

    Args:
        error: click's, or typer's.
        message: its own text: "No such option: --frob".
        arguments: those of the command line.
    """
    context = getattr(error, "ctx", None)
    named = arguments[: 2 if arguments[0] == "eval" else 1]  # Not every error has its context.
    where = getattr(context, "command_path", " ".join(("meshwen", *named)))
    command = re.match(r"No such command '(.*?)'\.", message)
    option = getattr(error, "option_name", None)
    if command:
        known = getattr(getattr(context, "command", None), "commands", {})
        what = f"there is no command {command[1]!r}{_meant(command[1], known)}"
    elif option and hasattr(error, "possibilities"):
        what = f"there is no option {option}{_meant(option, error.possibilities or ())}"
    else:
        what = f"{message[:1].lower()}{message[1:]}".rstrip(".")
    return f"{what}; see {where} --help"


def _meant(name: str, known: Iterable[str]) -> str:
    elsewhere = _NAMES_ELSEWHERE.get(name)
    return f" (did you mean {elsewhere}?)" if elsewhere else meant(name, known)


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    if len(line) > _LONGEST_LINE:
        return f"{line[: _LONGEST_LINE // 2]} ... {line[-_LONGEST_LINE // 2 :]}"
    return line
