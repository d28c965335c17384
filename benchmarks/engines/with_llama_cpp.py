# SPDX-License-Identifier: Apache-2.0
"""llama.cpp through the C interface that llama-cpp-python exposes, other settings as they are."""

import ctypes
import os

import llama_cpp as llama
import numpy as np
from worker import WARM_UP, median_seconds

_SILENCE = llama.llama_log_callback(lambda level, text, data: None)


class LlamaCpp:
    def __init__(self, model: str, dtype: str, sequences: int):
        del dtype, sequences  # The file has the one; a context has the other.
        llama.llama_log_set(_SILENCE, None)
        llama.llama_backend_init()
        self.model = llama.llama_model_load_from_file(
            model.encode(), llama.llama_model_default_params()
        )
        if not self.model:
            raise OSError(f"llama.cpp cannot load {model}")
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))

    def decode(self, batch: int, length: int, steps: int) -> float:
        context = self._context(batch, length + steps + WARM_UP)
        for sequence in range(batch):
            self._decode(context, [1] * length, range(length), [sequence] * length)
        tokens, place = [1] * batch, length

        def step() -> None:
            nonlocal tokens, place
            tokens = self._decode(context, tokens, [place] * batch, range(batch), every=True)
            place += 1

        try:
            return median_seconds(step, steps)
        finally:
            llama.llama_free(context)

    def prefill(self, length: int, runs: int) -> float:
        context = self._context(1, length)
        memory = llama.llama_get_memory(context)

        def read() -> None:
            llama.llama_memory_clear(memory, True)
            self._decode(context, [1] * length, range(length), [0] * length)

        try:
            return median_seconds(read, runs)
        finally:
            llama.llama_free(context)

    def _context(self, sequences: int, length: int):
        parameters = llama.llama_context_default_params()
        parameters.n_ctx = sequences * length
        parameters.n_batch = max(length, sequences)
        parameters.n_seq_max = sequences
        parameters.n_threads = parameters.n_threads_batch = os.cpu_count()
        context = llama.llama_init_from_model(self.model, parameters)
        if not context:
            raise MemoryError("llama.cpp cannot make a context")
        return context

    def _decode(self, context, tokens, positions, sequences, every: bool = False) -> list[int]:
        """The likeliest token after the last of `tokens`, or after every one."""
        batch = llama.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        rows = zip(tokens, positions, sequences, strict=True)
        for at, (token, position, sequence) in enumerate(rows):
            batch.token[at], batch.pos[at] = token, position
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
            batch.logits[at] = every or at == len(tokens) - 1
        failed = llama.llama_decode(context, batch)
        llama.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama_decode returned {failed}")
        outputs = range(len(tokens)) if every else [len(tokens) - 1]
        return [self._likeliest(context, at) for at in outputs]

    def _likeliest(self, context, at: int) -> int:
        logits = llama.llama_get_logits_ith(context, at)
        values = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * self.vocabulary)).contents
        return int(np.frombuffer(values, np.float32).argmax())


load = LlamaCpp
