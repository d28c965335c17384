# SPDX-License-Identifier: Apache-2.0
"""Digests of what exact numerics ask of XLA, to compare between processors.

    python tests/digests.py functions > FILE        JSON, digests by name
    python tests/digests.py float32 > FILE          of the demo model's logits; or bfloat16, int8
    python tests/digests.py tokens > FILE           of what it generates
    python tests/digests.py compare FILE FILE...    a table; exit status 1 where any differ

`tests/kernels/digests.c` has those of the kernels.

Inputs are made of random integers alone, so they are the same everywhere; no two NaN differ.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from meshwen import AutoModelForCausalLM
from meshwen.engine import sampling
from meshwen.engine.sampling import SamplerRows, SamplingMethod
from meshwen.engine.sampling_params import SamplingParams
from meshwen.models.presets import preset
from meshwen.models.rope_frequencies import inverse_frequencies, mean_rotation
from meshwen.ops.backend import Backend
from meshwen.ops.cpu import kernels
from meshwen.ops.cpu.backend import CpuKernels
from meshwen.ops.cpu.xla import XlaOnCpu
from meshwen.ops.numerics.exact import Exact
from meshwen.ops.operations import Ops
from meshwen.ops.quant.int8 import quantized

Digests = dict[str, str]


def digest(*arrays: jax.Array | np.ndarray) -> str:
    """Of the bits of arrays; of NaN there is one."""
    found = hashlib.sha256()
    for array in map(np.asarray, arrays):
        if array.dtype.kind in "fV":
            array = np.where(np.isnan(array), array.dtype.type(np.nan), array)
        found.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
    return found.hexdigest()[:16]


def numbers(seed: int, shape: tuple[int, ...], exponents: tuple[int, int]) -> np.ndarray:
    """float32 of random signs and mantissas, and of exponents in a range, both ends included."""
    random = np.random.Generator(np.random.PCG64(seed))
    least, most = exponents
    bits = random.integers(0, 1 << 23, shape, np.uint32)
    bits |= random.integers(0, 2, shape, np.uint32) << 31
    bits |= random.integers(127 + least, 128 + most, shape, np.uint32) << 23
    return bits.view(np.float32)


def inputs() -> dict[str, np.ndarray]:
    """Numbers that functions are tried with: float32, by name; as many of each."""
    random = np.random.Generator(np.random.PCG64(0))
    anywhere = random.integers(0, 1 << 32, _COUNT, np.uint32)
    steps = random.integers(0, 1 << 24, _COUNT, np.uint32).astype(np.float32)
    return {
        "every bfloat16": (np.arange(_COUNT, dtype=np.uint32) << 16).view(np.float32),
        "any float32": anywhere.view(np.float32),
        "subnormals": (anywhere & 0x807FFFFF).view(np.float32),
        "-64 to 64": steps * np.float32(2.0**-17) - np.float32(64),
        "0 to 32768": steps * np.float32(2.0**-9),
        "0 to 1": (steps + np.float32(0.5)) * np.float32(2.0**-24),
    }


_COUNT = 1 << 17


def functions(ops: Ops) -> dict[str, Callable[[jax.Array], object]]:
    """What exact numerics ask of XLA, of one array of float32."""
    alone = ops.numerics.pointwise
    return {
        "inverse_sqrt": ops.numerics.inverse_sqrt,
        "silu": ops.silu,
        "exp": lambda x: alone(jnp.exp, x),
        "log": lambda x: alone(jnp.log, x),
        "cos": lambda x: alone(jnp.cos, x),
        "sin": lambda x: alone(jnp.sin, x),
        "noise": lambda x: alone(sampling.gumbel, x),
        "quotient": lambda x: x / x[::-1],
        "by 896": lambda x: x / 896,
        "product": lambda x: x * x[::-1],
        "sum": lambda x: x + x[::-1],
        "bfloat16": lambda x: x.astype(jnp.bfloat16),
        "int8": lambda x: quantized(x.reshape(-1, 64)),
        "equal to zero": lambda x: x == 0,
        "larger": lambda x: jnp.maximum(x, x[::-1]),
    }


def function_digests() -> Digests:
    """Of the functions of each input; of the sampler; of the angles of rotary embeddings."""
    backend: Backend = CpuKernels() if kernels.instruction_set() else XlaOnCpu()
    ops = Ops(numerics=Exact(), backend=backend)
    # Two programs, as an emulator takes long to compile one.
    compile = partial(jax.jit, compiler_options=backend.compiler_options(True))
    found = {}
    called = compile(lambda x: {name: f(x) for name, f in functions(ops).items()})
    for of, numbers in inputs().items():
        for name, result in called(jnp.array(numbers)).items():
            found[f"{name}, {of}"] = digest(*jax.tree.leaves(result))
    found |= sampler_digests(ops)
    for name in ("qwen2.5-0.5b", "qwen2.5-7b"):
        config = preset(name)
        found[f"rotary, {name}"] = digest(*inverse_frequencies(config)[:1], *mean_rotation(config))
    return found


def sampler_digests(ops: Ops) -> Digests:
    """Of tokens that are drawn in several ways, and of their log-probabilities."""

    @partial(jax.jit, compiler_options=ops.backend.compiler_options(True))
    def sampled(logits: jax.Array) -> dict[str, sampling.Sampled]:
        return {name: _sample(logits, *how, ops) for name, how in _sampled()}

    found = {}
    for name, one in sampled(sampler_logits()).items():
        found[f"tokens, {name}"] = digest(one.tokens)
        found[f"log-probabilities, {name}"] = digest(one.logprobs)
        if one.top_ids is not None:
            found[f"likeliest, {name}"] = digest(one.top_ids, one.top_logprobs)
    return found


_ROWS, _VOCABULARY = 16, 4096


def sampler_logits() -> jax.Array:
    """Those that tokens are drawn from: float32 [rows, vocabulary]."""
    logits = numbers(9, (_ROWS, _VOCABULARY), (-6, 3))
    logits[:, 1::2] = logits[:, ::2]  # Equal ones, whose order is that of their ids.
    return jnp.array(logits)


def _sampled() -> Iterator[tuple[str, tuple[SamplerRows, SamplingMethod]]]:
    settings = {
        "greedy": {"temperature": 0.0, "top_logprobs": 5},
        "by noise": {"temperature": 0.7},
        "of some": {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
        "of all": {"temperature": 1.0, "top_p": 0.95},
    }
    for name, kept in settings.items():
        params = [SamplingParams(**kept, seed=seed, logprobs=True) for seed in range(_ROWS)]
        yield name, (SamplerRows.of(params), SamplingMethod.of(params, _VOCABULARY))


def _sample(
    logits: jax.Array, rows: SamplerRows, method: SamplingMethod, ops: Ops
) -> sampling.Sampled:
    positions = jnp.arange(_ROWS, dtype=jnp.int32)
    return sampling.sample(logits, rows, positions, None, _VOCABULARY, method, ops)


def demo(dtype: str, quantization: str | None = None) -> AutoModelForCausalLM:
    """The demo model in exact numerics."""
    return AutoModelForCausalLM.from_pretrained(
        "demo", dtype=dtype, quantization=quantization, numerics="exact"
    )


def logits_digests(weights: str) -> Digests:
    """Of the demo model's logits: weights in float32, bfloat16, or int8 with bfloat16."""
    model = demo("bfloat16", "int8") if weights == "int8" else demo(weights)
    return {f"demo logits, {weights}": digest(model([range(100, 148)]))}


