# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's generation_config.json: what is read, what goes before what, what is named."""

import json
import warnings

import pytest

from mesh_model import MeshModel
from meshwen import Qwen2ForCausalLM, SamplingParams
from meshwen.checkpoints import open_checkpoint
from meshwen.checkpoints.generation_config import GenerationConfig, check_generation_config
from meshwen.cli.load import sampling_params
from meshwen.engine.generation_config import unsupported
from meshwen.errors import MeshwenError
from speller import write_speller
from tiny_model import TINY

defaults = SamplingParams.from_generation_config

EVERY_CONSTRAINT = {
    "min_new_tokens": 3,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 4,
    "suppress_tokens": [5, 6],
    "begin_suppress_tokens": [7],
    "bad_words_ids": [[1, 2], [3]],
    "forced_bos_token_id": 4,
    "forced_eos_token_id": [8, 9],
    "encoder_repetition_penalty": 1.5,
}


def test_every_key_that_has_a_field_reaches_it():
    found = defaults(EVERY_CONSTRAINT | {"stop_strings": ["END", "\n"]})
    for key, value in EVERY_CONSTRAINT.items():
        expected = value
        if isinstance(value, list):
            expected = tuple(tuple(one) if isinstance(one, list) else one for one in value)
        assert getattr(found, key) == expected
    assert found.stop == ("END", "\n")
    assert found.constrained
    assert not defaults({"do_sample": True, "repetition_penalty": 1.1, "max_length": 9}).constrained
    assert defaults({"stop_strings": "END"}).stop == ("END",)
    assert defaults({"forced_eos_token_id": 8}).forced_eos_token_id == (8,)
    assert defaults({"stop_strings": "END"}, stop="else").stop == ("else",)
    assert defaults(dict.fromkeys(GenerationConfig.__annotations__)) == SamplingParams()


@pytest.mark.parametrize(
    ("config", "given", "new", "whole"),
    [
        ({"max_length": 50}, {}, 50, 50),
        ({"max_length": 50, "max_new_tokens": 9}, {}, 9, None),
        ({"max_length": 50}, {"max_new_tokens": 7}, 7, None),
        ({"max_new_tokens": 9}, {"max_length": 50}, 50, 50),
        ({"max_new_tokens": 9}, {"max_length": 50, "max_new_tokens": 7}, 7, 50),
        ({}, {}, 256, None),
    ],
)
def test_new_tokens_go_before_a_length_and_what_is_given_before_both(config, given, new, whole):
    found = defaults(config, **given)
    assert (found.max_new_tokens, found.max_length) == (new, whole)
    assert found.max_new_tokens_asked == bool(given)


@pytest.mark.parametrize(
    ("config", "given", "new", "whole"),
    [
        ({"min_length": 50}, {}, 0, 50),
        ({"min_length": 50, "min_new_tokens": 9}, {}, 9, 0),
        ({"min_length": 50}, {"min_new_tokens": 7}, 7, 0),
        ({"min_length": 50}, {"min_new_tokens": 0}, 0, 0),
        ({"min_new_tokens": 9}, {"min_length": 50}, 0, 50),
    ],
)
def test_the_same_holds_for_the_least_length(config, given, new, whole):
    found = defaults(config, **given)
    assert (found.min_new_tokens, found.min_length) == (new, whole)


def test_temperature_0_drops_both_penalties_and_no_constraint():
    found = defaults(EVERY_CONSTRAINT | {"repetition_penalty": 1.2}, temperature=0)
    assert (found.repetition_penalty, found.encoder_repetition_penalty) == (1, 1)
    assert found.suppress_tokens == (5, 6)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_beams", 4),
        ("num_return_sequences", 2),
        ("guidance_scale", 1.5),
        ("sequence_bias", [[[1, 2], 0.5]]),
        ("exponential_decay_length_penalty", [5, 1.1]),
        ("watermarking_config", {"bias": 2.0}),
        ("token_healing", True),
        ("force_words_ids", [[1]]),
        ("dola_layers", "high"),
        ("penalty_alpha", 0.6),
        ("max_time", 2.0),
        ("cache_implementation", "quantized"),
        ("a_key_of_next_year", {"x": 1}),
    ],
)
def test_a_key_that_would_change_tokens_is_named_with_its_value(key, value):
    named = unsupported({"do_sample": False, key: value, "top_k": 5}, greedy=True)
    assert named.endswith(f": {key}={json.dumps(value)}")
    assert "\n" not in named


@pytest.mark.parametrize("key", ["typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"])
def test_a_filter_of_what_is_drawn_is_named_where_something_is_drawn(key):
    assert f"{key}=0.5" in unsupported({"do_sample": True, key: 0.5}, greedy=False)
    assert unsupported({"do_sample": True, key: 0.5}, greedy=True) is None


