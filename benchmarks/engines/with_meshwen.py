# SPDX-License-Identifier: Apache-2.0
"""meshwen on one device, fast numerics: the measurements of `meshwen bench`."""

from meshwen import Qwen2ForCausalLM
from meshwen.bench import measure


class Meshwen:
    def __init__(self, model: str, dtype: str):
        options = {"quantization": "int8"} if dtype == "int8" else {"dtype": dtype}
        self.model = Qwen2ForCausalLM.from_pretrained(model, **options)

    def decode(self, batch: int, length: int, steps: int) -> float:
        return measure.decode(self.model.runner, batch, length, steps).median

    def prefill(self, length: int, runs: int) -> float:
        return measure.first_token(self.model.engine, length, runs).median


load = Meshwen
