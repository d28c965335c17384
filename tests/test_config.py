# SPDX-License-Identifier: Apache-2.0
"""The config reader: real config.json contents in, HF fields out, or one clear line of refusal."""

import dataclasses
import json
from typing import Any

import pytest

from meshwen.errors import MeshwenError
from meshwen.models.config_json import declared_quantization
from meshwen.models.presets import PRESETS, preset
from meshwen.models.qwen2 import Qwen2Config
from meshwen.models.registry import config_from_dict, config_from_json
from meshwen.models.rope_scaling import RopeScaling

# config.json of published checkpoints, as they were written.
QWEN25_7B_INSTRUCT = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN25_CODER_1_5B = QWEN25_7B_INSTRUCT | {
    "eos_token_id": 151643,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "rope_scaling": None,
    "vocab_size": 151936,
}
R1_DISTILL_QWEN_1_5B = QWEN25_CODER_1_5B | {
    "max_position_embeddings": 131072,
    "max_window_layers": 21,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "transformers_version": "4.44.0",
    "use_mrope": False,
}
R1_DISTILL_QWEN_7B = QWEN25_7B_INSTRUCT | {
    "eos_token_id": 151643,
    "max_position_embeddings": 131072,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "use_mrope": False,
}
QWQ_32B = QWEN25_7B_INSTRUCT | {
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "max_position_embeddings": 40960,
    "max_window_layers": 64,
    "num_attention_heads": 40,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "sliding_window": 32768,
}
# The Qwen2.5 model cards' advice for prompts beyond 32768 tokens.
YARN_7B = QWEN25_7B_INSTRUCT | {
    "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
}
SLIDING_7B = QWEN25_7B_INSTRUCT | {
    "use_sliding_window": True,
    "sliding_window": 4096,
    "max_window_layers": 21,
}
V5_7B = {
    key: value
    for key, value in QWEN25_7B_INSTRUCT.items()
    if key not in ("rope_theta", "torch_dtype", "max_window_layers")
} | {
    "dtype": "bfloat16",
    "eos_token_id": [151645, 151643],
    "layer_types": ["full_attention"] * 28,
    "pad_token_id": None,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "sliding_window": None,
    "transformers_version": "5.2.0",
}
REAL = {
    "qwen2.5-7b-instruct": QWEN25_7B_INSTRUCT,
    "qwen2.5-coder-1.5b": QWEN25_CODER_1_5B,
    "r1-distill-1.5b": R1_DISTILL_QWEN_1_5B,
    "r1-distill-7b": R1_DISTILL_QWEN_7B,
    "qwq-32b": QWQ_32B,
    "yarn": YARN_7B,
    "sliding": SLIDING_7B,
    "transformers 5": V5_7B,
}
real_configs = pytest.mark.parametrize("data", REAL.values(), ids=REAL.keys())


def changed(**changes: Any) -> dict[str, Any]:
    return QWEN25_7B_INSTRUCT | changes


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in QWEN25_7B_INSTRUCT.items() if key not in keys}


def refusal(data: Any) -> str:
    with pytest.raises(MeshwenError) as caught:
        Qwen2Config.from_dict(data)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_transformers_4_config_is_read_field_by_field():
    assert dataclasses.asdict(Qwen2Config.from_dict(QWEN25_7B_INSTRUCT, name="seven")) == {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "layer_types": ("full_attention",) * 28,
        "sliding_window": None,
        "bos_token_id": 151643,
        "eos_token_id": (151645,),
        "pad_token_id": None,
        "torch_dtype": "bfloat16",
        "name": "seven",
    }


def test_both_transformers_spellings_give_the_same_config():
    old = Qwen2Config.from_dict(QWEN25_7B_INSTRUCT)
    assert dataclasses.replace(old, eos_token_id=(151645, 151643)) == Qwen2Config.from_dict(V5_7B)


@real_configs
def test_to_dict_round_trips_through_json(data):
    config = Qwen2Config.from_dict(data)
    assert Qwen2Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.torch
@real_configs
def test_every_field_agrees_with_transformers(data):
    transformers = pytest.importorskip("transformers")
    ours, theirs = Qwen2Config.from_dict(data), transformers.Qwen2Config.from_dict(dict(data))
    assert_agrees(ours, theirs)


@pytest.mark.torch
@real_configs
def test_transformers_reads_what_to_dict_writes(data):
    transformers = pytest.importorskip("transformers")
    config = Qwen2Config.from_dict(data)
    assert_agrees(config, transformers.Qwen2Config.from_dict(config.to_dict()))


