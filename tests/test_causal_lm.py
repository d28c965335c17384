# SPDX-License-Identifier: Apache-2.0
"""The Python API: logits, generation, loading, and what importing the package starts."""

import functools
import gc
import json
import logging
import re
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshwen
import reference
from mesh_model import MeshModel, random_tokens, with_nan
from meshwen import (
    AutoModelForCausalLM,
    Qwen2ForCausalLM,
    Request,
    SamplingParams,
)
from meshwen.causal_lm import CausalLM
from meshwen.engine.options import EngineOptions
from meshwen.engine.sampling import NO_TOKEN
from meshwen.errors import MeshwenError
from meshwen.models import presets
from meshwen.parallel.mesh import make_mesh
from speller import ANSWER, CONTEXT, answer_ids, chat_ids, token_ids, write_speller
from tiny_model import TINY, greedy, weights

pytestmark = pytest.mark.usefixtures("unoptimised")
SPLIT = "data=2,model=4"
every_mesh = pytest.mark.parametrize("mesh", ["1", SPLIT])


@functools.cache
def tiny(mesh="1") -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(MeshModel(TINY, mesh).runner, None, {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_speller(tmp_path_factory.mktemp("models") / "speller")


@pytest.fixture(scope="module")
def speller(folder):
    return Qwen2ForCausalLM.from_pretrained(str(folder), dtype="float32")


# --- Logits


@every_mesh
def test_logits_of_a_batch_are_those_of_the_float64_reference(mesh):
    ids = random_tokens(TINY, 3, 11)  # Three rows, which no two copies of the model share evenly.
    found = tiny(mesh)(ids)
    assert (found.shape, found.dtype) == ((3, 11, TINY.vocab_size), jnp.float32)
    for row, tokens in zip(np.asarray(found), ids, strict=True):
        expected = reference.logits(weights(), TINY, tokens.tolist())
        np.testing.assert_allclose(row, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@every_mesh
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_changes_no_logits(mesh, side):
    ids = random_tokens(TINY, 3, 11)
    padded, mask = np.full((3, 15), 9), np.zeros((3, 15), np.int64)
    starts, lengths = {
        "left": ([4, 9, 14], [11, 6, 1]),
        "right": ([0, 0, 0], [11, 6, 1]),
        "both": ([2, 5, 0], [11, 6, 8]),
    }[side]
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        padded[row, start : start + length] = ids[row, :length]
        mask[row, start : start + length] = 1
    found, expected = np.asarray(tiny(mesh)(padded, mask)), np.asarray(tiny(mesh)(ids))
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        np.testing.assert_allclose(
            found[row, start : start + length],
            expected[row, :length],
            rtol=0,
            atol=1e-5 * np.abs(expected).max(),
        )


def test_lists_jax_arrays_and_boolean_masks_are_taken():
    ids = random_tokens(TINY, 3, 11)
    expected = np.asarray(tiny()(ids))
    mask = np.ones(ids.shape, bool)
    for form in (ids.tolist(), jnp.asarray(ids), ids.astype(np.uint16)):
        np.testing.assert_array_equal(np.asarray(tiny()(form, mask.tolist())), expected)


@pytest.mark.parametrize(
    ("ids", "mask", "words"),
    [
        ([1, 2], None, r"must be int \[batch, sequence\], not int64 \(2,\)"),
        ([[]], None, r"must be int \[batch, sequence\]"),
        ([[1.0, 2.0]], None, r"must be int \[batch, sequence\], not float64"),
        ([[True]], None, r"must be int \[batch, sequence\], not bool"),
        ([[0, TINY.vocab_size]], None, "from 0 to 262"),
        ([[0, -1]], None, "from 0 to 262"),
        ([[1] * 1101], None, "1101 tokens, but the model's context is 1100"),
        ([[1, 2]], [[1]], r"attention_mask \(1, 1\) must have the shape \(1, 2\)"),
        ([[1, 2]], [[0.0, -1e9]], "attention_mask must be int or bool, .*, not float64"),
        ([[1, 2], [3, 4]], [[1, 1], [1, 2]], "at position 1 of row 1 it is 2"),
        ([[1, 2]], [[-1, 1]], "at position 0 of row 0 it is -1"),
        ([[1] * 4] * 2, [[0, 1, 1, 0], [1, 0, 0, 1]], "is 0 at position 1 of row 1, which is bet"),
        ([[1] * 3], [[True, False, True]], "is 0 at position 1 of row 0, which is between tokens"),
    ],
)
def test_what_is_not_a_batch_of_ids_is_refused(ids, mask, words):
    with pytest.raises(MeshwenError, match=words) as error:
        tiny()(ids, mask)
    assert "\n" not in str(error.value)


def test_logits_of_another_length_in_the_bucket_compile_nothing(caplog):
    model = tiny()
    model(random_tokens(TINY, 3, 12))
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        model(random_tokens(TINY, 3, 14))
        assert "jit(logits_step)" not in caplog.text
        model(random_tokens(TINY, 3, 17))
        assert "jit(logits_step)" in caplog.text
    caplog.clear()


# --- Generation


def test_a_prompt_is_text_or_ids_and_stands_alone_or_with_others(speller):
    text, ids = "A\n", token_ids("A\n")
    for one in (text, [text], ids, np.array(ids), [jnp.array(ids)], iter([text])):
        (found,) = speller.generate(one, max_new_tokens=20)
        assert found.prompt_tokens == tuple(ids)
        assert found.tokens == tuple(answer_ids())
        assert (found.text, found.finish_reason, found.logprobs) == (ANSWER, "stop", None)


def test_several_prompts_are_answered_in_order(speller):
    found = speller.generate(["H", token_ids("i"), "A\n"], max_new_tokens=20)
    assert [c.text for c in found] == [ANSWER[1:], ANSWER[2:], ANSWER]
    assert [c.prompt_tokens for c in found] == [
        tuple(token_ids(text)) for text in ("H", "i", "A\n")
    ]


def test_every_prompt_has_what_an_iterator_gave_for_all(speller):
    found = speller.generate(["H", "H"], max_new_tokens=20, stop=iter([ANSWER[2]]))
    assert [c.text for c in found] == [ANSWER[1]] * 2


def test_a_conversation_goes_through_the_chat_template(speller):
    conversation = [{"role": "user", "content": "hi"}]
    (found,) = speller.generate(conversation, max_new_tokens=20)
    assert found.prompt_tokens == tuple(chat_ids(("user", "hi")))
    assert found.text == ANSWER
    assert speller.request([*conversation]).prompt_tokens == found.prompt_tokens


def test_chat_template_kwargs_reach_the_template_or_are_refused(speller):
    conversation, off = [{"role": "user", "content": "hi"}], {"enable_thinking": False}
    (found,) = speller.generate(conversation, chat_template_kwargs=off, max_new_tokens=1)
    thought = token_ids("<think></think>")
    assert found.prompt_tokens == (*chat_ids(("user", "hi")), *thought)
    for wrong in ([("enable_thinking", False)], {1: 2}, {"messages": []}):
        with pytest.raises(MeshwenError, match="chat_template_kwargs"):
            speller.request(conversation, chat_template_kwargs=wrong)
    for prompt in ("hi", [1, 2]):
        with pytest.raises(MeshwenError, match="are for conversations, and this prompt is t"):
            speller.request(prompt, chat_template_kwargs=off)


def test_no_prompts_give_no_completions(speller):
    assert speller.generate([]) == []


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ("", "prompt 1 is empty"),
        (["A", []], "prompt 2 is empty"),
        ([[1], 2], "must be text, or all lists of token ids"),
        ("A" * CONTEXT, f"prompt 1 has {CONTEXT} tokens"),
        ([[259]], "outside the vocabulary of 259"),
        (b"A", "decode() the bytes"),
        ([[1.5]], "must be text, token ids, or a conversation"),
    ],
)
def test_a_bad_prompt_is_one_clear_line(speller, prompts, words):
    with pytest.raises(MeshwenError, match=re.escape(words)) as error:
        speller.generate(prompts)
    assert "\n" not in str(error.value)


def test_an_impossible_sampling_value_is_refused_before_the_first_piece(speller):
    with pytest.raises(MeshwenError, match="top_p must be"):
        speller.stream("A", top_p=2)


def test_logits_that_are_nan_are_an_error_for_who_asked(speller, monkeypatch):
    space, newline = token_ids(" \n")
    monkeypatch.setattr(speller.runner, "params", with_nan(speller.runner, space))
    with pytest.raises(MeshwenError, match=r"prompt 2: .*token 1 of the answer are NaN"):
        speller.generate([[newline], [space]], max_new_tokens=2)
    stream = speller.stream([newline], max_new_tokens=20)
    assert [next(stream) for _ in range(3)] == ["H", "i", " "]
    with pytest.raises(MeshwenError, match="token 4 of the answer are NaN"):
        next(stream)
    held = speller.stream([newline], max_new_tokens=20, stop=" ?")  # Its last text comes with it.
    assert [next(held) for _ in range(3)] == ["H", "i", " "]
    with pytest.raises(MeshwenError, match="token 4 of the answer are NaN"):
        next(held)
    *events, last = speller.events([newline], max_new_tokens=20)
    assert "".join(event.text for event in events) == last.completion.text == "Hi "
    assert (last.token, last.completion.finish_reason) == (NO_TOKEN, "error")


def test_a_stream_is_the_completions_text_in_whole_characters(speller):
    pieces = list(speller.stream("A\n", max_new_tokens=20))
    assert pieces == list(ANSWER)
    assert "".join(pieces) == speller.generate("A\n", max_new_tokens=20)[0].text
    assert "".join(speller.stream("A\n", stop="!", max_new_tokens=20)) == ANSWER[:-1]


def test_events_carry_every_token(speller):
    events = list(speller.events("A\n", logprobs=True))
    assert [event.token for event in events] == answer_ids()
    assert tuple(event.logprob for event in events) == events[-1].completion.logprobs


@every_mesh
def test_without_a_tokenizer_ids_are_continued_and_text_is_refused(mesh):
    prompt = random_tokens(TINY, 1, 5, seed=5)[0]
    (found,) = tiny(mesh).generate(prompt, max_new_tokens=6)
    assert (found.tokens, found.text) == (greedy(tuple(prompt.tolist()))[0], "")
    with pytest.raises(MeshwenError, match="no tokenizer: give prompts as token ids"):
        tiny(mesh).generate("text")


def test_a_seed_that_nobody_gave_is_fresh_and_told(speller):
    first, second = (
        speller.generate(["\n"] * 2, temperature=9.0, max_new_tokens=8)[0] for _ in "ab"
    )
    assert first.seed != second.seed
    (again,) = speller.generate("\n", temperature=9.0, max_new_tokens=8, seed=first.seed)
    assert (again.tokens, again.seed) == (first.tokens, first.seed)
    assert speller.generate("A\n", max_new_tokens=2)[0].seed is None  # Greedy.
    seeds = {speller.request("A", temperature=1).sampling.seed for _ in range(8)}
    assert len(seeds) == 8
    assert speller.request("A", temperature=1, seed=0).sampling.seed == 0


def test_defaults_come_from_the_checkpoints_generation_config(folder, tmp_path):
    copy = write_speller(tmp_path / "speller")
    ends = token_ids("zi")  # Either ends an answer.
    settings = {"do_sample": True, "temperature": 0.5, "top_k": 3, "eos_token_id": ends}
    (copy / "generation_config.json").write_text(json.dumps(settings))
    model = Qwen2ForCausalLM.from_pretrained(copy, dtype="float32")
    params = model.request("A", max_new_tokens=5).sampling
    assert (params.temperature, params.top_k, params.max_new_tokens) == (0.5, 3, 5)
    (found,) = model.generate("\n", temperature=0)  # Ends where the generation config says.
    assert (found.text, found.finish_reason) == ("Hi", "stop")


def test_a_checkpoints_ceiling_is_not_asked_for(tmp_path):
    copy = write_speller(tmp_path / "speller")
    (copy / "generation_config.json").write_text('{"max_new_tokens": 131072}')
    model = Qwen2ForCausalLM.from_pretrained(copy, dtype="float32")
    params = model.request("A").sampling
    assert (params.max_new_tokens, params.max_new_tokens_asked) == (131072, False)
    assert model.request("A", max_new_tokens=5).sampling.max_new_tokens_asked
    assert model.generate("\n")[0].text == ANSWER


# --- Loading


def test_the_model_shows_what_it_is(speller):
    assert speller.config.vocab_size == 259
    assert speller.mesh.size == 1
    assert speller.dtype == jnp.float32
    assert speller.tokenizer.decode(token_ids(ANSWER)) == ANSWER


@pytest.mark.parametrize("name", ["params", "tokenizer", "generation_config", "engine"])
def test_what_a_model_was_made_from_cannot_be_replaced(speller, name):
    before = getattr(speller, name)
    with pytest.raises(AttributeError, match=f"^{name} of a model cannot be replaced: .*load"):
        setattr(speller, name, {})
    assert getattr(speller, name) is before
    with pytest.raises(TypeError, match="does not support item assignment"):
        speller.generation_config["eos_token_id"] = 7


def test_a_mesh_is_a_string_or_a_mesh(folder):
    for mesh, dtype in (("2x2", "bfloat16"), (make_mesh("2x2"), jnp.bfloat16)):
        model = Qwen2ForCausalLM.from_pretrained(folder, mesh=mesh, dtype=dtype)
        assert model.mesh == make_mesh("2x2")
        assert model.dtype == jnp.bfloat16
        assert model.generate("A\n", max_new_tokens=20)[0].text == ANSWER


def test_the_mesh_of_a_model_is_made_once(folder, monkeypatch):
    made, make = [], EngineOptions.make_mesh
    monkeypatch.setattr(EngineOptions, "make_mesh", lambda self: made.append(self) or make(self))
    Qwen2ForCausalLM.from_pretrained(folder, mesh="1x2")
    assert [options.mesh for options in made] == ["1x2"]


def test_what_a_user_should_know_of_a_checkpoint_is_a_warning(tmp_path):
    folder = write_speller(tmp_path / "whole")
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"quantization_config": {"quant_method": "gptq"}}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.warns(UserWarning, match=r'whole: .*quantization_config \("gptq"\) is ignored'):
        Qwen2ForCausalLM.from_pretrained(folder)


