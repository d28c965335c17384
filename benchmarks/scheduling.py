# SPDX-License-Identifier: Apache-2.0
"""What the host does in a decode step: time of a step without that of the compiled programs.

    python benchmarks/scheduling.py
    python benchmarks/scheduling.py --ours before=OLD/src --ours after=src --sequences 32,256

The demo model answers so many prompts at once, so that the programs take little. A line of JSON for
each number of sequences, medians of the steps, in seconds: `step`; `programs`, from the call of one
until its results are there, dispatch included; `host`, the difference: scheduling, inputs, sampling
parameters, text, events; and `thread`, the CPU time that the thread which steps took beside the
programs and with their dispatch, as a check. `compiled` counts programs that were compiled in these
steps: none should be. `--ours` gives versions' source folders, each run in turn in a process of its
own; without any it is the package that is installed.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WARM_UP = 4
IM_START = 1022  # the demo model's <|im_start|>, which it never answers with
COMPILATION = "/jax/core/compile/backend_compile_duration"


def main() -> None:
    options = parse_arguments()
    if not options.ours:
        for sequences in map(int, options.sequences.split(",")):
            print(json.dumps(measured(sequences, options.steps)), flush=True)
        return
    same = ["--sequences", options.sequences, "--steps", str(options.steps)]
    for _ in range(options.rounds):
        for one in options.ours:
            name, _, source = one.partition("=")
            environment = os.environ | {"PYTHONPATH": str(Path(source).resolve())}
            done = subprocess.run(
                [sys.executable, __file__, *same],
                check=True,
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
            for line in done.stdout.splitlines():
                print(json.dumps({"engine": name} | json.loads(line)), flush=True)


def measured(sequences: int, steps: int) -> dict[str, float]:
    """Medians of steps in which every sequence gets a token."""
    import jax

    from meshwen import AutoModelForCausalLM
    from meshwen.engine.request import Request
    from meshwen.engine.sampling_params import SamplingParams

    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **more: compiled.append(event) if event == COMPILATION else None
    )
    with endless_demo() as folder:
        model = AutoModelForCausalLM.from_pretrained(folder, max_num_seqs=sequences)
    engine, came = model.engine, [0] * sequences

    def count(number: int) -> None:
        came[number] += 1

    sampling = SamplingParams(max_new_tokens=768)
    for number in range(sequences):
        prompt = [number % 97 + 3, number % 89 + 3, *range(5, 35)]
        engine.submit(Request(tuple(prompt), sampling), lambda event, number=number: count(number))
    while not all(came):
        engine.step()
    for _ in range(WARM_UP):
        engine.step()
    before, programs = sum(came), len(compiled)
    threads = [thread_seconds(engine.step) for _ in range(steps)]
    with timed_programs() as inside:
        rows = []
        for _ in range(steps):
            inside.clear()
            began = time.perf_counter()
            engine.step()
            rows.append((time.perf_counter() - began, sum(inside)))
    if sum(came) - before != 2 * steps * sequences:
        raise SystemExit(f"{2 * steps} steps gave {sum(came) - before} tokens")
    return {
        "sequences": sequences,
        "step": statistics.median(step for step, _ in rows),
        "programs": statistics.median(inside for _, inside in rows),
        "host": statistics.median(step - inside for step, inside in rows),
        "thread": statistics.median(threads),
        "compiled": len(compiled) - programs,
    }


@contextmanager
def endless_demo() -> Iterator[Path]:
    """The demo model in a folder, with an end of text that it never gives."""
    from meshwen import demo

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "demo"
        shutil.copytree(Path(demo.__file__).parent, folder, ignore=lambda *_: ["__pycache__"])
        path = folder / "generation_config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"eos_token_id": IM_START}))
        yield folder


@contextmanager
def timed_programs() -> Iterator[list[float]]:
    """Collects the seconds of each compiled program, from its call until its results are there.

    Needs `ShapedProgram`, by which every version calls its programs.
    """
    import jax

    from meshwen.runtime.programs import ShapedProgram

    seconds: list[float] = []
    original = ShapedProgram.__call__

    def timed(self, *arguments, **static):
        began = time.perf_counter()
        try:
            return jax.block_until_ready(original(self, *arguments, **static))
        finally:
            seconds.append(time.perf_counter() - began)

    ShapedProgram.__call__ = timed
    try:
        yield seconds
    finally:
        ShapedProgram.__call__ = original


def thread_seconds(run) -> float:
    began = time.thread_time()
    run()
    return time.thread_time() - began


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ours", action="append", metavar="NAME=SOURCE")
    parser.add_argument("--sequences", default="32,256", help="at once")
    parser.add_argument("--steps", default=100, type=int, help="of each of the two measurements")
    parser.add_argument("--rounds", default=3, type=int, help="of all versions, with --ours")
    return parser.parse_args()


if __name__ == "__main__":
    main()
