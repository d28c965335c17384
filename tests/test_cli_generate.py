# SPDX-License-Identifier: Apache-2.0
"""`meshwen generate` end to end, on a checkpoint whose answer is known."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from mesh_model import with_nan
from meshwen import Qwen2ForCausalLM
from meshwen.cli import main
from meshwen.errors import MeshwenError
from speller import (
    ANSWER,
    CONTEXT,
    answer_ids,
    answer_logprobs,
    chat_ids,
    load_once,
    token_ids,
    write_speller,
)

pytestmark = pytest.mark.usefixtures("unoptimised")
load_model = load_once()


@pytest.fixture(autouse=True)
def _models_are_loaded_once(monkeypatch):
    monkeypatch.setattr("meshwen.cli.generate.load_model", load_model)


@pytest.fixture(scope="module")
def speller(tmp_path_factory):
    return str(write_speller(tmp_path_factory.mktemp("models") / "speller"))


def answers(capsys, *arguments):
    """The objects of a --json run in this process."""
    assert main(["generate", *arguments, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_new_process_streams_whole_characters_on_a_simulated_mesh(speller, tmp_path):
    command = [sys.executable, "-m", "meshwen", "generate", "--model", speller, "--mesh", "1x8"]
    started = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
        | {"XDG_CACHE_HOME": str(tmp_path)},
    )
    stdout, stderr = started.communicate("Grüß Gott\n".encode())
    notes = stderr.decode()
    assert started.returncode == 0, notes
    assert stdout.decode() == f"{ANSWER}\n"
    assert "mesh: 1x8, 8 simulated cpu devices" in notes
    assert "kv heads: 1, query heads: 1 (2 of the mesh's 8 are padding)" in notes
    assert "rounded from float32 to bfloat16" in notes
    assert "KV cache: 40 blocks of 32 tokens" in notes  # Of 8 sequences of 160.
    assert "first token after" in notes


def test_pieces_come_one_by_one(speller, capsys, monkeypatch):
    pieces = []
    monkeypatch.setattr(sys.stdout, "write", pieces.append)
    assert main(["generate", "hi", "--model", speller, "--dtype", "float32"]) == 0
    assert [piece for piece in pieces if piece] == [*ANSWER, "\n"]


def test_a_saved_prefix_is_found_by_the_prompts_that_begin_with_it(speller, tmp_path, capsys):
    file, system = tmp_path / "file", "z" * 64
    model = Qwen2ForCausalLM.from_pretrained(speller, dtype="float32")
    assert model.save_prefix(file, [{"role": "system", "content": system}]) == 64
    arguments = ["--model", speller, "--dtype", "float32", "--system", system, "--json"]
    assert main(["generate", "hi", *arguments, "--load-prefix", str(file)]) == 0
    output = capsys.readouterr()
    found = json.loads(output.out)
    assert (found["text"], found["cached_tokens"]) == (ANSWER, 64)
    assert f"prefix: 64 tokens of {file} are in the KV cache" in output.err
    assert f"; 64 of {len(found['prompt_tokens'])} prompt tokens cached" in output.err
    assert main(["generate", "hi", *arguments, "--load-prefix", str(tmp_path / "no")]) == 2
    assert "there is no such file" in capsys.readouterr().err
    arguments += ["--dtype", "bfloat16", "--load-prefix", str(file)]
    assert main(["generate", "hi", *arguments]) == 2
    assert 'was saved with dtype "float32", this model has "bfloat16"' in capsys.readouterr().err


def test_a_seed_that_nobody_gave_is_printed_and_draws_the_same_again(speller, capsys):
    arguments = ["hi", "--model", speller, "--temp", "9", "-n", "8", "--json"]
    assert main(["generate", *arguments]) == 0
    output = capsys.readouterr()
    first = json.loads(output.out)
    assert f"seed: {first['seed']} (--seed {first['seed']} draws the same again)" in output.err
    assert first["sampling"]["seed"] == first["seed"]
    (again,) = answers(capsys, *arguments[:-1], "--seed", str(first["seed"]))
    assert again["tokens"] == first["tokens"]
    assert "seed:" not in capsys.readouterr().err


def test_json_gives_ids_text_and_log_probabilities(speller, capsys):
    (found,) = answers(
        capsys,
        *("hi", "--model", speller, "--mesh", "2x2", "--dtype", "float32", "--system", "s"),
        "--logprobs",
    )
    assert found["prompt_tokens"] == chat_ids(("system", "s"), ("user", "hi"))
    assert found["tokens"] == answer_ids()
    assert found["text"] == ANSWER
    assert found["finish_reason"] == "stop"
    np.testing.assert_allclose(found["logprobs"], answer_logprobs(), rtol=0, atol=1e-4)
    assert (found["mesh"], found["dtype"], found["numerics"]) == ("2x2", "float32", "fast")
    assert found["model"] == speller
    assert found["sampling"]["temperature"] == 0
    assert found["timings"]["time_to_first_token"] > 0
    assert found["stop_reason"] is None
    assert "top_logprobs" not in found


def test_json_gives_the_likeliest_tokens_and_what_ended_an_answer(speller, capsys):
    asked = ("--logprobs", "--top-logprobs", "2", "--stop-token-ids", str(answer_ids()[1]))
    (found,) = answers(capsys, "hi", "--model", speller, *asked, "--stop-token-ids", "0")
    assert (found["tokens"], found["stop_reason"]) == (answer_ids()[:2], answer_ids()[1])
    for token, logprob, top in zip(
        found["tokens"], found["logprobs"], found["top_logprobs"], strict=True
    ):
        assert top[0] == [token, logprob]
        assert len(top) == 2
        assert top[1][1] < logprob
    (ignoring,) = answers(capsys, "hi", "--model", speller, "--ignore-eos", "-n", "12")
    assert (len(ignoring["tokens"]), ignoring["finish_reason"]) == (12, "length")
    assert ignoring["tokens"][:9] == answer_ids()
    (frequent,) = answers(capsys, "hi", "--model", speller, "--frequency-penalty", "-1.5")
    assert frequent["sampling"]["frequency_penalty"] == -1.5


def test_an_answer_whose_logits_are_nan_fails_and_the_others_go_on(
    speller, capsys, tmp_path, monkeypatch
):
    def load(*arguments, **options):
        model = load_model(*arguments, **options)
        monkeypatch.setattr(model.runner, "params", with_nan(model.runner, *token_ids("?")))
        return model

    monkeypatch.setattr("meshwen.cli.generate.load_model", load)
    path = tmp_path / "prompts.jsonl"
    prompts = [token_ids(text) for text in ("\n", "?", "a\n")]
    path.write_text("\n".join(json.dumps({"prompt_tokens": ids}) for ids in prompts))
    arguments = ("--prompts-file", str(path), "--model", speller, "--max-new-tokens", "3")
    assert main(["generate", "--json", *arguments]) == 2
    out, err = capsys.readouterr()
    found = [json.loads(line) for line in out.splitlines()]
    assert [answer["text"] for answer in found] == ["Hi ", "", "Hi "]
    assert ["error" in answer for answer in found] == [False, True, False]
    assert found[1]["finish_reason"] == "error"
    assert "1 of 3 answers failed; " in err
    assert f"{path} line 2: the model's logits" in err


def test_prompts_of_a_file_keep_their_order_and_fields(speller, capsys, tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = ({"prompt": "a", "id": "x"}, {"prompt_tokens": token_ids("\n"), "n": [1]})
    path.write_text("plain\n" + "\n".join(map(json.dumps, lines)), encoding="utf-8")
    arguments = ("--prompts-file", str(path), "--model", speller, "--max-new-tokens", "3")
    found = answers(capsys, *arguments)
    assert [answer["text"] for answer in found] == ["Hi "] * 3
    assert [answer["finish_reason"] for answer in found] == ["length"] * 3
    assert "logprobs" not in found[0]
    assert found[1]["id"] == "x"
    assert (found[2]["n"], found[2]["prompt_tokens"]) == ([1], token_ids("\n"))
    assert main(["generate", *arguments]) == 0
    output = capsys.readouterr()
    assert output.out == "[1/3] plain\nHi \n\n[2/3] a\nHi \n\n[3/3] 198\nHi \n"
    assert "cut off after 3 tokens, see --max-new-tokens: 3 of 3 answers\n" in output.err


def test_a_short_answer_waits_for_the_longer_one_before_it(speller, capsys, tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt_tokens": token_ids(text)}) for text in ("\n", "!")]
    path.write_text("\n".join(lines), encoding="utf-8")
    found = answers(capsys, "--prompts-file", str(path), "--model", speller)
    assert [answer["text"] for answer in found] == [ANSWER, ""]
    assert [answer["prompt_tokens"] for answer in found] == [token_ids("\n"), token_ids("!")]


@pytest.mark.parametrize(("limit", "arguments"), [(CONTEXT, []), (60, ["--max-model-len", "60"])])
def test_an_answer_that_the_context_cuts_off_is_announced(limit, arguments, speller, capsys):
    # The template takes 19 tokens around a user's message; this leaves room for 3 more.
    prompt = "x" * (limit - 19 - 3)
    assert main(["generate", prompt, "--model", speller, *arguments]) == 0
    output = capsys.readouterr()
    assert output.out == f"{ANSWER[:3]}\n"
    assert f"cut off where the model's context of {limit} tokens is full: 1 of 1 answer\n" in (
        output.err
    )
    assert main(["generate", "hi", "--model", speller]) == 0
    assert "cut off" not in capsys.readouterr().err


def test_text_that_stdout_cannot_encode_comes_out_escaped(speller, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main(["generate", "hi", "--model", speller]) == 0
    stdout.flush()
    assert stdout.buffer.getvalue() == ANSWER.encode("ascii", "backslashreplace") + b"\n"


def test_the_batch_size_reaches_the_engine(tmp_path, monkeypatch):
    sizes = []

    def load(checkpoint, tokenizer, options, progress):
        sizes.append(options.max_num_seqs)
        raise MeshwenError("enough")

    monkeypatch.setattr("meshwen.causal_lm.CausalLM.from_checkpoint", load)
    folder = str(write_speller(tmp_path))
    for arguments in ((), ("--batch-size", "3")):
        assert main(["generate", "hi", "--model", folder, *arguments]) == 2
    assert sizes == [8, 3]


def test_a_field_that_an_answer_has_itself_is_refused(capsys, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "text": "mine"}', encoding="utf-8")
    assert main(["generate", "--prompts-file", str(path), "--json"]) == 2
    assert "line 1: the field 'text' is also one of the answer's" in capsys.readouterr().err


def test_a_stop_string_ends_the_answer(speller, capsys):
    arguments = ["generate", "hi", "--model", speller, "--stop", "zzz", "--stop", ANSWER[3]]
    assert main([*arguments, "--no-stream"]) == 0
    assert capsys.readouterr().out == f"{ANSWER[:3]}\n"


def test_random_weights_are_announced(speller, capsys, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt_tokens": [1, 2, 3]}', encoding="utf-8")
    arguments = ["--prompts-file", str(path), "--model", speller, "--load-format", "dummy"]
    assert main(["generate", *arguments, "--max-new-tokens", "2"]) == 0
    assert "weights: random" in capsys.readouterr().err


def test_sampling_defaults_are_the_checkpoints(speller, capsys, tmp_path):
    folder = write_speller(tmp_path / "sampler")
    settings = {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "repetition_penalty": 1.1}
    (folder / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    arguments = ("hi", "--model", str(folder), "--max-new-tokens", "1")
    (found,) = answers(capsys, *arguments, "--top-p", "0.5", "--seed", "3")
    expected = settings | {"top_p": 0.5, "seed": 3}
    del expected["do_sample"]
    assert {key: found["sampling"][key] for key in expected} == expected
    (greedy,) = answers(capsys, *arguments, "--temperature", "0")
    assert greedy["sampling"]["repetition_penalty"] == 1
