# SPDX-License-Identifier: Apache-2.0
"""transformers on one GPU: decode steps and prompts of a published size with made-up weights.

    python benchmarks/gpu_transformers.py --model qwen2.5-7b --batch 1,8,64 --prompt-len 512,4096

Prints JSON as `meshwen bench --json` does, as far as the two have the same: rows of phase, batch,
length and seconds. Needs torch and transformers, and of meshwen its source alone.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from meshwen.presets import PRESETS, preset

WARM_UP = 3


def main() -> None:
    options = parse_arguments()
    model = made_up(options.model, options.device)
    rows = []
    for length in options.prompt_len:
        prompt = torch.ones(1, length, dtype=torch.long, device=options.device)
        cost = median_seconds(
            lambda prompt=prompt: following(model, prompt, DynamicCache(config=model.config)), 5
        )
        rows.append({"phase": "prefill", "batch": 1, "length": length, "seconds": cost})
    for batch in options.batch:
        for length in options.prompt_len:
            rows.append({"phase": "decode", "batch": batch, "length": length})
            rows[-1]["seconds"] = decode(model, batch, length, options.gen_len)
    print(json.dumps({"transformers": True, "rows": rows}))


def made_up(name: str, device: str) -> Qwen2ForCausalLM:
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


def decode(model: Qwen2ForCausalLM, batch: int, length: int, steps: int) -> float | None:
    """Seconds of a greedy step; None where the memory does not suffice."""
    try:
        cache = DynamicCache(config=model.config)
        # One sequence at a time would need another cache: so all prompts at once.
        prompt = torch.ones(batch, length, dtype=torch.long, device=model.device)
        tokens = following(model, prompt, cache)

        def step() -> None:
            nonlocal tokens
            tokens = following(model, tokens, cache)

        return median_seconds(step, steps)
    except torch.OutOfMemoryError:
        return None


@torch.inference_mode()
def following(model: Qwen2ForCausalLM, tokens: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    """The likeliest tokens after `tokens` [B, T]: [B, 1]."""
    out = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    following = out.logits[:, -1:].argmax(dim=-1)
    following.cpu()  # Waits for it.
    return following


def median_seconds(run: Callable[[], object], count: int) -> float:
    seconds = []
    for _ in range(WARM_UP + count):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[WARM_UP:])


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
