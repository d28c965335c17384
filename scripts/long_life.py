# SPDX-License-Identifier: Apache-2.0
"""What memory and maps a long life of mixed requests takes: both should stay as they are.

    PYTHONPATH=tests python scripts/long_life.py [ROUNDS] [KEPT]

Each round asks a model of one layer for answers of random
lengths, number and sampling: mostly shapes that it has not had. Prints the programs that are kept
(KEPT at most, by default as many as usual), memory maps and resident memory. Linux alone.
"""

from __future__ import annotations

import gc
import random
import sys

import jax

from mesh_model import MeshModel
from meshwen.engine.engine import Engine
from meshwen.engine.options import EngineOptions
from meshwen.engine.request import Request
from meshwen.engine.sampling_params import SamplingParams
from meshwen.ops.cpu.xla import XlaOnCpu
from tiny_model import ONE_LAYER

LENGTHS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
TEMPERATURES = (0.0, 0.7)
TOP_K = (0, 3, 40, 200)


def maps_and_megabytes() -> tuple[int, int]:
    """Memory maps, and resident memory, of this process."""
    gc.collect()
    with open("/proc/self/maps") as maps, open("/proc/self/status") as status:
        resident = next(line for line in status if line.startswith("VmRSS"))
        return sum(1 for _ in maps), int(resident.split()[1]) >> 10


def requests(draw: random.Random) -> list[Request]:
    """One to eight that ask for alike lengths and the same sampling."""
    length = draw.choice(LENGTHS)
    sampling = SamplingParams(
        max_new_tokens=2,
        temperature=draw.choice(TEMPERATURES),
        top_k=draw.choice(TOP_K),
        top_p=draw.choice((1.0, 0.9)),
        repetition_penalty=draw.choice((1.0, 1.2)),
        frequency_penalty=draw.choice((0.0, 0.5)),
        logprobs=draw.random() < 0.5,
    )
    prompts = (range(draw.randint(length // 2, length - 2)) for _ in range(draw.randint(1, 8)))
    return [Request(tuple(i % 256 for i in prompt), sampling) for prompt in prompts]


def main(rounds: int, kept: int) -> None:
    """Prints a line every tenth of the rounds."""
    jax.config.update("jax_disable_most_optimizations", True)
    XlaOnCpu.programs = kept
    model = MeshModel(ONE_LAYER, "1").runner
    draw = random.Random(0)
    print("rounds  programs  maps  MB")
    for number in range(1, rounds + 1):
        # An engine of its own makes a cache of its own size.
        for _ in Engine(model, None, (), EngineOptions().cache_plan(model.model)).run(
            requests(draw)
        ):
            pass
        if number % max(1, rounds // 10) == 0:
            maps, megabytes = maps_and_megabytes()
            print(f"{number:6}  {len(model._programs):8}  {maps}  {megabytes}", flush=True)


if __name__ == "__main__":
    given = [int(argument) for argument in sys.argv[1:]]
    main(given[0] if given else 100, given[1] if len(given) > 1 else XlaOnCpu.programs)
