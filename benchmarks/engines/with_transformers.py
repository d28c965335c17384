# SPDX-License-Identifier: Apache-2.0
"""Hugging Face transformers on torch, with the cache and attention that its `generate` uses."""

import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils.logging import disable_progress_bar
from worker import median_seconds


class Transformers:
    def __init__(self, model: str, dtype: str):
        disable_progress_bar()
        torch.set_grad_enabled(False)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))

    def decode(self, batch: int, length: int, steps: int) -> float:
        cache = DynamicCache(config=self.model.config)
        tokens = self._next(torch.ones(batch, length, dtype=torch.long), cache)

        def step() -> None:
            nonlocal tokens
            tokens = self._next(tokens, cache)

        return median_seconds(step, steps)

    def prefill(self, length: int, runs: int) -> float:
        prompt = torch.ones(1, length, dtype=torch.long)
        return median_seconds(
            lambda: self._next(prompt, DynamicCache(config=self.model.config)), runs
        )

    def _next(self, tokens: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        out = self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1:].argmax(dim=-1)


load = Transformers
