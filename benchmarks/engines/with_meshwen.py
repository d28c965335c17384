# SPDX-License-Identifier: Apache-2.0
"""meshwen on one device, fast numerics, by what its public API has had in every version."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from stepping import Answer, Stepping, random_prompt

from meshwen import AutoModelForCausalLM
from meshwen.engine.request import Event, Request
from meshwen.engine.sampling_params import SamplingParams
from meshwen.runtime.compilation_cache import enable_compilation_cache


class Meshwen(Stepping):
    def __init__(self, model: str, dtype: str, sequences: int):
        enable_compilation_cache()  # As the command line does.
        options = {"quantization": "int8"} if dtype == "int8" else {"dtype": dtype}
        self.model = AutoModelForCausalLM.from_pretrained(model, max_num_seqs=sequences, **options)
        self.engine = self.model.engine

    def submit(
        self, prompt: list[int], limit: int, *, whole: bool = False, stop: Sequence[str] = ()
    ) -> Answer:
        sampling = SamplingParams(
            max_new_tokens=limit, min_new_tokens=limit if whole else 0, stop=tuple(stop)
        )
        answer = Answer(-1, len(prompt))

        def on_event(event: Event) -> None:
            answer.add([event.token])
            done = event.completion
            if done is not None:
                if done.error:
                    raise RuntimeError(done.error)
                answer.done, answer.cached = True, getattr(done, "cached_tokens", 0)

        answer.number = self.engine.submit(Request(tuple(prompt), sampling), on_event)
        return answer

    def step(self) -> None:
        self.engine.step()

    def cancel(self, answer: Answer) -> None:
        self.engine.cancel(answer.number)

    def memory(self, short: int, short_length: int, long_length: int) -> dict[str, Any]:
        """Bytes of the KV cache, when `short` sequences and a long one are in it.

        `ratio` is that of the cache's bytes to those that the tokens need: of all arrays beside the
        weights, the pages that the process has touched. Resident bytes are those of the process,
        compiled programs included: when the model is loaded, after a short request, when all
        sequences run, and the most in between.
        """
        weights = {_address(leaf) for leaf in jax.tree.leaves(self.model.params)}
        loaded = _resident_bytes("VmRSS")
        self._finish([self.submit(random_prompt(64), 2)])
        warm = _resident_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # The peak begins here.
        lengths = [short_length] * short + [long_length]
        answers = [self.submit(random_prompt(length), 1024) for length in lengths]
        self._step_until(lambda: all(one.tokens for one in answers))
        tokens = sum(one.prompt + len(one.tokens) for one in answers if not one.done)
        needed = tokens * self.model.runner.model.token_bytes
        others = [array for array in jax.live_arrays() if _address(array) not in weights]
        touched = sum(map(_touched_bytes, others))
        return {
            "ratio": touched / needed,
            "running": sum(not one.done for one in answers),
            "tokens": tokens,
            "needed_bytes": needed,
            "cache_bytes": touched,
            "array_bytes": sum(array.nbytes for array in others),
            "resident_bytes_loaded": loaded,
            "resident_bytes_warm": warm,
            "resident_bytes": _resident_bytes("VmRSS"),
            "resident_bytes_peak": _resident_bytes("VmHWM"),
        }


def _address(array: jax.Array) -> int:
    return array.addressable_data(0).unsafe_buffer_pointer()


def _touched_bytes(array: jax.Array) -> int:
    """Of the pages of an array's memory, those that the system has given to the process."""
    page = os.sysconf("SC_PAGE_SIZE")
    first, end = _address(array) // page, -(-(_address(array) + array.nbytes) // page)
    with open("/proc/self/pagemap", "rb") as pages:
        pages.seek(8 * first)
        entries = np.frombuffer(pages.read(8 * (end - first)), np.uint64)
    return int(np.count_nonzero(entries >> np.uint64(63))) * page


def _resident_bytes(which: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return int(values[which].split()[0]) * 1024


load = Meshwen
