# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint's generation_config.json makes of sampling.

Of the keys that no `SamplingParams` has a field for, each is known to change no token, or is named
to the user.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meshwen.checkpoints.generation_config import GenerationConfig
from meshwen.common.json_files import shown


def sampling_values(config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a `SamplingParams`: a checkpoint's own, with what a user gave in their place.

    Args:
        config: the checkpoint's; {} for none.
        given: fields of `SamplingParams`.
    """
    values = {
        field: config[key]
        for key in GenerationConfig.__annotations__
        if (field := _FIELDS.get(key, key)) and config.get(key) is not None
    }
    sampled = values.pop("do_sample", False)
    if sampled:
        values.setdefault("temperature", 1.0)
    else:
        values["temperature"] = 1.0 if {"top_p", "top_k", "min_p"} & set(given) else 0.0
    if given.get("temperature") == 0:
        for name in ("repetition_penalty", "encoder_repetition_penalty"):
            values.pop(name, None)
    for new, whole in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
        if {new, whole} & set(given):
            values.pop(new, None)
            values.pop(whole, None)
        elif new in values:  # As in transformers.
            values.pop(whole, None)
    values.update(given)
    if values.get("max_length") is not None:  # The only limit, unless another is given.
        values.setdefault("max_new_tokens", values["max_length"])
    return values


def unsupported(config: Mapping[str, Any], greedy: bool) -> str | None:
    """What a config asks for and does not get, in one line; None where nothing is lost.

    Args:
        config: the checkpoint's.
        greedy: whether the likeliest token is taken, so that filters of what is drawn do nothing.
    """
    lost = [
        f"{key}={shown(value)}"
        for key, value in config.items()
        if value is not None and _changes_tokens(key, value, config, greedy)
    ]
    if not lost:
        return None
    some = ", ".join(lost[:_MOST_NAMED]) + (", ..." if len(lost) > _MOST_NAMED else "")
    return f"not supported here, so transformers' answers may differ: {some}"


_MOST_NAMED = 8
_FIELDS = {"eos_token_id": "", "stop_strings": "stop"}  # The engine has the first.


def _changes_tokens(key: str, value: Any, config: Mapping[str, Any], greedy: bool) -> bool:
    if key in GenerationConfig.__annotations__ or key in _NO_MATTER or key.startswith("_"):
        return False
    if key in _FILTERS:
        return not greedy and value != _FILTERS[key]
    if key == "penalty_alpha":  # Contrastive search.
        return config.get("do_sample") is not True and value != 0 and config.get("top_k", 50) != 1
    if key == "cache_implementation":
        return bool(value == "quantized")
    return key not in _NEUTRAL or value not in _NEUTRAL[key]


# Filters of what is drawn, with the value that keeps all.
_FILTERS = {"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "top_h": 1.0}
# Keys that change tokens, and values at which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "guidance_scale": (1,),
    "sequence_bias": ({}, []),
    "exponential_decay_length_penalty": (),
    "watermarking_config": (),
    "token_healing": (False,),
    "constraints": ([],),
    "force_words_ids": ([],),
    "dola_layers": (),
    "max_time": (),
}
# Keys that change no token. Beam search's own are named by num_beams; logits that are not finite
# are an error; drafts are checked by the model; the rest is about caches, compilation and output.
_NO_MATTER = {
    *("bos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version"),
    *("early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty", "low_memory"),
    *("remove_invalid_values", "renormalize_logits"),
    *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule"),
    *("assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind"),
    *("target_lookbehind", "assistant_ensemble_weight", "prompt_lookup_num_tokens"),
    *("max_matching_ngram_size", "speculation_type", "use_mtp"),
    *("use_cache", "cache_config", "max_cache_len", "return_legacy_cache", "prefill_chunk_size"),
    *("compile_config", "disable_compile", "continuous_batching_config"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    "return_dict_in_generate",
}
