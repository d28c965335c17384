# SPDX-License-Identifier: Apache-2.0
"""meshwen beside other engines: decode steps and prefill of one checkpoint.

    python benchmarks/compare.py --model PATH --dtype bfloat16 --batch 1,8,32 --prompt 512

The others are transformers, llama.cpp, tunix, vLLM (its wheels are for Python 3.11) and OpenVINO
GenAI (int8: Q8_0, and Q4_0 beside it). Each engine runs in a process and a virtual environment of
its own, which is made at the first use (llama.cpp is compiled then, for minutes). All are loaded
before the first measurement; then they take turns, one measuring while the others wait, in several
rounds. The result is the least of the rounds' medians; nothing else should run. Needs the extra
`gguf`, and a folder in Hugging Face's format with room for one more copy of its weights in float32
beside it in the temporary directory.
"""

import argparse
import platform
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from math import nan
from pathlib import Path

from peers import (
    ENVIRONMENTS,
    OURS,
    PEERS,
    Engine,
    MeasurementError,
    environment_of,
    start_ours,
    start_peer,
    versions,
)


def main() -> None:
    options = parse_arguments()
    pythons = {name: environment_of(name, options.environments) for name in options.peers}
    print(f"{platform.machine()}, Python {platform.python_version()}")
    print(versions(Path(sys.executable), ("meshwen", "jax")))
    for name, python in pythons.items():
        print(versions(python, PEERS[name].versions))
    most = max(options.batch)
    for dtype in options.dtype:
        able = [name for name in options.peers if dtype in PEERS[name].dtypes]
        print(f"{'':28}{OURS:>14}" + "".join(f"{name:>24}" for name in able))
        with ExitStack() as stack:
            engines = {OURS: start_ours(stack, options.model, dtype, most)}
            for name in able:
                engines[name] = start_peer(
                    stack, name, options.model, dtype, most, options.environments
                )
            for what, arguments in measurements(options):
                rounds = [
                    {name: measured(engine, what, arguments) for name, engine in engines.items()}
                    for _ in range(options.rounds)
                ]
                show(dtype, what, arguments, rounds)


def measured(engine: Engine, what: str, arguments: tuple[int, ...]) -> float | str:
    """Seconds, or why there are none."""
    try:
        return engine.measure(what, arguments)
    except MeasurementError as error:
        return str(error)


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
