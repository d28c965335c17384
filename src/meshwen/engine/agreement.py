# SPDX-License-Identifier: Apache-2.0
"""What several processes must agree on before the first step, and what says where they do not.

Each computes its own part of one result. With other weights, options or prompts in one of them the
result would be nonsense, or they would wait for each other forever.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import meshwen
from meshwen.checkpoints import Checkpoint
from meshwen.checkpoints.digest import sample_sha256, weights_sha256
from meshwen.engine.request import Request
from meshwen.errors import MeshwenError
from meshwen.ops.cpu import kernels
from meshwen.parallel.distributed import gathered, process_count
from meshwen.tokenizer.tokenizer import Tokenizer

_PACKAGES = ("jax", "jaxlib", "numpy", "ml_dtypes", "tokenizers", "jinja2")
_LONGEST = 120  # characters of a value in a message


def check_same(what: str, mine: Mapping[str, Any], hint: str) -> None:
    """Refuses what differs between the processes; with one process there is nothing to ask.

    All processes call this, equally often and in one order.

    Args:
        what: all of it is about.
        mine: values of this process by name; JSON.
        hint: what to do.

    Raises:
        MeshwenError: a value differs; in every process, naming the first one and who has which.
    """
    if process_count() == 1:
        return
    for name, values in _unequal(gathered(what, dict(mine))).items():
        first = next(iter(values))
        others = [f"{_brief(v)} in {_processes(who)}" for v, who in values.items() if v != first]
        raise MeshwenError(
            f"{what}: {name} is {_brief(first)} in {_processes(values[first])} but "
            f"{' and '.join(others[:3])}; {hint}"
        )


def environment() -> dict[str, str]:
    """Versions and settings of this process that decide how it computes."""
    found = {"meshwen": meshwen.__version__, "kernels": kernels.label()}
    found |= {name: metadata.version(name) for name in _PACKAGES}
    found["llguidance"] = _version_if_installed("llguidance")  # Its masks decide tokens.
    flags = os.environ.get("XLA_FLAGS", "")
    unoptimised = str(jax.config.values["jax_disable_most_optimizations"])
    return found | {"XLA_FLAGS": flags, "jax_disable_most_optimizations": unoptimised}


def _version_if_installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def check_environment() -> None:
    """Refuses processes with other versions, compiler flags or kernels."""
    check_same(
        "the processes' environment",
        environment(),
        "give all the same installation (with kernels for all or for none) and flags, on "
        "CPUs of one kind",
    )


def check_model(
    checkpoint: Checkpoint, tokenizer: Tokenizer | None, settings: Mapping[str, Any], exact: bool
) -> None:
    """Refuses processes with other files of a model, or other settings of it.

    Of large tensors some rows are compared: `same_weights` compares all.

    Args:
        checkpoint: the open checkpoint.
        tokenizer: its tokenizer.
        settings: of this model, by name.
        exact: whether numerics are; then CPUs must have the same instructions.
    """
    if process_count() == 1:
        return
    check_environment()
    mine = dict(settings)
    mine |= {f"config {name}": value for name, value in checkpoint.config.to_dict().items()}
    for name, value in checkpoint.generation_config.items():
        mine[f"generation_config {name}"] = value
    if tokenizer is not None:
        mine |= {f"tokenizer's {name}": digest(one) for name, one in tokenizer.content.items()}
    if exact:
        mine["CPU instructions (exact numerics)"] = instructions()
    mine["names of tensors"] = digest(list(checkpoint.tensors))
    mine |= {f"tensor {name}": sample_sha256(t)[:16] for name, t in checkpoint.tensors.items()}
    text = json.loads(json.dumps(mine, default=str))
    check_same("the processes' models", text, "give all the same model, with the same settings")


def same_weights(checkpoint: Checkpoint) -> str:
    """The checkpoint's `weights_sha256`, which every process computes of its own files.

    Raises:
        MeshwenError: it differs.
    """
    found = weights_sha256(checkpoint)
    hint = "give all the same checkpoint"
    check_same("the processes' weights", {"their SHA-256": found}, hint)
    return found


def check_requests(requests: Sequence[Request]) -> None:
    """Refuses other prompts, or other sampling parameters or seeds, in one of the processes."""
    if process_count() == 1:
        return
    mine: dict[str, Any] = {"their number": len(requests)}
    for number, request in enumerate(requests, start=1):
        sampling = asdict(request.sampling)
        if number == 1:
            mine |= {f"{name} of the first": str(value) for name, value in sampling.items()}
        mine["prompts"] = digest([mine.get("prompts"), list(request.prompt_tokens)])
        mine["sampling parameters"] = digest([mine.get("sampling parameters"), sampling])
    hint = "make the same calls in all; who draws a seed at random must give all the same"
    check_same("the processes' requests", mine, hint)


def instructions() -> str:
    """The CPU's instructions that decide how XLA orders sums, by name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", lines, re.MULTILINE)
    names = re.findall(r"\b(?:avx|amx|fma|f16c|sse4|asimd|sve|bf16)\w*", found[1] if found else "")
    return " ".join([platform.machine(), *sorted(set(names))])


def digest(value: Any) -> str:
    """A short hash of what JSON can hold, in one order of keys."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _unequal(all_of_them: list[dict[str, Any]]) -> dict[str, dict[str, list[int]]]:
    """By name, the processes that have each value, where there are several."""
    found: dict[str, dict[str, list[int]]] = {}
    for index, one in enumerate(all_of_them):
        for name in dict.fromkeys(key for values in all_of_them for key in values):
            value = one.get(name)
            text = value if isinstance(value, str) else json.dumps(value)
            found.setdefault(name, {}).setdefault(text, []).append(index)
    return {name: values for name, values in found.items() if len(values) > 1}


def _processes(indices: list[int]) -> str:
    some = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
    return f"process{'es' * (len(indices) > 1)} {some}"


def _brief(text: str) -> str:
    text = text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
    return text or "empty"
