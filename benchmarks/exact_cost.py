# SPDX-License-Identifier: Apache-2.0
"""What exact numerics costs: its steps beside those of fast numerics, in turns, in one process.

    python benchmarks/exact_cost.py --model PATH --dtype float32 --meshes 1,2,1x8

The least of three medians after warm-up; nothing else should run. One mesh at a time is in memory,
with the weights of both numerics.
"""

import argparse
import gc

import jax
import jax.numpy as jnp

from meshwen.checkpoints import open_checkpoint
from meshwen.loading import load_params
from meshwen.parallel.mesh import MeshSpec, make_mesh
from meshwen.parallel.plan import ParallelPlan
from meshwen.runner import ModelRunner
from speed import decode_seconds, prefill_seconds, sizes

NUMERICS = ("fast", "exact")
ROUNDS = 3


def main() -> None:
    options = parse_arguments()
    meshes = options.meshes.split(",")
    make_mesh(max(meshes, key=lambda mesh: MeshSpec.parse(mesh).devices))
    print(f"jax {jax.__version__}, {options.dtype}, cache of {options.slots} positions")
    print(f"{'mesh':8}{'measured':22}{'fast':>9}{'exact':>9}{'ratio':>8}")
    for mesh in meshes:
        fast, exact = (load(options.model, mesh, options.dtype, kind) for kind in NUMERICS)
        for batch in options.batch_sizes:
            pair = in_turns(
                lambda runner, batch=batch: decode_seconds(runner, batch, options.slots, 6),
                (fast, exact),
            )
            show(mesh, f"decode, batch {batch}, ms", pair)
        pair = in_turns(lambda runner: prefill_seconds(runner, options.prompt), (fast, exact))
        show(mesh, f"prefill {options.prompt}, ms", pair)
        del fast, exact
        gc.collect()


def load(model: str, mesh: str, dtype: str, numerics: str) -> ModelRunner:
    with open_checkpoint(model) as checkpoint:
        plan = ParallelPlan(checkpoint.config, make_mesh(mesh), numerics)
        params = load_params(checkpoint, plan, jnp.dtype(dtype))
        return ModelRunner(plan, jax.block_until_ready(params), jnp.dtype(dtype))


def in_turns(measure, runners) -> list[float]:
    """The least of several medians of each, measured one after the other."""
    rounds = [[measure(runner) for runner in runners] for _ in range(ROUNDS)]
    return [min(seconds) for seconds in zip(*rounds, strict=True)]


def show(mesh: str, what: str, pair: list[float]) -> None:
    fast, exact = (seconds * 1e3 for seconds in pair)
    print(f"{mesh:8}{what:22}{fast:9.1f}{exact:9.1f}{exact / fast:8.2f}", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a checkpoint's folder, GGUF file or hub id")
    parser.add_argument("--meshes", default="1")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--batch-sizes", default=[1, 8, 32], type=sizes, help="e.g. 1,8,32")
    parser.add_argument("--slots", default=128, type=int, help="positions of the cache")
    parser.add_argument("--prompt", default=512, type=int, help="tokens of the prompt to prefill")
    return parser.parse_args()


if __name__ == "__main__":
    main()
