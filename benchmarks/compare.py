# SPDX-License-Identifier: Apache-2.0
"""meshwen beside transformers, llama.cpp and tunix: decode steps and prefill of one checkpoint.

    python benchmarks/compare.py --model PATH --dtype bfloat16 --batch 1,8,32 --prompt 512

Each engine runs in a process and a virtual environment of its own, which is made at the first use
(llama.cpp is compiled then, for minutes). All are loaded before the first measurement; then they
take turns, one measuring while the others wait, in several rounds. The result is the least of the
rounds' medians; nothing else should run. Needs the extra `gguf`, and a folder in Hugging Face's
format with room for one more copy of its weights in float32 beside it in the temporary directory.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from math import nan
from pathlib import Path
from typing import NamedTuple

WORKER = Path(__file__).parent / "engines" / "worker.py"
ENVIRONMENTS = Path.home() / ".cache" / "meshwen" / "engines"
OURS = "meshwen"


class Peer(NamedTuple):
    """An engine to compare with.

    Attributes:
        module: what drives it, in `engines`.
        packages: what to install for it, one after the other.
        versions: the packages whose versions matter.
        dtypes: what it can keep weights in; int8 of llama.cpp is Q8_0.
    """

    module: str
    packages: tuple[str, ...]
    versions: tuple[str, ...]
    dtypes: tuple[str, ...] = ("float32", "bfloat16")


# torch is pinned to a release that has a CPU build: any newer one would bring CUDA along.
PEERS = {
    "transformers": Peer(
        "with_transformers", ("torch==2.13.0", "transformers>=5,<6"), ("torch", "transformers")
    ),
    "llama.cpp": Peer(
        "with_llama_cpp",
        ("llama-cpp-python>=0.3.16,<0.4",),
        ("llama-cpp-python",),
        ("float32", "bfloat16", "int8"),
    ),
    "tunix": Peer("with_tunix", ("google-tunix>=0.1.7,<0.2",), ("google-tunix", "jax")),
}


class Engine:
    """A running worker; see `engines/worker.py`."""

    def __init__(self, process: subprocess.Popen[str]):
        self.process = process
        self._answer()  # It is loaded.

    def measure(self, what: str, arguments: tuple[int, ...]) -> float | str:
        """Seconds, or why there are none."""
        assert self.process.stdin
        print(json.dumps({what: arguments}), file=self.process.stdin, flush=True)
        answer = self._answer()
        return answer.get("seconds", answer.get("error"))

    def _answer(self) -> dict:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{' '.join(map(str, self.process.args))} stopped")
        return json.loads(line)


def main() -> None:
    options = parse_arguments()
    peers = {name: PEERS[name] for name in options.peers}
    pythons = {name: environment(name, peer, options.environments) for name, peer in peers.items()}
    print(f"{platform.machine()}, Python {platform.python_version()}")
    print(versions(Path(sys.executable), ("meshwen", "jax")))
    for name, peer in peers.items():
        print(versions(pythons[name], peer.versions))
    for dtype in options.dtype:
        able = {name: peer for name, peer in peers.items() if dtype in peer.dtypes}
        print(f"{'':28}{OURS:>14}" + "".join(f"{name:>24}" for name in able))
        with ExitStack() as stack:
            engines = {OURS: start(stack, sys.executable, "with_meshwen", options.model, dtype)}
            for name, peer in able.items():
                model = options.model
                if name == "llama.cpp":
                    model = stack.enter_context(gguf(model, dtype))
                engines[name] = start(stack, pythons[name], peer.module, model, dtype)
            for what, arguments in measurements(options):
                rounds = [
                    {name: engine.measure(what, arguments) for name, engine in engines.items()}
                    for _ in range(options.rounds)
                ]
                show(dtype, what, arguments, rounds)


def measurements(options: argparse.Namespace) -> Iterator[tuple[str, tuple[int, ...]]]:
    for batch in options.batch:
        yield "decode", (batch, options.length, options.steps)
    for length in options.prompt:
        yield "prefill", (length, options.runs)


def show(
    dtype: str, what: str, arguments: tuple[int, ...], rounds: list[dict[str, float | str]]
) -> None:
    """A row: milliseconds of each engine, and how many times as long as ours they are."""
    kind = f"batch {arguments[0]}" if what == "decode" else f"{arguments[0]} tokens"
    least = {}
    for name in rounds[0]:
        found = [one[name] for one in rounds]
        for reason in {one for one in found if isinstance(one, str)}:
            print(f"{name}: {reason}", file=sys.stderr)
        least[name] = min((one for one in found if isinstance(one, float)), default=nan)
    ours = least.pop(OURS)
    cells = (f"{theirs * 1e3:12.1f} ms{theirs / ours:7.2f} x" for theirs in least.values())
    row = f"{dtype} {what}, {kind}"
    print(f"{row:28}{ours * 1e3:11.1f} ms" + "".join(cells), flush=True)


def start(stack: ExitStack, python: str | Path, module: str, model: str, dtype: str) -> Engine:
    process = stack.enter_context(
        subprocess.Popen(
            [python, WORKER, module, model, dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    )
    stack.callback(process.terminate)
    return Engine(process)


def environment(name: str, peer: Peer, folder: Path) -> Path:
    """The Python of a peer's virtual environment, made where it is not there."""
    home = folder / name
    python = home / "bin" / "python"
    done = home / ".installed"
    wanted = " ".join(peer.packages)
    if not done.is_file() or done.read_text() != wanted:
        print(f"installing {wanted} into {home}", file=sys.stderr)
        venv.create(home, with_pip=True, clear=True)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        for package in peer.packages:  # In order: torch before what would take a newer one.
            subprocess.run([*install, package], check=True, stdin=subprocess.DEVNULL)
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
def gguf(model: str, dtype: str) -> Iterator[str]:
    """The checkpoint as a file for llama.cpp."""
    from engines.gguf_file import write_gguf

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(model, dtype, path)
        yield str(path)


def parse_arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(one) for one in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a checkpoint's folder")
    parser.add_argument(
        "--dtype", default="float32,bfloat16,int8", type=lambda text: text.split(",")
    )
    parser.add_argument("--batch", default="1,8,32", type=numbers, help="sequences that decode")
    parser.add_argument("--length", default=64, type=int, help="tokens of each before decoding")
    parser.add_argument("--steps", default=8, type=int, help="of decoding, a round")
    parser.add_argument(
        "--prompt", default="512", type=numbers, help="tokens of prompts to prefill"
    )
    parser.add_argument("--runs", default=3, type=int, help="prompts to prefill, a round")
    parser.add_argument("--rounds", default=3, type=int)
    parser.add_argument(
        "--peers",
        default=",".join(PEERS),
        type=lambda text: text.split(","),
        help="to compare with",
    )
    parser.add_argument("--environments", default=ENVIRONMENTS, type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