def test_the_class_is_the_checkpoints_or_refused_in_one_line(folder, monkeypatch):
    class Other(CausalLM):
        model_type = "other"

    named = r"speller is a qwen2 model: load it with Qwen2ForCausalLM or AutoModel.*, not Other$"
    with pytest.raises(MeshwenError, match=named):
        Other.from_pretrained(folder)
    model = meshwen.AutoModelForCausalLM.from_pretrained(folder, load_format="dummy")
    assert type(model) is Qwen2ForCausalLM
    monkeypatch.setattr("meshwen.causal_lm._CLASSES", {})  # As of one without a public class.
    model = meshwen.AutoModelForCausalLM.from_pretrained(folder, load_format="dummy")
    assert type(model) is CausalLM


def test_another_architecture_is_refused_in_one_line(tmp_path):
    llama = write_speller(tmp_path / "llama")
    settings = json.loads((llama / "config.json").read_text())
    settings |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (llama / "config.json").write_text(json.dumps(settings))
    with pytest.raises(MeshwenError, match=r"LlamaForCausalLM.* is not supported") as error:
        AutoModelForCausalLM.from_pretrained(llama)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"dtype": "float16"}, "dtype must be float32 or bfloat16, not 'float16'"),
        ({"numerics": "loose"}, "numerics must be fast or exact, not 'loose'"),
        ({"load_format": "zip"}, "load_format must be auto, .* or dummy, not 'zip'"),
        ({"mesh": "2y4"}, "mesh must be such as 8, .*, not '2y4'"),
        ({"mesh": "64"}, "needs 64 devices"),
        ({"mesh": 64}, "needs 64 devices"),
        ({"dtype": jnp.float16}, "dtype must be .*, not <class 'jax.numpy.float16'>"),
        ({"dtype": None}, "dtype must be float32 or bfloat16, not None"),
        ({"quantization": 8}, "quantization must be int8, not 8"),
        ({"msh": "1x8"}, r"no option 'msh' \(did you mean mesh\?\); there are mesh, model_axes"),
        ({"progress": 1}, "progress must be a function, not 1"),
        ({"path_or_hub_id": None}, "the model must be a path or name, not None"),
    ],
)
def test_an_unknown_choice_is_named(folder, choices, words):
    with pytest.raises(MeshwenError, match=words):
        Qwen2ForCausalLM.from_pretrained(**{"path_or_hub_id": folder} | choices)


