# SPDX-License-Identifier: Apache-2.0
"""Runs the full-size Qwen2.5-7B, with dummy weights, on simulated devices of this machine.

    python benchmarks/full_size_7b.py 1x8
    python benchmarks/full_size_7b.py 1x32

Needs about 18 GiB of memory: the weights are 15.2 GB in bfloat16, and 16.9 GB on 32 devices, where
each key/value head has eight copies.
"""

import resource
import sys
import time

import jax

from meshwen import Qwen2ForCausalLM


def main() -> None:
    mesh = sys.argv[1] if len(sys.argv) > 1 else "1x8"
    began = time.perf_counter()
    model = Qwen2ForCausalLM.from_pretrained("qwen2.5-7b", mesh=mesh, load_format="dummy")
    jax.block_until_ready(model.params)
    loaded = time.perf_counter()
    devices = model.mesh.devices.size
    print(f"{mesh}: weights on {devices} devices in {loaded - began:.0f} s")
    prompt = list(range(1, 13))
    completion = model.generate(prompt, temperature=0, max_new_tokens=4)[0]
    print(f"4 tokens {list(completion.tokens)} in {time.perf_counter() - loaded:.0f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak memory {peak / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
