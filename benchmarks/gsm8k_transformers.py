# SPDX-License-Identifier: Apache-2.0
"""GSM8K problems through meshwen and through transformers' `generate`, side by side.

    python benchmarks/gsm8k_transformers.py --model PATH --data test.jsonl --dtype bfloat16
    python benchmarks/gsm8k_transformers.py --model PATH --data test.jsonl --dtype float32 --tokens

Both get the same prompts (style qwen-boxed), batch size and limit of tokens, and answer greedily;
each runs in a process of its own, one after the other. The first form prints tokens per second,
prefill and compilation included. With --tokens answers are compared too: exit status 1
unless every answer has the same tokens up to a place where transformers' own two likeliest tokens
are less than --margin apart, beyond which either may follow. (Margins cost transformers time, so
its speed is not to be taken from there.) Needs the extra `transformers`.
"""

import argparse
import multiprocessing
import sys
import time
from pathlib import Path

from meshwen.evals.gsm8k import question
from meshwen.evals.problems import read_problems
from meshwen.evals.styles import prompt_style
from meshwen.tokenizer.tokenizer import Tokenizer


def main() -> None:
    options = parse_arguments()
    prompts = prompts_of(options)
    spawn = multiprocessing.get_context("spawn")
    found = {}
    for name, answer in (("transformers", by_transformers), ("meshwen", by_meshwen)):
        with spawn.Pool(1) as pool:  # Threads and memory of one are not in the other's way.
            found[name] = pool.apply(answer, (options, prompts))
        seconds, tokens = found[name]["seconds"], sum(map(len, found[name]["tokens"]))
        print(f"{name:14}{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s")
    ratio = found["transformers"]["seconds"] / found["meshwen"]["seconds"]
    print(f"transformers takes {ratio:.2f} times as long, {options.batch_size} at a time")
    if options.tokens and not compare(found["meshwen"], found["transformers"], options.margin):
        sys.exit(1)


def prompts_of(options: argparse.Namespace) -> list[list[int]]:
    """The problems as both get them."""
    from meshwen.checkpoints import open_checkpoint

    with open_checkpoint(str(options.model)) as checkpoint:
        tokenizer = Tokenizer.from_checkpoint(checkpoint)
    style = prompt_style("qwen-boxed")
    problems = read_problems(options.data)[: options.limit]
    return [list(question(one, style, [], tokenizer).token_ids) for one in problems]


def by_meshwen(options: argparse.Namespace, prompts: list[list[int]]) -> dict:
    from meshwen import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(
        options.model, dtype=options.dtype, max_num_seqs=options.batch_size
    )
    began = time.perf_counter()
    done = model.generate(prompts, max_new_tokens=options.max_new_tokens, temperature=0)
    return {"seconds": time.perf_counter() - began, "tokens": [list(c.tokens) for c in done]}


def by_transformers(options: argparse.Namespace, prompts: list[list[int]]) -> dict:
    import torch
    from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends)

    class Margins(LogitsProcessor):
        def __call__(self, _, scores):
            best = scores.float().topk(2, dim=-1).values
            margins.append((best[:, 0] - best[:, 1]).tolist())
            return scores

    found: dict = {"tokens": [], "margins": []}
    began = time.perf_counter()
    for first in range(0, len(prompts), options.batch_size):
        batch = prompts[first : first + options.batch_size]
        longest, margins = max(map(len, batch)), []
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in batch])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch])
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=options.max_new_tokens,
                do_sample=False,
                repetition_penalty=1.0,
                logits_processor=LogitsProcessorList([Margins()] if options.tokens else []),
            )
        for row, answer in enumerate(out[:, longest:].tolist()):
            end = next((at for at, token in enumerate(answer) if token in ends), len(answer) - 1)
            found["tokens"].append(answer[: end + 1])
            found["margins"].append([step[row] for step in margins])
    return found | {"seconds": time.perf_counter() - began}


def compare(ours: dict, theirs: dict, margin: float) -> bool:
    """Prints where answers part; whether each does so at a near-tie only."""
    same, bad = 0, 0
    rows = zip(ours["tokens"], theirs["tokens"], theirs["margins"], strict=True)
    for number, (mine, reference, margins) in enumerate(rows):
        if mine == reference:
            same += 1
            continue
        pairs = zip(mine, reference, strict=False)
        place = next(
            (i for i, (a, b) in enumerate(pairs) if a != b), min(len(mine), len(reference))
        )
        ended = place == len(reference)  # Theirs has no margin there.
        near = not ended and margins[place] < margin
        bad += not near
        there = "where theirs ends" if ended else f"margin {margins[place]:.2g}"
        verdict = "a near-tie" if near else "NOT a near-tie"
        print(f"problem {number}: parts at token {place}, {there}, {verdict}")
    print(f"{same} of {len(ours['tokens'])} answers have the same tokens, {bad} part without a tie")
    return bad == 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, type=Path, help="a checkpoint's folder")
    parser.add_argument("--data", required=True, type=Path, help="GSM8K's test.jsonl")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--limit", default=64, type=int, help="the first so many problems")
    parser.add_argument("--batch-size", default=32, type=int)
    parser.add_argument("--max-new-tokens", default=320, type=int)
    parser.add_argument("--tokens", action="store_true", help="compare the answers too")
    parser.add_argument("--margin", default=1e-3, type=float, help="of logits, for a near-tie")
    return parser.parse_args()


if __name__ == "__main__":
    main()