def test_what_changes_no_token_is_not_named():
    quiet = {
        "bos_token_id": 1,
        "pad_token_id": 2,
        "transformers_version": "4.45.0",
        "_from_model_config": True,
        "use_cache": True,
        "cache_implementation": "static",
        "num_beams": 1,
        "early_stopping": False,
        "length_penalty": 1.0,
        "guidance_scale": 1.0,
        "typical_p": 1.0,
        "epsilon_cutoff": 0.0,
        "sequence_bias": None,
        "penalty_alpha": 0.0,
        "renormalize_logits": True,
        "num_return_sequences": 1,
        "prompt_lookup_num_tokens": 10,
    }
    assert unsupported(EVERY_CONSTRAINT | quiet, greedy=False) is None
    assert unsupported({"penalty_alpha": 0.6, "do_sample": True}, greedy=False) is None
    many = unsupported({f"new_{n}": n for n in range(100)}, greedy=True)
    assert many.endswith("new_7=7, ...")


def test_what_is_not_supported_is_told_once_to_users_of_the_api():
    model = Qwen2ForCausalLM(MeshModel(TINY, "1").runner, None, {"num_beams": 4})
    with pytest.warns(UserWarning, match="generation_config: not supported here.*: num_beams=4$"):
        model.request([1])
    with warnings.catch_warnings(action="error"):
        model.request([1])
        Qwen2ForCausalLM(model.runner, None, EVERY_CONSTRAINT).request([1])


def test_what_is_not_supported_is_noted_by_the_command_line(tmp_path, capsys):
    folder = write_speller(tmp_path / "model")
    path = folder / "generation_config.json"
    path.write_text('{"num_beams": 4, "suppress_tokens": [5], "typical_p": 0.5}')
    with open_checkpoint(str(folder)) as checkpoint:
        assert sampling_params(checkpoint, {}).suppress_tokens == (5,)
    err = capsys.readouterr().err
    assert err.startswith(f"{path}: not supported here")
    assert err.endswith(": num_beams=4\n")


@pytest.mark.torch
def test_every_key_of_transformers_is_known():
    generation = pytest.importorskip("transformers").generation
    known = generation.GenerationConfig().to_dict()
    named = unsupported(dict.fromkeys(known, "a value that no key has"), greedy=False)
    read_or_named = [key for key in known if key not in GenerationConfig.__annotations__]
    assert set(read_or_named) >= {"num_beams", "guidance_scale"}
    # What is unknown would be named as well: so each key stands in one of the lists.
    from meshwen.engine import generation_config

    lists = {*generation_config._NO_MATTER, *generation_config._NEUTRAL}
    lists |= {*generation_config._FILTERS, "penalty_alpha", "cache_implementation"}
    assert [k for k in read_or_named if k not in lists and not k.startswith("_")] == []
    assert named is not None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eos_token_id", "1023"),
        ("eos_token_id", {"a": 1}),
        ("eos_token_id", [1.5]),
        ("eos_token_id", [[1]]),
        ("eos_token_id", True),
        ("eos_token_id", -1),
        ("eos_token_id", [None]),
        ("do_sample", "false"),
        ("do_sample", 1),
        ("temperature", "0.7"),
        ("temperature", False),
        ("top_k", 2.5),
        ("max_new_tokens", True),
        ("max_length", "100"),
        ("suppress_tokens", 5),
        ("suppress_tokens", [-1]),
        ("begin_suppress_tokens", ["a"]),
        ("bad_words_ids", [1, 2]),
        ("bad_words_ids", [[1.5]]),
        ("stop_strings", [1]),
        ("forced_eos_token_id", {"a": 1}),
        ("no_repeat_ngram_size", [2]),
    ],
)
def test_a_value_of_the_wrong_type_names_file_key_and_value(key, value, tmp_path):
    with pytest.raises(MeshwenError, match=f"^a file: {key}.* expected") as error:
        check_generation_config({key: value}, "a file")
    assert "\n" not in str(error.value)


def test_a_checkpoints_file_is_checked_when_it_is_opened(tmp_path):
    folder = write_speller(tmp_path / "model")
    path = folder / "generation_config.json"
    path.write_text('{"eos_token_id": "258", "max_new_tokens": 5}')
    with pytest.raises(MeshwenError, match='json: eos_token_id is "258"; expected an integer'):
        open_checkpoint(str(folder))
    path.write_text('{"eos_token_id": [258, 256], "whatever": [{}], "top_p": null}')
    open_checkpoint(str(folder)).close()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_length", 0),
        ("max_length", "9"),
        ("min_new_tokens", -1),
        ("min_length", 1.5),
        ("no_repeat_ngram_size", -1),
        ("suppress_tokens", (-1,)),
        ("suppress_tokens", "abc"),
        ("suppress_tokens", (True,)),
        ("begin_suppress_tokens", (1.5,)),
        ("bad_words_ids", ((),)),
        ("bad_words_ids", 5),
        ("bad_words_ids", "abc"),
        ("forced_bos_token_id", -2),
        ("forced_eos_token_id", {"a": 1}),
        ("encoder_repetition_penalty", 0),
    ],
)
def test_an_impossible_value_is_named(name, value):
    with pytest.raises(MeshwenError, match=f"^{name} must ") as error:
        SamplingParams(**{name: value})
    assert "\n" not in str(error.value)