def test_sizes_that_are_no_numbers_are_named():
    for name in ("max_num_seqs", "max_model_len", "prompt_lookup_num_tokens"):
        for value in ("8", 1.5, True):
            with pytest.raises(MeshwenError, match=f"{name} must be a whole number, not {value!r}"):
                EngineOptions(**{name: value})


def test_requests_that_are_none_are_named():
    engine = tiny().engine
    for requests in (None, "hi", [1], Request((1,), SamplingParams())):
        with pytest.raises(MeshwenError, match=r"must be a (list|Request), not"):
            engine.run(requests)
    with pytest.raises(MeshwenError, match="prompt_tokens must be whole numbers"):
        Request((1.5,), SamplingParams())
    assert Request(jnp.array([1, 2]), SamplingParams()).prompt_tokens == (1, 2)
    one = Request((1, 2), SamplingParams(max_new_tokens=2))
    assert len(list(engine.run(iter([one])))) == 2


def test_logits_of_what_is_no_batch_are_refused():
    for ids, mask, words in (
        ([[5], [5, 6]], None, "input_ids must have rows of one length"),
        ([5, 6], None, r"input_ids must be int \[batch, sequence\]"),
        (
            [[5]],
            [["a"]],
            "attention_mask must be int or bool, 1 at tokens and 0 at padding, not <U1",
        ),
    ):
        with pytest.raises(MeshwenError, match=words):
            tiny()(ids, mask)


