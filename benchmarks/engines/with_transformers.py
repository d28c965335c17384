# SPDX-License-Identifier: Apache-2.0
"""Hugging Face transformers on torch, with the cache and attention that its `generate` uses."""

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils.logging import disable_progress_bar
from worker import median_seconds


class Transformers:
    def __init__(self, model: PreTrainedModel):
        torch.set_grad_enabled(False)
        self.model = model

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

    def _prompt(self, batch: int, length: int) -> torch.Tensor:
        return torch.ones(batch, length, dtype=torch.long, device=self.model.device)

    def _next(self, tokens: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        out = self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens = out.logits[:, -1:].argmax(dim=-1)
        tokens.cpu()  # Waits for a GPU.
        return tokens


def load(model: str, dtype: str) -> Transformers:
    disable_progress_bar()
    kind = getattr(torch, dtype)
    return Transformers(AutoModelForCausalLM.from_pretrained(model, dtype=kind))
