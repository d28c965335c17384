# SPDX-License-Identifier: Apache-2.0
"""transformers on one GPU: decode steps and prompts of a published size with dummy weights.

    python benchmarks/engines/gpu_transformers.py --model qwen2.5-7b --batch 1,8,64

Prints JSON as `meshwen bench --json` does, as far as the two have the same: rows of phase, batch,
length and seconds. Needs torch and transformers, and of meshwen its source alone.
"""

import argparse
import json

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from with_transformers import Transformers

from meshwen.models.presets import PRESETS, preset

PROMPTS = 5  # to prefill, of which the median counts


def main() -> None:
    options = parse_arguments()
    engine = Transformers(dummy_model(options.model, options.device))
    rows = [
        {"phase": "prefill", "batch": 1, "length": n, "seconds": engine.prefill(n, PROMPTS)}
        for n in options.prompt_len
    ]
    for batch in options.batch:
        for length in options.prompt_len:
            seconds = decode(engine, batch, length, options.gen_len)
            rows.append({"phase": "decode", "batch": batch, "length": length, "seconds": seconds})
    print(json.dumps({"rows": rows}))


def decode(engine: Transformers, batch: int, length: int, steps: int) -> float | None:
    """Seconds of a step; None where the memory does not suffice."""
    try:
        return engine.decode(batch, length, steps)
    except torch.OutOfMemoryError:
        return None


def dummy_model(name: str, device: str) -> Qwen2ForCausalLM:
    """A model in bfloat16 whose weights mean nothing."""
    size = preset(name)
    config = Qwen2Config(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_hidden_layers,
        num_attention_heads=size.num_attention_heads,
        num_key_value_heads=size.num_key_value_heads,
        max_position_embeddings=size.max_position_embeddings,
        tie_word_embeddings=size.tie_word_embeddings,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        return Qwen2ForCausalLM(config).eval()


def parse_arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(one) for one in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-7b", choices=PRESETS)
    parser.add_argument("--batch", default="1,8,64", type=numbers)
    parser.add_argument("--prompt-len", default="512,4096", type=numbers)
    parser.add_argument("--gen-len", default=16, type=int)
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


if __name__ == "__main__":
    main()