def assert_agrees(ours: Qwen2Config, theirs: Any) -> None:
    same = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
    same += " num_key_value_heads max_position_embeddings rms_norm_eps tie_word_embeddings"
    same += " sliding_window bos_token_id pad_token_id"
    for key in same.split():
        assert getattr(ours, key) == getattr(theirs, key), key
    assert list(ours.layer_types) == theirs.layer_types
    eos = theirs.eos_token_id
    assert ours.eos_token_id == (tuple(eos) if isinstance(eos, list) else (eos,))
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    rope_type = ours.rope_scaling.rope_type if ours.rope_scaling else "default"
    assert rope_type == theirs.rope_parameters["rope_type"]
    assert f"torch.{ours.torch_dtype}" == str(theirs.dtype)


def test_a_config_is_hashable_and_its_name_does_not_make_it_another():
    first, second = (Qwen2Config.from_dict(YARN_7B, name=name) for name in ("a", "b"))
    assert first == second
    assert hash(first) == hash(second)
    assert first != Qwen2Config.from_dict(QWEN25_7B_INSTRUCT)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.hidden_size = 1  # type: ignore[misc]


@pytest.mark.parametrize("dropped", ["architectures", "model_type"])
def test_the_registry_reads_a_config_as_its_architectures(dropped):
    for data in (QWEN25_7B_INSTRUCT, without(dropped)):
        config = config_from_dict(data)
        assert type(config) is Qwen2Config
        assert config == Qwen2Config.from_dict(data)


def test_the_registry_names_all_that_is_supported(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(MeshwenError, match=r'unnamed.*"llama".*supported: Qwen2ForCausalLM'):
        config_from_json(tmp_path)


def test_head_dim_is_taken_when_given_and_derived_when_null():
    assert Qwen2Config.from_dict(changed(head_dim=64)).head_dim == 64
    assert Qwen2Config.from_dict(changed(head_dim=None)).head_dim == 128


def test_null_key_value_heads_mean_one_per_query_head():
    config = Qwen2Config.from_dict(changed(num_key_value_heads=None))
    assert config.num_key_value_heads == 28


def test_absent_dtype_is_float32_and_dtype_wins_over_torch_dtype():
    assert Qwen2Config.from_dict(without("torch_dtype")).torch_dtype == "float32"
    assert Qwen2Config.from_dict(changed(dtype="float16")).torch_dtype == "float16"


@pytest.mark.parametrize(("given", "expected"), [(None, ()), (7, (7,)), ([7, 9], (7, 9)), ([], ())])
def test_eos_may_be_one_id_or_several_or_none(given, expected):
    assert Qwen2Config.from_dict(changed(eos_token_id=given)).eos_token_id == expected


def test_layers_from_max_window_layers_up_slide():
    config = Qwen2Config.from_dict(SLIDING_7B)
    assert config.sliding_window == 4096
    assert config.layer_types == ("full_attention",) * 21 + ("sliding_attention",) * 7


@pytest.mark.parametrize(("max_window_layers", "sliding"), [(-1, 28), (0, 28), (28, 0), (99, 0)])
def test_max_window_layers_may_lie_outside_the_layers(max_window_layers, sliding):
    config = Qwen2Config.from_dict(SLIDING_7B | {"max_window_layers": max_window_layers})
    assert config.layer_types.count("sliding_attention") == sliding


def test_given_layer_types_win_over_max_window_layers():
    kinds = ["sliding_attention", "full_attention"] * 14
    assert list(Qwen2Config.from_dict(SLIDING_7B | {"layer_types": kinds}).layer_types) == kinds


def test_max_window_layers_may_be_null_where_layer_types_say_it():
    kinds = ["sliding_attention", "full_attention"] * 14
    data = SLIDING_7B | {"max_window_layers": None}
    assert list(Qwen2Config.from_dict(data | {"layer_types": kinds}).layer_types) == kinds
    assert "max_window_layers is missing" in refusal(data)


def test_a_window_that_is_null_or_switched_off_leaves_every_layer_full():
    for changes in ({"sliding_window": None}, {"use_sliding_window": False}):
        config = Qwen2Config.from_dict(SLIDING_7B | changes)
        assert config.sliding_window is None
        assert set(config.layer_types) == {"full_attention"}


def test_yarn_defaults_are_those_of_transformers():
    assert Qwen2Config.from_dict(YARN_7B).rope_scaling == RopeScaling(
        rope_type="yarn",
        factor=4.0,
        original_max_position_embeddings=32768,
        beta_fast=32.0,
        beta_slow=1.0,
        attention_factor=None,
        mscale=None,
        mscale_all_dim=None,
        truncate=True,
    )


def test_yarn_context_defaults_to_max_position_embeddings_and_null_factor_to_their_ratio():
    scaling = {"rope_type": "yarn", "factor": 2}
    config = Qwen2Config.from_dict(changed(rope_scaling=scaling))
    assert config.rope_scaling.original_max_position_embeddings == 32768
    scaling = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 8192}
    assert Qwen2Config.from_dict(changed(rope_scaling=scaling)).rope_scaling.factor == 4.0


