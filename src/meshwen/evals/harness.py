# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness drives meshwen: its model named `meshwen`.

The harness has no point for plug-ins, so what names the model has to import this module first:
`meshwen eval harness` does, and so does a program that imports it before it calls
`lm_eval.simple_evaluate(model="meshwen", model_args={"pretrained": "demo", "mesh": "1x8"}, ...)`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from meshwen.causal_lm import CausalLM
from meshwen.engine.request import Request
from meshwen.engine.sampling_params import SamplingParams
from meshwen.errors import MeshwenError
from meshwen.runtime.jax_settings import own_settings

logger = logging.getLogger(__name__)

_MAX_NEW_TOKENS = 256  # The harness's own default.
_Pair = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("meshwen")
class MeshwenLM(TemplateLM):
    """A model of meshwen's, as the harness holds it.

    Args:
        pretrained: what `CausalLM.from_pretrained` takes.
        batch_size: answers that are generated at once; "auto" is 32. Log-probabilities come one
            text at a time, in one pass whose attention scores grow with the square of its length:
            `max_model_len` cuts the windows of long texts.
        max_batch_size: the harness's; not used.
        device: the harness's; not used: `mesh` says where the model lies.
        options: more for `from_pretrained`: mesh, dtype, numerics, quantization, max_model_len,
            revision. A mesh with a comma, "data=2,model=4", the harness's own command line takes in
            JSON alone.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ):
        super().__init__()
        for name in {"mesh", "revision"} & options.keys():  # The harness makes numbers of digits.
            options[name] = str(options[name])
        rows = 32 if str(batch_size).startswith("auto") else int(batch_size)
        self._model = CausalLM.from_pretrained(pretrained, max_num_seqs=rows, **options)
        if self._model.tokenizer is None:
            raise MeshwenError(f"{pretrained} has no tokenizer, so the harness cannot use it")
        self._tokenizer = self._model.tokenizer
        self._name = pretrained
        self._max_length = options.get("max_model_len") or self._model.config.context_length

    @property
    def eot_token_id(self) -> int:
        """The token before a text without context."""
        return self._tokenizer.eos_token_ids[0]

    @property
    def max_length(self) -> int:
        """The most tokens of context and answer."""
        return int(self._max_length)

    @property
    def tokenizer_name(self) -> str:
        """What cached requests are told apart by."""
        return self._name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The harness notes it; the tokenizer applies its own."""
        return self._name if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a conversation."""
        return self._tokenizer.apply_chat_template(
            chat_history, add_generation_prompt=add_generation_prompt
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids of a text. Qwen's tokenizers put no special token before a text."""
        return self._tokenizer.encode(string, add_special_tokens=bool(add_special_tokens))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers to prompts; all go to the engine at once, which keeps its batch full."""
        converted = [self._request(*request.args) for request in requests]
        texts = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="meshwen") as bar:
            for event in self._model.engine.run(converted):
                if event.completion is not None:
                    if event.completion.error is not None:
                        raise MeshwenError(event.completion.error)
                    texts[event.request] = event.completion.text
                    self.cache_hook.add_partial(
                        "generate_until", requests[event.request].args, event.completion.text
                    )
                    bar.update()
        return texts

    def _request(self, context: str, given: Mapping[str, Any]) -> Request:
        sampling = sampling_params(given, self._tokenizer.eos_token)
        tokens = self.tok_encode(context)
        most = self.max_length - sampling.max_new_tokens
        if most < 1:
            raise MeshwenError(
                f"max_gen_toks {sampling.max_new_tokens} leaves no room for a prompt in "
                f"{self.max_length} tokens"
            )
        if len(tokens) > most:  # As the harness does for other models.
            logger.warning("a prompt of %d tokens loses all but its last %d", len(tokens), most)
        return Request(tuple(tokens[-most:]), sampling)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probabilities of whole texts, in windows where they are longer than the context."""
        found = []
        for request in tqdm(requests, disable=disable_tqdm, desc="meshwen"):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs: list[_Pair] = [(None, *utils.make_disjoint_window(w)) for w in windows]
            scored = self._loglikelihood_tokens(pairs, disable_tqdm=True)
            total = sum(logprob for logprob, _ in scored)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            found.append(total)
        return found

    @own_settings()
    def _loglikelihood_tokens(
        self, requests: Sequence[_Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found = []
        for strings, context, continuation in tqdm(requests, disable=disable_tqdm, desc="meshwen"):
            tokens = [*context, *continuation][-(self.max_length + 1) :]
            targets = jnp.asarray(continuation[-len(tokens) + 1 :])
            logits = self._model(np.array([tokens[:-1]]))[0, -len(targets) :]
            logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)
            greedy = bool((logits.argmax(axis=1) == targets).all())
            total = float(np.sum(np.asarray(logprobs, np.float64)))
            if not isfinite(total):
                raise MeshwenError("the model's logits are NaN or infinite: it cannot be scored")
            found.append((total, greedy))
            if strings is not None:
                self.cache_hook.add_partial("loglikelihood", strings, found[-1])
        return found


def sampling_params(given: Mapping[str, Any], eos_token: str | None = None) -> SamplingParams:
    """The harness's generation arguments, which are transformers', as sampling parameters.

    Args:
        given: what a task says.
        eos_token: the tokenizer's, at which an answer ends too, as in the harness's own models.

    Raises:
        MeshwenError: one is not known here, or has an impossible value.
    """
    given = dict(given)
    until = given.pop("until", ()) or ()
    stop = (until,) if isinstance(until, str) else tuple(until)
    values = {
        "max_new_tokens": given.pop("max_gen_toks", _MAX_NEW_TOKENS),
        # The harness passes over empty strings.
        "stop": tuple(dict.fromkeys(s for s in (*stop, eos_token) if s)),
    }
    sample = given.pop("do_sample", bool(given.get("temperature")))
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"):
        if given.get(name) is not None:
            values[name] = given[name]
        given.pop(name, None)
    if not sample:
        values["temperature"] = 0.0
    else:
        values.setdefault("temperature", 1.0)
    if given:
        raise MeshwenError(f"the generation argument {next(iter(given))!r} is not supported")
    return SamplingParams(**values)
