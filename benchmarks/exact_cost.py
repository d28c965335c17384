# SPDX-License-Identifier: Apache-2.0
"""What exact numerics costs: its steps beside those of fast numerics, in turns, in one process.

    python benchmarks/exact_cost.py --model PATH --dtype float32 --meshes 1,2,1x8

The least of three medians after warm-up; nothing else should run. One mesh at a time is in memory,
with the weights of both numerics.
"""

import argparse
from collections.abc import Callable

import jax

from meshwen import Qwen2ForCausalLM
from meshwen.bench.measure import decode, first_token
from meshwen.parallel.mesh import MeshSpec, make_mesh

NUMERICS = ("fast", "exact")
ROUNDS = 3


def main() -> None:
    options = parse_arguments()
    meshes = options.meshes.split(",")
    make_mesh(max(meshes, key=lambda mesh: MeshSpec.parse(mesh).devices))
    print(f"jax {jax.__version__}, {options.dtype}, after {options.length} tokens")
    print(f"{'mesh':8}{'measured':22}{'fast':>9}{'exact':>9}{'ratio':>8}")
    for mesh in meshes:
        models = [
            Qwen2ForCausalLM.from_pretrained(
                options.model, mesh=mesh, dtype=options.dtype, numerics=kind
            )
            for kind in NUMERICS
        ]
        for batch in map(int, options.batch.split(",")):
            pair = in_turns(
                lambda model, batch=batch: decode(model.runner, batch, options.length, 6).median,
                models,
            )
            show(mesh, f"decode, batch {batch}, ms", pair)
        pair = in_turns(lambda model: first_token(model.engine, options.prompt, 3).median, models)
        show(mesh, f"prefill {options.prompt}, ms", pair)
        del models  # Not there while the next are loaded.


def in_turns(
    measure: Callable[[Qwen2ForCausalLM], float], models: list[Qwen2ForCausalLM]
) -> list[float]:
    """The least of several medians of each, measured one after the other."""
    rounds = [[measure(model) for model in models] for _ in range(ROUNDS)]
    return [min(seconds) for seconds in zip(*rounds, strict=True)]


def show(mesh: str, what: str, pair: list[float]) -> None:
    fast, exact = (seconds * 1e3 for seconds in pair)
    print(f"{mesh:8}{what:22}{fast:9.1f}{exact:9.1f}{exact / fast:8.2f}", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a checkpoint's folder, GGUF file or hub id")
    parser.add_argument("--meshes", default="1")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--batch", default="1,8,32", help="sequences that decode together")
    parser.add_argument("--length", default=64, type=int, help="tokens of each before decoding")
    parser.add_argument("--prompt", default=512, type=int, help="tokens of the prompt to prefill")
    return parser.parse_args()


if __name__ == "__main__":
    main()