def test_every_yarn_setting_survives_the_version_5_spelling_and_a_round_trip():
    yarn = {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "attention_factor": 1.25,
        "mscale": 0.5,
        "mscale_all_dim": 0.75,
        "truncate": False,
    }
    config = Qwen2Config.from_dict(
        without("rope_theta") | {"rope_parameters": yarn | {"rope_theta": 5e5}}
    )
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScaling(**yarn)
    assert config.to_dict()["rope_scaling"] == yarn
    assert Qwen2Config.from_dict(config.to_dict()) == config


def test_linear_scaling_is_read_and_written():
    config = Qwen2Config.from_dict(changed(rope_scaling={"type": "linear", "factor": 2}))
    assert config.rope_scaling == RopeScaling(rope_type="linear", factor=2.0)
    assert config.to_dict()["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


def test_a_dual_chunk_model_is_limited_to_the_context_of_plain_attention():
    # Qwen2.5-7B-Instruct-1M
    dual = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
    data = changed(max_position_embeddings=1010000, dual_chunk_attention_config=dual)
    assert Qwen2Config.from_dict(data).max_position_embeddings == 262144


REQUIRED = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
]


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(key):
    assert refusal(without(key)) == f"config.json: {key} is missing"


@pytest.mark.parametrize("key", REQUIRED)
@pytest.mark.parametrize("value", ["12", True, [1], {"a": 1}, float("nan"), float("inf"), 10**400])
def test_a_value_of_the_wrong_type_is_named(key, value):
    message = refusal(changed(**{key: value}))
    assert message.startswith(f"config.json: {key} ")
    assert len(message) < 150


@pytest.mark.parametrize("key", REQUIRED)
@pytest.mark.parametrize("value", [0, -4, 1e38, 2**200])
def test_a_value_out_of_range_is_named(key, value):
    assert key in refusal(changed(**{key: value}))


def yarn(**settings: Any) -> dict[str, Any]:
    return changed(rope_scaling={"type": "yarn", "factor": 4.0} | settings)