def test_a_path_that_is_not_there_is_named(tmp_path):
    with pytest.raises(MeshwenError, match="nothing-here does not exist"):
        Qwen2ForCausalLM.from_pretrained(tmp_path / "nothing-here")


@pytest.mark.parametrize("name", ["qwen2.5-7b", "Qwen2.5-72B"])
def test_a_preset_runs_on_no_weights_but_those_that_were_asked_for(name):
    with pytest.raises(MeshwenError, match=r"without weights: pass .* or --load-format dummy"):
        Qwen2ForCausalLM.from_pretrained(name)


def test_a_preset_runs_on_dummy_weights(monkeypatch):
    small = (48, 32, 2, 6, 2, 263, True)  # The fields of the published sizes.
    monkeypatch.setitem(presets._QWEN2_5, "qwen2.5-7b", small)
    told = []
    model = Qwen2ForCausalLM.from_pretrained(
        "Qwen2.5-7B",
        load_format="dummy",
        mesh="1x8",
        dtype="float32",
        progress=lambda *step: told.append(step),
    )
    (found,) = model.generate([1, 2, 3], max_new_tokens=4)
    assert len(found.tokens) == 4
    assert max(found.tokens) < 263
    assert (model.config, model.tokenizer) == (presets.preset("qwen2.5-7b"), None)
    assert told[-1][0] == told[-1][1] > 0


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_limit_beyond_the_context_is_refused_before_weights_are_loaded(folder, load_format):
    told = []
    with pytest.raises(MeshwenError, match=f"max_model_len must be .* context of {CONTEXT}, not"):
        Qwen2ForCausalLM.from_pretrained(
            folder,
            load_format=load_format,
            max_model_len=CONTEXT + 1,
            progress=lambda *step: told.append(step),
        )
    assert told == []


