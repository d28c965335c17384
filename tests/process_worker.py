# SPDX-License-Identifier: Apache-2.0
"""One of several processes in a test: runs a model on meshes, and reports the results."""

import json
import sys
from pathlib import Path

from meshwen import Qwen2ForCausalLM, causal_lm
from meshwen.checkpoints.base import MappedTensor

IDS = [[5, 11, 3, 70, 8, 8, 200], [9, 1, 2, 3, 4, 250, 6]]


def observe(model: str, mesh: str, numerics: str) -> dict:
    """What a model gives on a mesh, and how many bytes of weights were read for it."""
    read, bytes_read = MappedTensor.read, []

    def counting(self, index=()):
        part = read(self, index)
        bytes_read.append(part.nbytes)
        return part

    load = causal_lm.load_params

    def load_and_count(*arguments):  # Not what is read to compare the processes' checkpoints.
        MappedTensor.read = counting
        try:
            return load(*arguments)
        finally:
            MappedTensor.read = read

    causal_lm.load_params = load_and_count
    try:
        loaded = Qwen2ForCausalLM.from_pretrained(
            model, mesh=mesh, dtype="float32", numerics=numerics
        )
    finally:
        causal_lm.load_params = load
    answers = loaded.generate(IDS, max_new_tokens=4, logprobs=True)
    logits = loaded(IDS)
    return {
        "bytes": sum(bytes_read),
        "tokens": [list(answer.tokens) for answer in answers],
        "logprobs": [list(answer.logprobs) for answer in answers],
        "logits": logits.tolist(),
    }


if __name__ == "__main__":
    from meshwen.parallel.distributed import start
    from meshwen.runtime.compilation_cache import enable_compilation_cache

    enable_compilation_cache()
    address, index, output, model, *runs = sys.argv[1:]
    start(address, 2, int(index))
    found = {run: observe(model, *run.split()) for run in runs}
    Path(output).write_text(json.dumps(found), encoding="utf-8")
