# SPDX-License-Identifier: Apache-2.0
"""Hugging Face transformers on torch, with the cache and attention that its `generate` uses."""

import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils.logging import disable_progress_bar
from worker import median_seconds


class Transformers:
    def __init__(self, model: PreTrainedModel, sequences: int = 1):
        torch.set_grad_enabled(False)
        self.model, self.sequences = model, sequences

    def decode(self, batch: int, length: int, steps: int) -> float:
        cache = DynamicCache(config=self.model.config)
        tokens = self._next(self._prompt(batch, length), cache)

        def step() -> None:
            nonlocal tokens
            tokens = self._next(tokens, cache)

        return median_seconds(step, steps)

    def prefill(self, length: int, runs: int) -> float:
        prompt = self._prompt(1, length)
        return median_seconds(
            lambda: self._next(prompt, DynamicCache(config=self.model.config)), runs
        )

    def answer(
        self, prompts: list[list[int]], warm_up: list[list[int]], limit: int, stop: list[str]
    ) -> dict[str, Any]:
        """See `stepping.Stepping.answer`; by `generate`, as many at a time as there may be."""
        if stop:
            raise NotImplementedError("generate is not asked to stop at text")
        del warm_up  # Nothing is compiled.
        began, tokens = time.perf_counter(), 0
        for first in range(0, len(prompts), self.sequences):
            tokens += self._generate(prompts[first : first + self.sequences], limit)
        seconds, read = time.perf_counter() - began, sum(map(len, prompts))
        return {
            "seconds": seconds,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "prompt_tokens": read,
            "computed_tokens": read,
        }

    def _generate(self, prompts: list[list[int]], limit: int) -> int:
        """Tokens of the answers to some prompts, what fills them up to the longest left out."""
        longest, pad = max(map(len, prompts)), self.model.generation_config.pad_token_id or 0
        ids = torch.tensor([[pad] * (longest - len(one)) + one for one in prompts])
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts])
        out = self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=limit,
            do_sample=False,
            repetition_penalty=1.0,
        )
        ends = self.model.generation_config.eos_token_id
        ended = torch.isin(out[:, longest:], torch.tensor(ends)).int().cumsum(dim=1)
        return int((ended.cumsum(dim=1) <= 1).sum())

    def _prompt(self, batch: int, length: int) -> torch.Tensor:
        return torch.ones(batch, length, dtype=torch.long, device=self.model.device)

    def _next(self, tokens: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        out = self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens = out.logits[:, -1:].argmax(dim=-1)
        tokens.cpu()  # Waits for a GPU.
        return tokens


def load(model: str, dtype: str, sequences: int) -> Transformers:
    disable_progress_bar()
    kind = getattr(torch, dtype)
    return Transformers(AutoModelForCausalLM.from_pretrained(model, dtype=kind), sequences)
