# SPDX-License-Identifier: Apache-2.0
"""Measures a model on this machine: loading, memory, prefill and decode.

    python benchmarks/speed.py --model PATH --dtype float32 --mesh 1 --batch-sizes 1,8,32

One process measures one dtype on one mesh, so that peak memory is its own. Medians of several runs
after warm-up; nothing else should run. Decode is a step of the whole batch, sampling included;
prefill is one prompt. `--json` prints the numbers as one object.
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from meshwen.checkpoints import open_checkpoint
from meshwen.loading import load_params
from meshwen.parallel.mesh import make_mesh
from meshwen.parallel.plan import ParallelPlan
from meshwen.runner import ModelRunner
from meshwen.sampling import SamplerRows, SamplingMethod, SamplingParams

GREEDY = SamplingMethod(candidates=1, penalize=False, logprobs=False)
WARM_UP = 2


def main() -> None:
    options = parse_arguments()
    mesh, dtype = make_mesh(options.mesh), jnp.dtype(options.dtype)
    jax.block_until_ready(jnp.zeros(1))
    before = peak_memory()
    with open_checkpoint(options.model) as checkpoint:
        plan = ParallelPlan(checkpoint.config, mesh)
        began = time.perf_counter()
        params = jax.block_until_ready(load_params(checkpoint, plan, dtype))
        load_seconds = time.perf_counter() - began
    weights = sum(
        shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards
    )
    report = {
        "jax": jax.__version__,
        "mesh": options.mesh,
        "dtype": options.dtype,
        "load_seconds": load_seconds,
        "weight_bytes": weights,
        "peak_bytes_above_weights": peak_memory() - weights,
        "peak_bytes_before_loading": before,
    }
    runner = ModelRunner(plan, params, dtype)
    for batch in options.batch_sizes:
        seconds = decode_seconds(runner, batch, options.slots, options.steps)
        report[f"decode_ms_batch_{batch}"] = seconds * 1e3
    report["prefill_tokens_per_second"] = options.prompt / prefill_seconds(runner, options.prompt)
    if options.json:
        print(json.dumps(report))
    else:
        for name, value in report.items():
            print(f"{name:28}{value:,.1f}" if isinstance(value, float) else f"{name:28}{value}")


def decode_seconds(runner: ModelRunner, batch: int, slots: int, steps: int) -> float:
    """Median seconds of a greedy decode step in the middle of a cache of `slots` positions."""
    rows = SamplerRows.of([SamplingParams()] * batch)
    cache = runner.empty_cache(batch, slots)
    tokens = np.ones(batch, np.int32)

    def step(number: int) -> None:
        nonlocal cache, tokens
        positions = np.full(batch, slots // 2 + number, np.int32)
        sampled, _, cache = runner.decode(cache, tokens, positions, rows, None, GREEDY)
        tokens = np.asarray(sampled.tokens)

    return median_seconds(step, steps)


def prefill_seconds(runner: ModelRunner, length: int) -> float:
    """Median seconds to read one prompt of `length` tokens."""
    hidden, cache = runner.empty_hidden(1), runner.empty_cache(1, length)
    ids, lengths = np.ones((1, length), np.int32), np.array([length], np.int32)
    row = np.zeros(1, np.int32)

    def read(number: int) -> None:
        nonlocal hidden, cache
        hidden, cache = runner.prefill(cache, hidden, ids, row, np.int32(0), lengths, length)
        jax.block_until_ready(hidden)

    return median_seconds(read, 3)


def median_seconds(run: Callable[[int], None], count: int) -> float:
    seconds = []
    for number in range(WARM_UP + count):
        began = time.perf_counter()
        run(number)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[WARM_UP:])


def peak_memory() -> int:
    """Peak resident bytes of this process (Linux counts KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a checkpoint's folder, GGUF file or hub id")
    parser.add_argument("--mesh", default="1")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--batch-sizes", default=[1, 8, 32], type=sizes, help="e.g. 1,8,32")
    parser.add_argument("--slots", default=128, type=int, help="positions of the cache")
    parser.add_argument("--steps", default=12, type=int, help="decode steps to take the median of")
    parser.add_argument("--prompt", default=512, type=int, help="tokens of the prompt to prefill")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",")]


if __name__ == "__main__":
    main()
