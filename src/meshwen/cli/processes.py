# SPDX-License-Identifier: Apache-2.0
"""The options that run a command over several processes, declared once for every command."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any

import typer

from meshwen.cli.option_groups import with_groups
from meshwen.cli.options import declared
from meshwen.common.option_fields import Option, options_of
from meshwen.errors import MeshwenError
from meshwen.server.options import ServerOptions

Coordinator = Annotated[
    str | None,
    typer.Option(
        "--coordinator",
        metavar="HOST:PORT",
        help="Run over several processes, each started with the same options; process 0 listens "
        "at this address. auto: the cluster (Slurm, Open MPI, Kubernetes, TPU) knows the address, "
        "the number and the id.",
        show_default=False,
    ),
]
NumProcesses = Annotated[
    int | None,
    declared(
        Option("How many processes there are.", int, least=1), "--num-processes", show_default=False
    ),
]
ProcessId = Annotated[
    int | None,
    declared(
        Option("Which of them this is, from 0. Process 0 prints.", int, least=0),
        "--process-id",
        show_default=False,
    ),
]
CoordinatorTimeout = Annotated[
    float,
    declared(
        Option("Seconds to wait for the other processes to be started.", float, least=1),
        "--coordinator-timeout",
    ),
]


@dataclass(frozen=True)
class Processes:
    """Those that run a command together, and which of them this one is."""

    coordinator: str
    count: int | None
    index: int | None
    timeout: float


def _processes(
    coordinator: Coordinator = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
    coordinator_timeout: CoordinatorTimeout = 60.0,
) -> Processes | None:
    """The processes to join; None: this is the only one. Its parameters are options."""
    if coordinator is not None:
        return Processes(coordinator, num_processes, process_id, coordinator_timeout)
    if num_processes is not None or process_id is not None:
        raise MeshwenError("--num-processes and --process-id need --coordinator HOST:PORT")
    return None


# What may differ between machines (where files lie), or is read or written by process 0 alone.
_OWN_AFFAIR = {
    *(
        "model",
        "prompt",
        "prompt_option",
        "prompts_file",
        "prompts",
        "golden",
        "against",
        "data",
        "train",
    ),
    *("json_file", "html_file", "debug"),
    *(options_of(ServerOptions).keys() - {"warmup"}),
}


def over_processes(command: Callable[..., Any], refusal: str | None = None) -> Callable[..., Any]:
    """A command with the options to run it over several processes.

    Process 0 prints what the command prints; of the others only errors show.

    Args:
        command: the command.
        refusal: why it has to run in one process, if it does: then the options say so.
    """

    @with_groups(processes=_processes)
    @wraps(command)
    def run(processes: Processes | None, **own: Any) -> Any:
        if processes is None:
            return command(**own)
        if refusal is not None:
            raise MeshwenError(refusal)
        from meshwen.parallel.distributed import process_index, start

        start(processes.coordinator, processes.count, processes.index, processes.timeout)
        _check_alike(own)
        with _others_named(), _own_output() if process_index() == 0 else _no_output():
            return command(**own)

    return run


def _check_alike(own: Mapping[str, Any]) -> None:
    """Refuses other versions, kernels or options in one of the processes.

    With other options they would wait for each other forever, with other kernels exact numerics
    would not be exact.
    """
    from meshwen.engine.agreement import check_environment, check_same

    check_environment()
    mine = {
        f"--{name.replace('_', '-')}": str(value)
        for name, value in own.items()
        if name not in _OWN_AFFAIR
    }
    check_same("the processes' options", mine, "start all with the same options")


@contextmanager
def _others_named() -> Iterator[None]:
    """Adds to an unexpected error where it came, and that its cause may lie elsewhere."""
    from meshwen.parallel.distributed import process_count, process_index

    try:
        yield
    except MeshwenError:
        raise
    except Exception as error:
        raise RuntimeError(
            f"error in process {process_index()} of {process_count()}; if another has ended, look "
            f"there for the cause: {type(error).__name__}: {error}"
        ) from error


@contextmanager
def _own_output() -> Iterator[None]:
    """Keeps the file of stdout for Python: the library of CPU collectives writes there too."""
    sys.stdout.flush()
    file = sys.stdout.fileno()
    kept = os.dup(file)
    with (
        open(kept, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors) as stdout,
        redirect_stdout(stdout),
        open(os.devnull, "wb") as nowhere,
    ):
        os.dup2(nowhere.fileno(), file)
        try:
            yield
        finally:
            os.dup2(kept, file)


@contextmanager
def _no_output() -> Iterator[None]:
    """Shows nothing of what is printed."""
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
    ):
        os.dup2(nowhere.fileno(), 1)
        yield
