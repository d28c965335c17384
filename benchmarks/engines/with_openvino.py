# SPDX-License-Identifier: Apache-2.0
"""OpenVINO GenAI's continuous batching, other settings as they are, so with its cache in 8 bits.

Its cache of prefixes is on. It does not say what it had in it.
"""

from collections.abc import Sequence

import numpy as np
import openvino_genai as genai
from openvino import Tensor
from stepping import Answer, Stepping


class OpenVino(Stepping):
    def __init__(self, model: str, dtype: str, sequences: int):
        del dtype  # The file has it.
        scheduling = genai.SchedulerConfig()
        scheduling.max_num_seqs = sequences
        scheduling.cache_size = 4  # GiB
        scheduling.enable_prefix_caching = True
        self.engine = genai.ContinuousBatchingPipeline(model, scheduling, "CPU")
        self.running: dict[int, tuple[Answer, object]] = {}
        self.submitted = 0

    def submit(
        self, prompt: list[int], limit: int, *, whole: bool = False, stop: Sequence[str] = ()
    ) -> Answer:
        config = genai.GenerationConfig(max_new_tokens=limit, ignore_eos=whole)
        config.stop_strings = set(stop)
        answer = Answer(self.submitted, len(prompt))
        self.submitted += 1
        tokens = Tensor(np.array([prompt], np.int64))
        handle = self.engine.add_request(answer.number, tokens, config)
        self.running[answer.number] = answer, handle
        return answer

    def step(self) -> None:
        self.engine.step()
        for answer, handle in list(self.running.values()):
            while handle.can_read():
                for output in handle.read().values():
                    answer.add(output.generated_ids)
            if handle.get_status() != genai.GenerationStatus.RUNNING:
                answer.done = True
                del self.running[answer.number]

    def cancel(self, answer: Answer) -> None:
        if answer.number in self.running:
            self.running.pop(answer.number)[1].cancel()


load = OpenVino