def token_digests() -> Digests:
    """Of tokens that the demo model draws one after the other, and their log-probabilities."""
    [drawn] = demo("bfloat16").generate("What is 3+4?", max_new_tokens=16, seed=5, logprobs=True)
    return {
        "demo tokens": digest(np.array(drawn.tokens)),
        "demo log-probabilities": digest(np.array(drawn.logprobs)),
    }


def compare(columns: dict[str, Digests]) -> tuple[list[str], bool]:
    """A table of digests by column, a line a name, and whether every name has one alone."""
    names = dict.fromkeys(name for digests in columns.values() for name in digests)
    lines, same = [f"equal on {', '.join(columns)}:"], True
    for name in names:
        found = {column: digests.get(name, "missing") for column, digests in columns.items()}
        equal = len(set(found.values())) == 1
        shown = next(iter(found.values())) if equal else f"DIFFERS: {found}"
        lines.append(f"  {name:<32} {shown}")
        same &= equal
    return lines, same


def main(arguments: list[str]) -> int:
    """See the top."""
    machine = platform.machine()
    match arguments:
        case ["functions"]:
            found = {machine: function_digests()}
        case [("float32" | "bfloat16" | "int8") as weights]:
            found = {machine: logits_digests(weights)}
        case ["tokens"]:
            found = {machine: token_digests()}
        case ["compare", *files]:
            columns = {n: d for f in files for n, d in json.loads(Path(f).read_text()).items()}
            lines, same = compare(columns)
            print("\n".join(lines))
            return 0 if same else 1
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
