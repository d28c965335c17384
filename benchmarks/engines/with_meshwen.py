# SPDX-License-Identifier: Apache-2.0
"""meshwen on one device, fast numerics, by what its public API has had in every version."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
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
                answer.done, answer.cached = True, getattr(done, "cached_tokens", None)

        answer.number = self.engine.submit(Request(tuple(prompt), sampling), on_event)
        return answer

    def step(self) -> None:
        self.engine.step()

    def cancel(self, answer: Answer) -> None:
        self.engine.cancel(answer.number)

    def memory(self, short: int, short_length: int, long_length: int) -> dict[str, Any]:
        """Bytes of the KV cache, when `short` sequences and a long one are in it.

        Resident bytes are those of the process: when the model is loaded, after a short request,
        and when all sequences run, compiled programs included. Array bytes are those of arrays
        other than the weights, which the process may have asked for and not touched. `ratio` is
        that of the resident bytes that came since the model was loaded, to those that the tokens
        need.
        """
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(self.model.params))
        loaded = _resident_bytes("VmRSS")
        self._finish([self.submit(random_prompt(64), 2)])
        warm = _resident_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # The peak begins here.
        lengths = [short_length] * short + [long_length]
        answers = [self.submit(random_prompt(length), 1024) for length in lengths]
        self._step_until(lambda: all(one.tokens for one in answers))
        tokens = sum(one.prompt + len(one.tokens) for one in answers if not one.done)
        needed = tokens * self.model.runner.model.token_bytes
        resident = _resident_bytes("VmRSS")
        return {
            "ratio": (resident - loaded) / needed,
            "running": sum(not one.done for one in answers),
            "tokens": tokens,
            "needed_bytes": needed,
            "array_bytes": sum(array.nbytes for array in jax.live_arrays()) - weights,
            "resident_bytes_loaded": loaded,
            "resident_bytes_warm": warm,
            "resident_bytes": resident,
            "resident_bytes_peak": _resident_bytes("VmHWM"),
        }


def _resident_bytes(which: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return int(values[which].split()[0]) * 1024


load = Meshwen
