# SPDX-License-Identifier: Apache-2.0
"""Loading a model for a command, and saying on stderr what was loaded, and where it lies."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshwen.cli.console import note, progress_bar
from meshwen.common.units import bytes_text, count_text
from meshwen.errors import MeshwenError

if TYPE_CHECKING:
    from meshwen.causal_lm import CausalLM
    from meshwen.checkpoints import Checkpoint
    from meshwen.engine.options import EngineOptions
    from meshwen.engine.sampling_params import SamplingParams
    from meshwen.tokenizer.tokenizer import Tokenizer


def sampling_params(checkpoint: Checkpoint, given: Mapping[str, Any]) -> SamplingParams:
    """The checkpoint's own sampling defaults, with what the user gave in their place.

    Where tokens are drawn and no seed was given, it is a fresh one, and noted.

    Args:
        checkpoint: the model's.
        given: values that are possible, as a group of sampling options gives them.

    Raises:
        MeshwenError: a value of the checkpoint's is impossible; names its file.
    """
    from meshwen.engine.generation_config import unsupported
    from meshwen.engine.sampling_params import SamplingParams, with_fresh_seed
    from meshwen.parallel.distributed import shared

    path = checkpoint.path
    where = path / "generation_config.json" if path is not None and path.is_dir() else path
    try:
        params = SamplingParams.from_generation_config(checkpoint.generation_config, **given)
    except MeshwenError as error:
        raise MeshwenError(f"{where}: {error}; give another value as an option") from None
    if lost := unsupported(checkpoint.generation_config, greedy=params.temperature == 0):
        note(f"{where}: {lost}")
    if given.get("seed") is None and params.temperature > 0:
        params = replace(params, seed=shared("seed", lambda: with_fresh_seed(params).seed))
        note(f"seed: {params.seed} (--seed {params.seed} draws the same again)")
    return params


def settings_shown(sampling: SamplingParams) -> dict[str, Any]:
    """The sampling parameters that a user sees, by name."""
    left_out = ("logprobs", "top_logprobs", "prompt_logprobs", "max_new_tokens_asked")
    return {name: value for name, value in asdict(sampling).items() if name not in left_out}


def opened(model: str, options: EngineOptions) -> Checkpoint:
    """The checkpoint of this name, without its weights read."""
    from meshwen.checkpoints import open_checkpoint

    return open_checkpoint(model, load_format=options.load_format, revision=options.revision)


def load_model(
    checkpoint: Checkpoint, tokenizer: Tokenizer | None, options: EngineOptions
) -> CausalLM:
    """Loads a model, with a progress bar on a terminal, and notes its layout and its KV cache."""
    from meshwen.causal_lm import CausalLM
    from meshwen.ops.backend import XLA
    from meshwen.runtime.compilation_cache import enable_compilation_cache

    enable_compilation_cache()
    started = time.perf_counter()
    with progress_bar("loading weights") as progress:
        model = CausalLM.from_checkpoint(checkpoint, tokenizer, options, progress)
    _note_layout(model, time.perf_counter() - started)
    if options.quantization and model.runner.model.matmuls_by == XLA:
        note(
            "int8 saves memory here, but takes longer than bfloat16 (about 6 times on a CPU), as "
            "XLA expands it for every matmul: this process has no CPU kernels"
        )
    if checkpoint.format is None:
        note("weights: random, as --load-format dummy asks; the answers mean nothing")
    for text in checkpoint.notes:
        note(text)
    if rounding := rounding_note(checkpoint, options.quantization or str(options.dtype)):
        note(rounding)
    return model


def put_prefix(model: CausalLM, path: Path | None) -> None:
    """Puts a saved prefix into the model's KV cache, and says how long it is; None: there is none.

    Raises:
        MeshwenError: it is another model's, or damaged: see `CausalLM.load_prefix`.
    """
    if path is not None:
        note(f"prefix: {model.load_prefix(path)} tokens of {path} are in the KV cache")


def rounding_note(checkpoint: Checkpoint, kept: str) -> str | None:
    """What is lost of a file's numbers when they are kept as `kept`; None where nothing is.

    That int8 rounds what is no integer goes without saying.
    """
    sizes: Counter[str] = Counter()
    for source in checkpoint.tensors.values():
        sizes[source.quantization or source.dtype.name] += source.nbytes
    blocks = any(source.quantization for source in checkpoint.tensors.values())
    kinds = [kind for kind, _ in sizes.most_common()]
    several = " and ".join([", ".join(kinds[:-1]), kinds[-1]] if len(kinds) > 1 else kinds)
    if kept == "int8" and blocks:
        return f"weights: {several} in the file, expanded and rounded again to int8"
    if kept != "bfloat16" or kinds in ([], ["bfloat16"]):
        return None
    if blocks:
        return (
            f"weights: {several} in the file, expanded to 32 bits and rounded to bfloat16 "
            "(--dtype float32 keeps all that the file says)"
        )
    return f"weights: rounded from {several} to bfloat16 (--dtype float32 keeps them)"


def _note_layout(model: CausalLM, seconds: float) -> None:
    from meshwen.ops.cpu import kernels
    from meshwen.parallel.mesh import mesh_label

    parallel, devices = model.runner.model, model.mesh.devices.flatten()
    kind = devices[0].device_kind
    if devices[0].platform == "cpu" and devices.size > 1:
        kind = "simulated cpu"
    heads = parallel.plan.heads
    padded = heads.padding_query_heads
    queries = f"query heads: {heads.local_query_heads}"
    if padded:
        queries += (
            f" ({padded} of the mesh's {heads.devices * heads.local_query_heads} are padding)"
        )
    by = parallel.matmuls_by
    if by == kernels.ORDERED:  # It says which rule their sums follow; not whose instructions.
        by += f" ({kernels.label()})"
    note(
        f"model: {model.config.name}, {count_text(parallel.weights.parameters)} parameters "
        f"in {parallel.quantization or model.dtype}, loaded in {seconds:.1f} s; "
        f"matmuls by {by}"
    )
    note(
        f"mesh: {mesh_label(model.mesh)}, {devices.size} {kind} device{'s' * (devices.size > 1)}; "
        f"each holds {bytes_text(parallel.weights.nbytes)} of weights; "
        f"kv heads: {heads.local_key_value_heads}, {queries}"
    )
    note(str(model.engine.cache_plan))
