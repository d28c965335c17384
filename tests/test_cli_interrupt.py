# SPDX-License-Identifier: Apache-2.0
"""However the command line ends, what it owes is written and its exit status is as promised."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

LIMIT = 60  # seconds
BUSY = "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"  # Minutes within one call of C.


@contextmanager
def program(*body, grace=LIMIT, **options):
    """A process whose command line is the lines of a function; it says "ready" itself."""
    lines = "\n".join(f"    {line}" for line in body)
    script = (
        "import gc, hashlib, os, signal, sys, time\n"
        "from meshwen.cli import interrupt\n"
        f"interrupt._GRACE = {grace}\n"
        f"def command():\n{lines}\n    return 0\n"
        "interrupt.run_to_the_end(command)\n"
    )
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    options["env"] = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    process = subprocess.Popen([sys.executable, "-c", script], text=True, **options)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


READY = "print('ready', flush=True)"


def ready(process):
    assert process.stdout.readline() == "ready\n"
    return process


def ended(process):
    """The exit status, stdout and stderr."""
    out, err = process.communicate(timeout=LIMIT)
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("last", "status"),
    [
        ("pass", 0),
        ("return 2", 2),
        ("sys.exit(1)", 1),
        ("raise KeyboardInterrupt", 130),
        ("class Panic(BaseException): pass\n    raise Panic('two')", 3),
    ],
)
def test_every_end_writes_what_was_printed_and_keeps_its_status(last, status):
    with program("print('owed', end='')", last) as process:
        found, out, err = ended(process)
    assert (found, out) == (status, "owed")
    assert ("Panic: two" in err) == (status == 3)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_one_line_and_status_2():
    with open("/dev/full", "w") as full, program("print('owed')", stdout=full) as process:
        status, _, err = ended(process)
    assert status == 2
    assert err.splitlines() == [
        "meshwen: error: the output cannot be written: [Errno 28] No space left on device"
    ]


def test_output_that_nobody_reads_is_status_1():
    reader, writer = os.pipe()
    with program("print('owed')", "time.sleep(0.2)", stdout=writer) as process:
        os.close(writer)
        os.close(reader)
        assert ended(process) == (1, None, "")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_closes_what_is_open(number, status):
    body = ("try:", f"    {READY}", f"    time.sleep({LIMIT})", "finally:", "    print('closed')")
    with program(*body) as process:
        ready(process).send_signal(number)
        assert ended(process) == (status, "closed\n", "")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_long_call_of_c_after_a_while(number, status):
    with program("print('owed')", READY, BUSY, grace=0.2) as process:
        assert process.stdout.readline() == "owed\n"
        ready(process).send_signal(number)
        assert ended(process)[0] == status


@pytest.mark.parametrize("first", ["", "time.sleep(60)"], ids=["unheard", "while closing"])
def test_a_second_ctrl_c_ends_at_once(first):
    closing = ("finally:", f"    {READY}", f"    {BUSY}")
    body = ("try:", f"    {READY}", f"    {first or BUSY}", *closing)
    with program(*body) as process:
        ready(process).send_signal(signal.SIGINT)
        if first:
            ready(process)
        else:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert ended(process)[0] == 130


def test_a_ctrl_c_that_a_prompt_takes_ends_nothing():
    body = (
        "for _ in range(2):",
        "    try:",
        f"        {READY}",
        f"        time.sleep({LIMIT})",
        "    except KeyboardInterrupt as stop:",
        "        interrupt.take(stop)",
        "        print('taken', flush=True)",
        "time.sleep(2)",
    )
    with program(*body, grace=1.5) as process:
        for _ in range(2):
            ready(process).send_signal(signal.SIGINT)
            assert process.stdout.readline() == "taken\n"
        assert ended(process) == (0, "", "")


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_within_a_callback_that_swallows_exceptions_is_not_lost(name, status):
    body = (
        "def callback(phase, _):",
        "    if phase == 'start' and not came:",
        "        came.append(True)",
        f"        signal.raise_signal(signal.{name})",
        "came = []",
        "gc.callbacks.append(callback)",
        "gc.collect()",
        "time.sleep(10)",
    )
    with program(*body) as process:
        assert ended(process) == (status, "", "")


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_that_a_library_swallows_comes_again(name, status):
    swallow = (
        "try:",
        f"    signal.raise_signal(signal.{name})",
        "except BaseException:",
        "    pass",
    )
    with program(*swallow, "time.sleep(10)") as process:
        assert ended(process) == (status, "", "")


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_the_command_line_takes_a_signal_once_and_leaves_other_processes_in_peace(name, status):
    body = (
        "from meshwen.cli import app",
        "@app.app.command()",
        "def boom():",
        f"    signal.raise_signal(signal.{name})",
        "def leave(status):",
        "    time.sleep(0.5)",
        "    print('left with', status, flush=True)",
        "app._leave = leave",
        "return app.main(['boom'])",
    )
    with program(*body) as process:
        assert ended(process)[:2] == (status, f"left with {status}\n")


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_while_a_module_is_imported_waits_for_its_end(name, status, tmp_path):
    tmp_path.joinpath("slow.py").write_text(
        f"import signal, time\nsignal.raise_signal(signal.{name})\n"
        "time.sleep(0.3)\nprint('imported', flush=True)\n"
    )
    with program(f"sys.path.insert(0, {str(tmp_path)!r})", "import slow", "time.sleep(9)") as one:
        assert ended(one) == (status, "imported\n", "")


def test_a_second_signal_ends_an_import_at_once(tmp_path):
    tmp_path.joinpath("slow.py").write_text(
        f"import hashlib\n{READY}\nimport time\ntime.sleep(9)\n"
    )
    with program(f"sys.path.insert(0, {str(tmp_path)!r})", "import slow") as one:
        ready(one).send_signal(signal.SIGTERM)
        time.sleep(0.5)
        one.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert ended(one)[0] == 143
        assert time.monotonic() - began < 2


def test_a_signal_that_a_library_makes_another_error_of_gives_its_own_status():
    become = (
        "try:",
        "    signal.raise_signal(signal.SIGTERM)",
        "except BaseException as error:",
        "    text = str(error)",
        "raise RuntimeError(text)",
    )
    with program(*become) as process:
        assert ended(process)[0] == 143


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # As of a shell's background jobs.
    try:
        with program("signal.raise_signal(signal.SIGINT)", "print('on')") as process:
            assert ended(process) == (0, "on\n", "")
    finally:
        signal.signal(signal.SIGINT, before)


def test_sigterm_ends_a_chat_that_is_busy_with_an_answer():
    body = ("with interrupt.ctrl_c():", f"    {READY}", f"    {BUSY}")
    with program(*body, grace=0.2) as process:
        ready(process).send_signal(signal.SIGTERM)
        assert ended(process)[0] == 143


SERVER = (
    "import threading",
    "came = threading.Event()",
    "def handle(number):",
    "    os.write(1, b'handled %d\\n' % number)",  # Not print: it may be what is interrupted.
    "    came.set()",
    "with interrupt.handled(handle):",
    f"    {READY}",
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_is_handled_raises_nothing(number):
    with program(*SERVER, "    came.wait()", "print('done')", grace=0.2) as process:
        ready(process).send_signal(number)
        assert ended(process) == (0, f"handled {int(number)}\ndone\n", "")


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_ends_at_once_whatever_runs(first):
    with program(*SERVER, "    came.wait()", f"    {BUSY}") as process:
        ready(process).send_signal(first)
        assert process.stdout.readline() == f"handled {int(first)}\n"
        process.send_signal(signal.SIGTERM)
        assert ended(process)[0] == 143


def test_after_a_block_that_handles_signals_they_raise_again():
    with program(
        *SERVER, "    pass", "print('after', flush=True)", f"time.sleep({LIMIT})"
    ) as process:
        ready(process)
        assert process.stdout.readline() == "after\n"
        process.send_signal(signal.SIGTERM)
        assert ended(process)[0] == 143


def test_a_signal_that_only_a_prompt_heard_hides_no_later_one():
    body = (
        "interrupt._ECHO = 0",
        "before = signal.set_wakeup_fd(-1)",  # As while a turn is typed.
        "try:",
        "    signal.raise_signal(signal.SIGINT)",
        "except KeyboardInterrupt:",
        "    signal.set_wakeup_fd(before)",
        READY,
        BUSY,
    )
    with program(*body, grace=0.2) as process:
        ready(process)
        time.sleep(0.2)  # It is in C now, so that no handler runs.
        process.send_signal(signal.SIGTERM)
        assert ended(process)[0] == 143


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_xla_compiles_ends_with_its_status(number, tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    found = []
    for delay in (0.2, 0.5, 0.8, 1.1):  # seconds after the weights are loaded
        environment["XDG_CACHE_HOME"] = str(tmp_path / str(delay))  # Nothing is compiled yet.
        process = subprocess.Popen(
            [sys.executable, "-m", "meshwen", "generate", "hi", "--max-new-tokens", "2000"],
            env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            while not process.stderr.readline().startswith("mesh:"):
                assert process.poll() is None
            time.sleep(delay)
            process.send_signal(number)
            found.append(ended(process)[0])
        finally:
            process.kill()
            process.communicate()
    assert found == [128 + number] * 4