REFUSED = {
    "llama": (changed(architectures=["LlamaForCausalLM"], model_type="llama"), "LlamaForCausalLM"),
    "qwen3": (changed(architectures=["Qwen3ForCausalLM"], model_type="qwen3"), '"qwen3"'),
    "moe": (changed(model_type="qwen2_moe"), '"qwen2_moe"'),
    "classifier": (
        changed(architectures=["Qwen2ForSequenceClassification"]),
        "Qwen2ForSequenceClassification",
    ),
    "nameless": (without("architectures", "model_type"), "neither architectures nor model_type"),
    "architectures": (changed(architectures=[1]), "architectures[0] is 1; expected text"),
    "activation": (changed(hidden_act="gelu"), 'hidden_act "gelu"'),
    "huge echo": (changed(hidden_act="gelu" * 1000), "... is not supported"),
    "bidirectional": (changed(is_causal=False), "is_causal"),
    "kv heads": (changed(num_key_value_heads=5), "28 is not a multiple of num_key_value_heads 5"),
    "hidden": (changed(hidden_size=3585), "3585 is not a multiple of num_attention_heads 28"),
    "odd head": (changed(head_dim=7), "even head_dim, found 7"),
    "negative head": (changed(head_dim=-2), "even head_dim, found -2"),
    "large head": (changed(head_dim=2**40), "times head_dim 1099511627776 is above"),
    "eos": (changed(eos_token_id="</s>"), 'eos_token_id is "</s>"; expected an integer'),
    "tie": (changed(tie_word_embeddings="yes"), 'is "yes"; expected true or false'),
    "layer count": (changed(layer_types=["full_attention"] * 3), "layer_types has 3 entries"),
    "layer name": (changed(layer_types=["linear_attention"] * 28), '"linear_attention"'),
    "layer type": (changed(layer_types="full"), 'layer_types is "full"; expected a list'),
    "no layers": (changed(layer_types=[]), "layer_types is empty"),
    "no window": (changed(layer_types=["sliding_attention"] * 28), "use_sliding_window is false"),
    "window": (SLIDING_7B | {"sliding_window": 0}, "sliding_window must be at least 1"),
    "llama3 rope": (changed(rope_scaling={"rope_type": "llama3", "factor": 8.0}), '"llama3"'),
    "dynamic rope": (changed(rope_scaling={"type": "dynamic", "factor": 2.0}), '"dynamic"'),
    "mrope": (changed(rope_scaling={"type": "mrope", "mrope_section": [1]}), '"mrope"'),
    "rope list": (changed(rope_scaling=[1]), "rope_scaling is [1]; expected an object"),
    "rope key": (
        changed(rope_scaling={"type": "yarn", "factor": "4"}),
        'rope_scaling.factor is "4"; expected a number',
    ),
    "linear factor": (changed(rope_scaling={"type": "linear", "factor": 1e9}), "32-bit"),
    "rope per layer": (
        without("rope_theta")
        | {"rope_parameters": {"full_attention": {"rope_theta": 1e6, "rope_type": "default"}}},
        "per layer type",
    ),
    "partial": (changed(partial_rotary_factor=0.5), "partial_rotary_factor"),
    "yarn no factor": (changed(rope_scaling={"type": "yarn"}), "rope_scaling.factor is missing"),
    "yarn factor": (changed(rope_scaling={"type": "yarn", "factor": 0}), "at least 1, found 0"),
    "yarn betas": (
        changed(rope_scaling={"type": "yarn", "factor": 4, "beta_fast": 1, "beta_slow": 2}),
        "beta_fast >= beta_slow",
    ),
    "yarn attention": (
        changed(rope_scaling={"type": "yarn", "factor": 4, "attention_factor": 0}),
        "attention_factor must be above 0",
    ),
    "yarn context": (
        changed(rope_scaling={"type": "yarn", "factor": 4, "original_max_position_embeddings": 0}),
        "original_max_position_embeddings, found 0",
    ),
    "yarn mscale": (yarn(mscale=-100.0, mscale_all_dim=1.0), "mscale must not be below 0"),
    "yarn mscale pair": (yarn(mscale=-9.0, mscale_all_dim=-9.0), "mscale must not be below 0"),
    "yarn mscale size": (yarn(mscale=1e300, mscale_all_dim=1.0), "must be from 0.001 to 1000"),
    "yarn attention size": (yarn(attention_factor=1e9), "must be from 0.001 to 1000"),
    "yarn attention none": (yarn(attention_factor=-2.0), "attention_factor must be above 0"),
    "yarn beta": (yarn(beta_slow=5e-324), "beta_fast >= beta_slow, from 0.001"),
    "yarn beta sign": (yarn(beta_slow=-1.0), "found 32.0 and -1.0"),
    "yarn long": (yarn(factor=1e300), "a context of"),
    "yarn NaN": (yarn(mscale=float("nan")), "mscale is NaN; expected a finite number"),
    "yarn huge context": (yarn(original_max_position_embeddings=2**40), "found 1099511627776"),
    "not an object": ([1, 2], "found [1, 2]; expected an object"),
}


