# SPDX-License-Identifier: Apache-2.0
"""Serving: versions of meshwen, and other engines, under the load of several users.

    python benchmarks/serving.py --model PATH --data GSM8K --ours before=OLD/src --ours after=src

Scenarios (`--scenarios`, one or more of):

    decode    steps of 1, 8 and 32 answers after 128 and 2,048 tokens; a prompt of 512 tokens, new
              and again
    prefill   the prompt alone
    chat      time to the first token of the last of ten turns, of about 100 tokens each
    few_shot  64 GSM8K problems after the same five solved ones, 32 at once
    answers   64 GSM8K problems as conversations, 32 at once, up to 256 tokens each
    arrivals  time between the tokens of four answers while three prompts of 4,096 tokens arrive
    memory    bytes of the KV cache of 32 sequences of 1,024 tokens and one of 16,384 at once

Every result is a line of JSON, as it comes; at the end a table has the least of each engine's
rounds. In `decode` and `prefill` all engines are loaded before the first measurement and take
turns; in the others each measurement has a process of its own, so that nothing is cached before.
Programs are compiled before anything counts. Nothing else should run. `--ours NAME=SOURCE` is a
version's source folder, its kernels compiled (`make kernels`); without any it is the package that
is installed. GSM8K is a folder with test.jsonl and train.jsonl. Of the peers, vllm, openvino and
openvino-q4_0 can all but `memory`, transformers `answers` and a new prompt; what an engine cannot
is an error in its line.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from peers import ENVIRONMENTS, OURS, PEERS, Engine, MeasurementError, start_ours, start_peer
from workloads import Measurement, Workloads

TOGETHER = ("decode", "prefill")  # All engines are loaded at once.
SCENARIOS = (*TOGETHER, "chat", "few_shot", "answers", "arrivals", "memory")
SEQUENCES = 32  # at once
Start = Callable[[ExitStack], Engine]
Found = dict[str, Any]
Rows = dict[tuple[str, str], dict[str, float]]  # Of scenario and measurement, by engine.


def main() -> None:
    options = parse_arguments()
    workloads = Workloads(options.model, options.data, options.problems, options.steps)
    least: Rows = {}
    for dtype in options.dtype:
        for scenario in options.scenarios:
            engines = starts(options, scenario, dtype)
            measurements = list(getattr(workloads, scenario)())
            run = together if scenario in TOGETHER else one_by_one
            for name, one, found in run(engines, measurements, options.rounds):
                line = {"scenario": scenario, "measured": one.name, "dtype": dtype, "engine": name}
                print(json.dumps(line | found | {"load": os.getloadavg()[0]}), flush=True)
                if "error" not in found:
                    value = found["seconds"] * 1e3 if "seconds" in found else found["ratio"]
                    row = least.setdefault((f"{dtype} {scenario}", one.name), {})
                    row[name] = min(value, row.get(name, value))
    show(least)


def starts(options: argparse.Namespace, scenario: str, dtype: str) -> dict[str, Start]:
    """What starts each engine that can keep weights in a dtype."""
    # The long sequence is one more.
    sequences = SEQUENCES + 1 if scenario == "memory" else SEQUENCES
    found: dict[str, Start] = {}
    for name, source in options.ours or [(OURS, None)]:
        found[name] = partial(
            start_ours, model=options.model, dtype=dtype, sequences=sequences, source=source
        )
    for name in options.peers:
        if dtype in PEERS[name].dtypes:
            found[name] = partial(
                start_peer,
                name=name,
                model=options.model,
                dtype=dtype,
                sequences=sequences,
                folder=options.environments,
            )
    return found


def together(
    engines: dict[str, Start], measurements: list[Measurement], rounds: int
) -> Iterator[tuple[str, Measurement, Found]]:
    """All measurements in turns: each round of one has every engine once."""
    with ExitStack() as stack:
        running = {name: start(stack) for name, start in engines.items()}
        for one in measurements:
            for number in range(rounds):
                for name in in_turn(list(running), number):
                    yield name, one, measured(running[name], one)


def one_by_one(
    engines: dict[str, Start], measurements: list[Measurement], rounds: int
) -> Iterator[tuple[str, Measurement, Found]]:
    """The same, with a new process for each."""
    for one in measurements:
        for number in range(rounds):
            for name in in_turn(list(engines), number):
                with ExitStack() as stack:
                    try:
                        engine = engines[name](stack)
                    except MeasurementError as error:
                        yield name, one, {"error": str(error)}
                        continue
                    yield name, one, measured(engine, one)


def in_turn(names: list[str], number: int) -> list[str]:
    """Each second round the other way round: what changes with time is in nobody's favour."""
    return names[:: -1 if number % 2 else 1]


def measured(engine: Engine, one: Measurement) -> Found:
    try:
        found = engine.measure(one.method, one.arguments)
    except MeasurementError as error:
        return {"error": str(error)}
    return found if isinstance(found, dict) else {"seconds": found}


def show(least: Rows) -> None:
    """A table, on standard error: milliseconds or a ratio; and over that of the first engine."""
    names = list(dict.fromkeys(name for row in least.values() for name in row))
    print(f"{'':48}" + "".join(f"{name:>24}" for name in names), file=sys.stderr)
    for (scenario, what), row in least.items():
        first = next(iter(row.values()))
        cells = (
            f"{row[name]:14,.1f}{row[name] / first:8.2f} x" if name in row else f"{'':24}"
            for name in names
        )
        print(f"{scenario + ', ' + what:48}" + "".join(cells), file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    def words(text: str) -> list[str]:
        return text.split(",")

    def version(text: str) -> tuple[str, Path]:
        name, _, source = text.partition("=")
        if not (Path(source) / "meshwen").is_dir():
            raise argparse.ArgumentTypeError(f"{text} is no NAME=FOLDER with the package meshwen")
        return name, Path(source)

    def scenarios(text: str) -> list[str]:
        for one in words(text):
            if one not in SCENARIOS:
                raise argparse.ArgumentTypeError(f"{one} is none of {', '.join(SCENARIOS)}")
        return words(text)

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a checkpoint's folder")
    parser.add_argument("--data", required=True, type=Path, help="GSM8K's folder")
    parser.add_argument("--ours", action="append", type=version, metavar="NAME=SOURCE")
    parser.add_argument(
        "--peers", default=[], type=words, help=f"to compare with: {', '.join(PEERS)}"
    )
    parser.add_argument("--dtype", default=["bfloat16"], type=words, help="bfloat16,int8,float32")
    parser.add_argument("--scenarios", default=list(SCENARIOS[:1] + SCENARIOS[2:]), type=scenarios)
    parser.add_argument("--rounds", default=3, type=int)
    parser.add_argument("--problems", default=64, type=int)
    parser.add_argument("--steps", default=16, type=int, help="of decoding, a round")
    parser.add_argument("--environments", default=ENVIRONMENTS, type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