def test_a_checkpoint_gets_dummy_weights_only_when_asked_for(folder):
    model = Qwen2ForCausalLM.from_pretrained(folder, load_format="dummy", dtype="float32")
    assert model.generate("A\n", max_new_tokens=20)[0].text != ANSWER
    assert model.tokenizer is not None


# --- Importing


@every_mesh
def test_the_memory_of_a_model_is_free_when_its_last_use_is(mesh):
    model = Qwen2ForCausalLM(MeshModel(TINY, mesh).runner, None, {})
    model(random_tokens(TINY, 2, 5))
    model.generate([[1, 2, 3]], temperature=0, max_new_tokens=2)
    weight = weakref.ref(jax.tree.leaves(model.runner.params)[0])
    gc.disable()  # Collecting cycles is late: the next model may not fit beside this one.
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_importing_starts_no_back_end():
    script = (
        "import meshwen, meshwen.cli, meshwen.cli.app\n"
        "for name in meshwen.__all__: getattr(meshwen, name)\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
        "import jax; jax.devices()\n"
        "assert xla_bridge.backends_are_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_public_names_are_there_and_no_others():
    assert dir(meshwen) == meshwen.__all__ == sorted(meshwen.__all__)
    assert all(getattr(meshwen, name).__name__ for name in meshwen.__all__)
    with pytest.raises(AttributeError, match="'meshwen' has no attribute 'Gwen'"):
        meshwen.Gwen  # noqa: B018
