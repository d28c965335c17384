# SPDX-License-Identifier: Apache-2.0
"""vLLM on CPUs, in one process, other settings as they are; its cache of prefixes is on."""

import os
from collections.abc import Sequence

from stepping import Answer, Stepping

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "4",  # GiB
}

from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind


class Vllm(Stepping):
    def __init__(self, model: str, dtype: str, sequences: int):
        loaded = LLM(model, dtype=dtype, max_num_seqs=sequences)
        self.engine = loaded.llm_engine
        self.answers: dict[str, Answer] = {}  # By their number, as text.

    def submit(
        self, prompt: list[int], limit: int, *, whole: bool = False, stop: Sequence[str] = ()
    ) -> Answer:
        sampling = SamplingParams(
            temperature=0,
            max_tokens=limit,
            ignore_eos=whole,
            stop=list(stop),
            output_kind=RequestOutputKind.DELTA,
        )
        answer = Answer(len(self.answers), len(prompt))
        name = str(answer.number)
        self.answers[name] = answer
        # The engine adds something to the name that it gives events.
        self.engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        return answer

    def step(self) -> None:
        for one in self.engine.step():
            answer = self.answers[one.request_id]
            answer.add(one.outputs[0].token_ids)
            answer.done = one.finished
            if one.num_cached_tokens is not None:
                answer.cached = one.num_cached_tokens

    def cancel(self, answer: Answer) -> None:
        self.engine.abort_request([str(answer.number)])


load = Vllm
