# SPDX-License-Identifier: Apache-2.0
"""Loading a model for a command, and saying on stderr what was loaded, and where it lies."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from meshwen.cli import options
from meshwen.cli.console import bytes_text, count_text, note, progress_bar

if TYPE_CHECKING:
    from meshwen.causal_lm import Qwen2ForCausalLM


def load_model(
    name: str,
    *,
    mesh: str,
    dtype: options.DType,
    numerics: options.Numerics,
    load_format: options.LoadFormat,
    revision: str | None,
) -> Qwen2ForCausalLM:
    """Loads a model, with a progress bar on a terminal, and notes its layout."""
    from meshwen.causal_lm import Qwen2ForCausalLM
    from meshwen.compilation_cache import enable_compilation_cache

    enable_compilation_cache()
    started = time.perf_counter()
    with progress_bar("loading weights") as progress:
        model = Qwen2ForCausalLM.from_pretrained(
            name,
            mesh=mesh,
            dtype=dtype.value,
            numerics=numerics.value,
            load_format=load_format.value,
            revision=revision,
            progress=progress,
        )
    _note_layout(model, time.perf_counter() - started)
    made_up = load_format is options.LoadFormat.DUMMY
    if made_up:
        note("weights: random, as --load-format dummy asks; the answers mean nothing")
    elif dtype is options.DType.BFLOAT16 and model.config.torch_dtype != "bfloat16":
        note(
            f"weights: rounded from {model.config.torch_dtype} to bfloat16 "
            "(--dtype float32 keeps them)"
        )
    return model


def _note_layout(model: Qwen2ForCausalLM, seconds: float) -> None:
    from meshwen.parallel.mesh import mesh_label
    from meshwen.weights import num_parameters

    plan, devices = model.plan, model.mesh.devices.flatten()
    kind = devices[0].device_kind
    if devices[0].platform == "cpu" and devices.size > 1:
        kind = "simulated cpu"
    heads, padded = plan.heads, plan.heads.padded_query_slots
    slots = f"query-head slots: {heads.local_query_slots}"
    if padded:
        slots += f" ({padded} of all {heads.devices * heads.local_query_slots} are padding)"
    note(
        f"model: {plan.config.name}, {count_text(num_parameters(plan))} parameters "
        f"in {model.dtype}, loaded in {seconds:.1f} s"
    )
    note(
        f"mesh: {mesh_label(model.mesh)}, {devices.size} {kind} device{'s' * (devices.size > 1)}; "
        f"each holds {bytes_text(weight_bytes_per_device(model))} of weights; "
        f"kv heads: {heads.local_key_value_heads}, {slots}"
    )


def weight_bytes_per_device(model: Qwen2ForCausalLM) -> int:
    """Bytes of weights on each device."""
    from meshwen.cli.inspect_report import weight_report

    return int(weight_report(model.plan, model.dtype)["per_device"])