@pytest.mark.parametrize(("data", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_what_the_model_cannot_run_is_refused_by_name(data, said):
    assert said in refusal(data)


def test_a_refused_architecture_hears_what_is_supported():
    message = refusal(changed(architectures=["LlamaForCausalLM"], model_type="llama"))
    assert "Qwen2ForCausalLM" in message


# What no computation needs, in the ways that published files have it wrong.
UNNEEDED = {
    "a null": {"is_causal": None, "use_sliding_window": None, "tie_word_embeddings": None},
    "another null": {"hidden_act": None, "architectures": None, "partial_rotary_factor": None},
    "a padding id": {"pad_token_id": -1},
    "a padding id of 64 bits": {"pad_token_id": 2**40, "bos_token_id": [1, 2]},
    "a text for an id": {"pad_token_id": "<|endoftext|>", "bos_token_id": "<s>"},
    "a dtype": {"torch_dtype": "float8_e4m3fn", "dtype": {"": "auto"}},
    "an unused window": {"sliding_window": "none", "max_window_layers": None},
    "a name for the list": {"architectures": "Qwen2ForCausalLM"},
    "the base model": {"architectures": ["Qwen2Model"]},
    "an empty quantisation": {"quantization_config": {}},
    "a quantisation": {"quantization_config": {"quant_method": "gptq"}},
    "an empty scaling": {"rope_scaling": {}, "dual_chunk_attention_config": {}},
    "a null kind": {"rope_scaling": {"rope_type": None, "type": "default"}},
}


@pytest.mark.parametrize("extra", UNNEEDED.values(), ids=UNNEEDED.keys())
def test_what_no_computation_needs_blocks_nothing(extra):
    config = Qwen2Config.from_dict(changed(**extra), name="")
    plain = Qwen2Config.from_dict(QWEN25_7B_INSTRUCT, name="")
    ids = {"bos_token_id": plain.bos_token_id, "torch_dtype": plain.torch_dtype}
    assert dataclasses.replace(config, **ids) == plain


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        (None, None),
        ({}, None),
        ({"quant_method": "awq"}, "awq"),
        ({"bits": 4}, "unnamed"),
        (8, "unnamed"),
    ],
)
def test_what_quantization_config_names(declared, expected):
    assert declared_quantization({"quantization_config": declared}) == expected


def test_a_byte_order_mark_before_config_json_is_passed_over(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(YARN_7B).encode())
    assert Qwen2Config.from_json(tmp_path) == Qwen2Config.from_dict(YARN_7B)


def test_a_linked_config_json_is_named_after_its_own_folder(tmp_path):
    (tmp_path / "blob").write_text(json.dumps(YARN_7B))
    (tmp_path / "my-model").mkdir()
    (tmp_path / "my-model" / "config.json").symlink_to(tmp_path / "blob")
    assert Qwen2Config.from_json(tmp_path / "my-model").name == "my-model"


def test_from_json_reads_a_folder_or_a_file_and_takes_the_folder_name(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SLIDING_7B))
    for path in (folder, folder / "config.json", str(folder)):
        config = Qwen2Config.from_json(path)
        assert config == Qwen2Config.from_dict(SLIDING_7B)
        assert config.name == "my-model"


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not UTF-8 text"),
        (b"[" * 100_000, "nested deeper than 100 levels"),
        (b"[]", "found []; expected an object"),
        (b"{}", "neither architectures nor model_type"),
    ],
)
def test_from_json_names_a_file_it_cannot_use(tmp_path, contents, said):
    file = tmp_path / "config.json"
    file.write_bytes(contents)
    with pytest.raises(MeshwenError) as caught:
        Qwen2Config.from_json(tmp_path)
    assert str(caught.value).startswith(str(file))
    assert said in str(caught.value)


def test_from_json_says_what_is_missing(tmp_path):
    with pytest.raises(MeshwenError, match=r"the folder has no config\.json"):
        Qwen2Config.from_json(tmp_path)
    with pytest.raises(MeshwenError, match="no such file or folder"):
        Qwen2Config.from_json(tmp_path / "nowhere")


# Parameter counts of the published checkpoints, from their model.safetensors.index.json. Qwen3-0.6B
# and 1.7B hold their tied embeddings twice, which count once here.
PARAMETERS = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_parameter_count(name):
    c = preset(name)
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    vectors = queries + 2 * keys if c.model_type == "qwen2" else 2 * c.head_dim
    attention = 2 * c.hidden_size * (queries + keys) + vectors
    layer = attention + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size
    embeddings = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
    assert c.num_hidden_layers * layer + embeddings + c.hidden_size == PARAMETERS[name]


def test_the_7b_preset_is_its_published_config():
    assert preset("qwen2.5-7b") == Qwen2Config.from_dict(QWEN25_7B_INSTRUCT)


def test_preset_names_ignore_case_and_a_wrong_one_lists_them():
    assert preset("Qwen2.5-7B") == preset("qwen2.5-7b")
    with pytest.raises(MeshwenError) as caught:
        preset("qwen2.5-8b")
    assert all(name in str(caught.value) for name in PRESETS)


def test_fewer_layers_need_only_empty_layer_types():
    small = dataclasses.replace(preset("qwen2.5-7b"), num_hidden_layers=2, layer_types=())
    assert small.layer_types == ("full_attention",) * 2
