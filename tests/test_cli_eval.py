# SPDX-License-Identifier: Apache-2.0
"""`meshwen eval`: the demo model's score, resumed, on meshes, compared, and what is refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from html import escape

import pytest

from meshwen import demo
from meshwen.cli import main
from meshwen.cli.load import load_model
from meshwen.errors import MeshwenError
from meshwen.evals.gsm8k import summary
from meshwen.evals.run_file import RunFile
from meshwen.ops.backend import Backend
from meshwen.ops.cpu import kernels
from meshwen.runtime import memory
from speller import load_once

HELD_OUT = demo.path() / "heldout.jsonl"
pytestmark = pytest.mark.usefixtures("unoptimised")
once = load_once()


@pytest.fixture(autouse=True)
def _models_are_loaded_once(monkeypatch):
    monkeypatch.setattr("meshwen.cli.eval_run.load_model", once)


def gsm8k(*options) -> int:
    return main(["eval", "gsm8k", *map(str, options)])


def test_a_run_goes_on_where_it_stopped(tmp_path, capsys):
    out = tmp_path / "run.jsonl"
    assert gsm8k("--out", out, "--limit", 6, "--batch-size", 4) == 0
    assert "demo: 6 of 6 right, 100.0% (95% interval 61.0% to 100.0%)" in capsys.readouterr().out
    before = out.read_bytes()
    assert gsm8k("--out", out, "--limit", 9, "--batch-size", 4, "--resume", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["problems"], found["correct"], found["answers_from_before"]) == (9, 9, 6)
    assert found["seconds"] > RunFile.read(out).records[5, 0]["elapsed"] > 0
    assert gsm8k("--out", out, "--limit", 4, "--resume", "--json") == 0
    assert json.loads(capsys.readouterr().out)["problems"] == 4
    assert out.read_bytes().startswith(before)
    records = RunFile.read(out).records
    assert sorted(records) == [(number, 0) for number in range(9)]
    problems = [json.loads(line) for line in HELD_OUT.read_text().splitlines()[:9]]
    for number, problem in enumerate(problems):
        one = records[number, 0]
        assert one["question"] == problem["question"]
        assert one["gold"] == problem["answer"].rpartition("#### ")[2]
        assert one["text"].strip().endswith(f"#### {one['gold']}")
        assert one["finish_reason"] == "stop"
        assert one["logprob"] < 0
        assert len(one["tokens"]) > 5


def test_a_file_of_a_version_that_counted_no_prompt_tokens_goes_on(tmp_path, capsys):
    out, older = tmp_path / "run.jsonl", tmp_path / "older.jsonl"
    assert gsm8k("--out", out, "--limit", 2) == 0
    assert "prompt tokens cached" in capsys.readouterr().out
    head, *answers = [json.loads(line) for line in out.read_text().splitlines()]
    for one in answers:
        del one["prompt_tokens"], one["cached_tokens"]
    older.write_text("".join(f"{json.dumps(line)}\n" for line in (head, *answers)))
    assert gsm8k("--out", older, "--limit", 2, "--resume") == 0
    assert "prompt tokens cached" not in capsys.readouterr().out
    assert gsm8k("--out", older, "--limit", 3, "--resume", "--json") == 0
    records = RunFile.read(older).records
    found = json.loads(capsys.readouterr().out)
    assert found["prompt_tokens"] == records[2, 0]["prompt_tokens"]


def test_a_mesh_or_a_file_that_is_refused_is_before_any_answer(tmp_path, monkeypatch, capsys):
    def unexpected(*_, **__):
        raise AssertionError("a model was loaded")

    assert gsm8k("--out", tmp_path / "1x8.jsonl", "--limit", 1, "--mesh", "2") == 0
    capsys.readouterr()
    monkeypatch.setattr("meshwen.cli.eval_run.load_model", unexpected)
    meshes = ["eval", "meshes", "--limit", "1", "--resume", "--out", str(tmp_path), "--meshes"]
    assert main([*meshes, "1x1,1x3"]) == 2
    assert "not 3" in capsys.readouterr().err
    assert main([*meshes, "1x1,1x8", "--numerics", "fast"]) == 2
    assert "was made with mesh '2', this run has '1x8'" in capsys.readouterr().err


def test_progress_tells_answers_accuracy_and_tokens_a_second(tmp_path, monkeypatch):
    told = []

    @contextmanager
    def recorder(label):
        yield lambda *said: told.append(said)

    monkeypatch.setattr("meshwen.cli.eval_run.progress_bar", recorder)
    out = tmp_path / "run.jsonl"
    assert gsm8k("--out", out, "--limit", 3) == 0
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert {total for _, total, _ in told} == {3}
    assert len(told) == sum(len(one["tokens"]) for one in RunFile.read(out).records.values())
    assert re.fullmatch(r"3 of 3 right, \d+ tokens/s", told[-1][2])


def test_progress_is_told_in_lines_where_there_is_no_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("meshwen.cli.console._LINE_PERIOD", 0.0)
    assert gsm8k("--out", tmp_path / "run.jsonl", "--limit", 2) == 0
    lines = capsys.readouterr().err.splitlines()
    assert any(re.fullmatch(r"answering: 1 of 2, 1 of 1 right, \d+ tokens/s", s) for s in lines)


@pytest.mark.slow
def test_a_run_that_is_killed_repeats_and_loses_nothing(tmp_path, capsys):
    out = tmp_path / "run.jsonl"
    command = [sys.executable, "-m", "meshwen", "eval", "gsm8k", "--out", out, "--batch-size", "2"]
    # A process that is killed may leave half of a cache entry.
    apart = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs")}
    running = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | apart
    )
    deadline = time.monotonic() + 120
    while not out.exists() or out.read_bytes().count(b"\n") < 4:
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.01)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    kept = out.read_bytes()
    kept = kept[: kept.rindex(b"\n") + 1]
    assert gsm8k("--out", out, "--limit", 20, "--resume") == 0
    assert out.read_bytes().startswith(kept)
    lines = out.read_bytes().splitlines()[1:]
    assert sorted(json.loads(line)["id"] for line in lines)[:20] == list(range(20))
    assert len({json.loads(line)["id"] for line in lines}) == len(lines)


@pytest.mark.slow
def test_every_mesh_gives_the_answers_of_one_device(tmp_path, capsys):
    for numerics, meshes in (("exact", ["1x1", "2x4"]), ("fast", ["1x1", "8x1"])):
        out = tmp_path / numerics
        run = ["eval", "meshes", "--out", str(out), "--numerics", numerics, "--json"]
        assert main([*run, "--meshes", ",".join(meshes), "--limit", "6"]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert [row["mesh"] for row in rows] == meshes
        assert all(row["accuracy"] >= 0.9 for row in rows)
        assert len({row["correct"] for row in rows}) == 1
        if numerics == "exact":
            assert all(row["against_first"]["identical"] == 6 for row in rows)
            runs = [RunFile.read(out / f"{row['mesh']}.jsonl").records for row in rows]
            logprobs = [{i: one["logprob"] for i, one in records.items()} for records in runs]
            assert all(one == logprobs[0] for one in logprobs)


def test_the_meshes_of_the_challenge_are_the_default(capsys):
    assert main(["eval", "meshes", "--help"]) == 0
    assert "1x1,1x8,2x4,8x4,1x32" in capsys.readouterr().out


@pytest.fixture(scope="module")
def run_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    paths = [folder / "a.jsonl", folder / "b.jsonl"]
    assert gsm8k("--out", paths[0], "--limit", 3) == 0
    lines = paths[0].read_text().splitlines()
    changed = json.loads(lines[-1])
    changed |= {"correct": False, "extracted": "1", "text": "it is 1", "tokens": [1]}
    paths[1].write_text("\n".join([*lines[:-1], json.dumps(changed)]) + "\n")
    return paths


@pytest.mark.parametrize(
    ("require", "status"),
    [((), 0), (("--require", "identical"), 1), (("--require", "same-score"), 1)],
)
def test_two_runs_are_compared(run_files, capsys, require, status):
    first, second = map(str, run_files)
    assert main(["eval", "compare", first, second, *require]) == status
    said = capsys.readouterr().out
    assert "McNemar's exact p: 1; identical answers: 2 of 3" in said
    assert "other tokens in problem 2 from 0; the earliest from 0 on, in problem 2" in said
    assert "it is 1" in said
    assert main(["eval", "compare", first, first, *require, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["identical"] == 3


def test_the_common_part_of_two_runs_is_compared(run_files, tmp_path, capsys):
    part, html = tmp_path / "part.jsonl", tmp_path / "r.html"
    part.write_text("\n".join(run_files[0].read_text().splitlines()[:3]) + "\n")
    asked = ["eval", "compare", str(run_files[0]), str(part)]
    assert main([*asked, "--html", str(html)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "2 answers" in said
    assert f"in one run alone, and left out: 1 in {run_files[0]}" in said
    assert f"left out: 1 in {run_files[0]}" in html.read_text()
    for require in ("identical", "same-score"):  # Neither can be said of answers that are missing.
        assert main([*asked, "--require", require]) == 1
    assert main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["alone"] == [[[2, 0]], []]


def edited_json(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: v for name, v in content.items() if v is not None}))


def test_the_style_of_a_base_model_is_said_and_kept(tmp_path, capsys):
    """A model without a chat template is shown solved examples, and the run's header says why."""
    out, model = tmp_path / "run.jsonl", tmp_path / "demo"
    shutil.copytree(demo.path(), model)
    asked = ("--model", model, "--data", HELD_OUT, "--limit", 1, "--max-new-tokens", 2)
    edited_json(model / "tokenizer_config.json", chat_template=None)
    assert gsm8k("--out", out, *asked, "--train", HELD_OUT) == 0
    said, why = capsys.readouterr(), "the model has no chat template, so it is taken for a base"
    assert said.err.startswith(f"prompt style lm-eval: {why} model\n")
    assert f"\nprompt style lm-eval: {why} model\n" in said.out
    settings = RunFile.read(out).settings
    assert settings["prompt_style"] == "lm-eval"
    assert settings["prompt_style_why"] == f"{why} model"
    named = ("--prompt-style", "lm-eval", "--train", HELD_OUT)
    assert gsm8k("--out", out, *asked, *named, "--resume") == 0


def test_a_problem_that_cannot_be_asked_is_wrong_and_listed(tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    good = HELD_OUT.read_text().splitlines()[0]
    long = json.dumps({"question": "many words " * 2000, "answer": "#### 1"})
    data.write_text(f"{good}\n\n{long}\n")
    assert gsm8k("--out", tmp_path / "r.jsonl", "--data", data) == 0
    said = capsys.readouterr().out
    assert "1 of 2 right" in said
    assert "could not be asked, counted as wrong: 2" in said
    assert "context" in RunFile.read(tmp_path / "r.jsonl").records[2, 0]["error"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has no problems"),
        ("\n \n", "has no problems"),
        (
            '{"question": "a \\ud83d b", "answer": "#### 1"}',
            "line 1: half of a character",
        ),
        ('{"question": "?", "answer": "#### 1"}\n{', "line 2: not valid JSON"),
        ('{"question": "?", "answer": "#### 1"}\n[1]', "line 2: expected an object"),
        ('{"question": "?"}', "line 1: 'answer' is missing"),
        ('{"question": " ", "answer": "#### 1"}', "line 1: 'question' is missing, empty"),
        ('{"question": "?", "answer": "1"}', "does not end with '#### ' and a number"),
        ('{"question": "?", "answer": "#### many"}', "does not end with '#### ' and a number"),
        (b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_bad_data_names_the_line(tmp_path, capsys, content, said):
    data = tmp_path / "data.jsonl"
    data.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert gsm8k("--out", tmp_path / "r.jsonl", "--data", data) == 2
    error = capsys.readouterr().err
    assert error.startswith("meshwen: error: ")
    assert said in error
    assert not (tmp_path / "r.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prompt-style", "gsm"], "--prompt-style must be qwen-boxed, lm-eval, "),
        (["--train", HELD_OUT], "has no solved examples"),
        (["--offset", 500], "--offset must be below 200, the number of problems, not 500"),
        (["--data", "none.jsonl"], "cannot read none.jsonl"),
        (["--out", "no/such/folder/r.jsonl"], "cannot write no/such/folder/r.jsonl"),
        (["--samples", "2"], "--samples needs a --temperature"),
        (["--max-model-len", "5000"], "max_model_len must be from 2 to the model's context"),
        (["--html", "no/such/folder/r.html", "--limit", 1], "cannot write no/such/folder/r.html"),
        (["--temperature", "-1"], "temperature must be"),
        (["--mesh", "1x1x"], "mesh"),
    ],
)
def test_what_cannot_be_run_is_one_line_and_exit_status_2(tmp_path, capsys, options, said):
    out = [] if "--out" in options else ["--out", tmp_path / "r.jsonl"]
    assert gsm8k(*out, *options) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("meshwen: error: ")
    assert said in error


def test_a_run_of_another_model_of_the_same_name_is_refused(tmp_path, capsys):
    out, other = tmp_path / "run.jsonl", tmp_path / "demo"
    assert gsm8k("--out", out, "--limit", 1) == 0
    shutil.copytree(demo.path(), other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    asked = ("--model", other, "--prompt-style", "demo", "--data", HELD_OUT, "--limit", 2)
    assert gsm8k("--out", out, "--resume", *asked) == 2
    assert "was made with weights_sha256" in capsys.readouterr().err


def test_answers_that_were_graded_otherwise_are_refused(tmp_path, capsys):
    out, altered = tmp_path / "run.jsonl", tmp_path / "altered.jsonl"
    assert gsm8k("--out", out, "--limit", 1) == 0
    header, line = out.read_text(encoding="utf-8").splitlines()
    for change in ({"correct": False}, {"text": "#### -1"}, {"extracted": "0"}, {"gold": "0"}):
        record = json.loads(line) | change
        altered.write_text(f"{header}\n{json.dumps(record)}\n", encoding="utf-8")
        capsys.readouterr()
        assert gsm8k("--out", altered, "--limit", 1, "--resume") == 2
        assert "the answer to problem 0 is not graded as its text" in capsys.readouterr().err


def test_other_prompts_are_refused(tmp_path, capsys):
    """A run does not go on with another chat template, and does not begin without one."""
    out, model = tmp_path / "run.jsonl", tmp_path / "demo"
    shutil.copytree(demo.path(), model)
    asked = ("--model", model, "--prompt-style", "demo", "--data", HELD_OUT)
    assert gsm8k("--out", out, *asked, "--limit", 1) == 0
    path = model / "tokenizer_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"chat_template": "Hi. " + content["chat_template"]}))
    capsys.readouterr()
    assert gsm8k("--out", out, "--resume", *asked, "--limit", 2) == 2
    assert "the prompt of problem 0 was another" in capsys.readouterr().err
    del content["chat_template"]
    path.write_text(json.dumps(content))
    assert gsm8k("--out", tmp_path / "new.jsonl", *asked) == 2
    assert "chat template" in capsys.readouterr().err
    assert not (tmp_path / "new.jsonl").exists()


def test_samples_differ_and_are_counted_by_problem(tmp_path, capsys):
    out, html = tmp_path / "r.jsonl", tmp_path / "r.html"
    drawn = ("--samples", 3, "--temperature", 1.5, "--limit", 4, "--max-new-tokens", 40)
    assert gsm8k("--out", out, *drawn, "--html", html, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    records = RunFile.read(out).records
    assert sorted(records) == [(problem, sample) for problem in range(4) for sample in range(3)]
    assert len({tuple(one["tokens"]) for one in records.values()}) > 4
    assert (found["problems"], found["answers"]) == (4, 12)
    assert found["correct"] == sum(one["correct"] for one in records.values())
    for (_, sample), one in records.items():  # All but the first token behind the last whole block.
        assert sample == 0 or one["cached_tokens"] == (one["prompt_tokens"] - 1) // 32 * 32 > 0
    cached = sum(one["cached_tokens"] for one in records.values())
    prompts = sum(one["prompt_tokens"] for one in records.values())
    assert (found["cached_tokens"], found["prompt_tokens"]) == (cached, prompts)
    right = [[records[problem, k]["correct"] for k in range(3)] for problem in range(4)]
    assert found["any_correct"] == sum(map(any, right))
    # The first sample is the only one of a run of one.
    assert gsm8k("--out", tmp_path / "s.jsonl", *drawn[2:], "--json") == 0
    alone = RunFile.read(tmp_path / "s.jsonl").records
    assert [alone[n, 0]["tokens"] for n in range(4)] == [records[n, 0]["tokens"] for n in range(4)]
    assert "problems with a right answer" in html.read_text()


def test_the_most_frequent_answer_of_a_problem_counts():
    def records(problem, *extracted):
        asked = {"id": problem, "tokens": [1], "finish_reason": "stop"}
        return [
            asked | {"sample": k, "extracted": text, "correct": text == "1000"}
            for k, text in enumerate(extracted)
        ]

    found = summary(
        [
            *records(0, "5", "1000", "1000"),
            *records(1, "1,000.0", "5", "5"),
            *records(2, None, None, "1000"),  # No answer has no say.
            *records(3, "5", "1000", None),  # The earlier of two.
        ]
    )
    assert (found["any_correct"], found["majority_correct"], found["correct"]) == (3, 2, 4)


def test_answers_that_were_graded_otherwise_are_told(run_files, tmp_path, capsys):
    first, other = run_files[0], tmp_path / "other.jsonl"
    lines = first.read_text().splitlines()
    regraded = json.loads(lines[1]) | {"correct": False}
    other.write_text("\n".join([lines[0], json.dumps(regraded), *lines[2:]]) + "\n")
    html = tmp_path / "r.html"
    assert main(["eval", "compare", str(first), str(other), "--html", str(html)]) == 0
    assert "graded otherwise" in capsys.readouterr().out
    assert "graded otherwise" in html.read_text()


def test_a_report_shows_questions_answers_and_flips(run_files, tmp_path, capsys):
    html = tmp_path / "r.html"
    first, second = map(str, run_files)
    assert main(["eval", "compare", first, second, "--html", str(html)]) == 0
    page = html.read_text()
    question = RunFile.read(run_files[0]).records[0, 0]["question"]
    assert page.count("it is 1") == 1
    assert escape(question) in page
    assert "2 of 3" in page
    assert "problem 2 from token 0" in page
    assert "Other tokens in 1 of 3 answers" in page


def test_a_report_never_takes_the_place_of_a_run(tmp_path, capsys):
    out = tmp_path / "r.jsonl"
    assert gsm8k("--out", out, "--limit", 1, "--html", out) == 2
    assert gsm8k("--out", out, "--limit", 1) == 0
    run = out.read_bytes()
    (tmp_path / "link").symlink_to(out)
    for html in (str(out), str(tmp_path / "link")):
        assert main(["eval", "compare", str(out), str(out), "--html", html]) == 2
        assert gsm8k("--out", out, "--limit", 1, "--resume", "--html", html) == 2
    assert "name another file for the report" in capsys.readouterr().err
    assert out.read_bytes() == run


def test_a_problem_that_does_not_fit_is_counted_as_wrong_and_the_others_are_asked(
    tmp_path, monkeypatch, capsys
):
    data = tmp_path / "data.jsonl"
    problems = HELD_OUT.read_text().splitlines()[:2]
    long = json.dumps({"question": "What is " + "1 + " * 90 + "1?", "answer": "#### 91"})
    data.write_text("\n".join([problems[0], long, problems[1]]))
    monkeypatch.setattr("meshwen.cli.eval_run.load_model", load_model)  # Looks at the free memory.
    monkeypatch.setattr("meshwen.weights.loading.free_bytes", lambda devices: 1 << 30)
    # 4 layers of 4 heads of 8 in bfloat16, which kernels fill up to 32: 12 blocks and another.
    token_bytes = 2 * 4 * 4 * (8 if kernels.instruction_set() is None else 32) * 2
    free = 13 * Backend.block_size * token_bytes / 0.8
    monkeypatch.setattr(memory, "_free_host_bytes", lambda: int(free) + 1)
    options = ("--data", data, "--max-new-tokens", 20, "--json")
    assert gsm8k("--out", tmp_path / "r.jsonl", *options) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["failed"], found["answers"]) == ([1], 3)
    assert "KV cache" in RunFile.read(tmp_path / "r.jsonl").records[1, 0]["error"]


def test_few_solved_examples_are_refused(tmp_path, capsys):
    train = tmp_path / "train.jsonl"
    train.write_text("\n".join(HELD_OUT.read_text().splitlines()[:4]))
    out = tmp_path / "r.jsonl"
    assert gsm8k("--out", out, "--prompt-style", "lm-eval", "--train", train, "--limit", 1) == 2
    assert "shows 5 solved examples, and there are only 4" in capsys.readouterr().err


def test_solved_examples_that_cannot_be_had_name_a_style_without(tmp_path, monkeypatch, capsys):
    def no_hub(split):
        raise MeshwenError("no network")

    monkeypatch.setattr("meshwen.evals.problems.hub_problems", no_hub)
    assert gsm8k("--out", tmp_path / "r.jsonl", "--prompt-style", "lm-eval", "--limit", 1) == 2
    err = capsys.readouterr().err
    assert "style lm-eval shows solved examples, --train or the hub's: no network;" in err
    assert "--prompt-style qwen-boxed needs none" in err


def test_few_shot_prompts_have_solved_examples(tmp_path, capsys):
    out = tmp_path / "r.jsonl"
    options = ("--prompt-style", "lm-eval", "--train", HELD_OUT, "--limit", 2)
    assert gsm8k("--out", out, *options, "--max-new-tokens", 4) == 0
    run = RunFile.read(out)
    assert run.settings["train_sha256"] == run.settings["data_sha256"]
    assert set(run.records[0, 0]["graded"]) == {"strict-match", "flexible-extract"}
    assert "lm-eval: 0 of 2 right" in capsys.readouterr().out


def edited(path, out, *changes):
    """A run file with other fields in its answers."""
    head, *lines = path.read_text().splitlines()
    answers = [json.dumps(json.loads(a) | b) for a, b in zip(lines, changes, strict=True)]
    out.write_text("\n".join([head, *answers]) + "\n")
    return out


FAILED = {"finish_reason": "error", "text": "", "extracted": None, "correct": False, "tokens": []}


def test_a_report_tells_flipped_answers_runs_apart_and_why_one_failed(run_files, tmp_path):
    first = run_files[0]
    why = FAILED | {"error": "problem 1 has <too> many tokens", "elapsed": 12.34}
    other = edited(first, tmp_path / "other.jsonl", {}, why, {"elapsed": 2.0})
    html = tmp_path / "r.html"
    assert main(["eval", "compare", str(first), str(other), "--html", str(html)]) == 0
    page = html.read_text()
    mesh = RunFile.read(first).settings["mesh"]
    assert f"<h2>{first} ({mesh}) and {other} ({mesh})</h2>" in page
    assert f'<div>{first} ({mesh}): <span class="good">right</span>' in page
    assert (
        f'<div>{other} ({mesh}): <span class="bad">wrong</span>'
        '<div class="text">problem 1 has &lt;too&gt; many tokens</div>'
    ) in page
    assert '<td class="said">1: 1</td>' in page
    assert "<th>seconds</th>" in page
    assert "<td>12.3</td>" in page


def test_failed_problems_are_listed_by_reason(run_files, tmp_path, capsys):
    errors = ["problem 0 has 9 tokens", "problem 1 has 9 tokens", "no memory"]
    failed = edited(run_files[0], tmp_path / "1.jsonl", *(FAILED | {"error": e} for e in errors))
    listed = "counted as wrong: 0, 1, 2\n  0, 1: the prompt has 9 tokens\n  2: no memory\n"
    assert gsm8k("--out", failed, "--limit", 3, "--resume") == 0
    assert f"could not be asked, {listed}" in capsys.readouterr().out
    meshes = ["eval", "meshes", "--meshes", "1", "--numerics", "fast", "--limit", "3", "--resume"]
    assert main([*meshes, "--out", str(tmp_path)]) == 0
    assert f"could not be asked on 1, {listed}" in capsys.readouterr().out
    assert main(["eval", "compare", str(run_files[0]), str(failed)]) == 0
    said = capsys.readouterr().out
    assert f"could not be asked in {failed}, {listed}" in said
    assert "problem 1 has 9 tokens" in " ".join(said.split())  # In the place of its text.


def test_control_characters_of_a_model_do_not_reach_the_terminal(run_files, tmp_path, capsys):
    changed = {"text": "a\x1b]0;b\x07\x9b2J\n\t[c]", "extracted": "\x1b[2J", "correct": False}
    other = edited(run_files[0], tmp_path / "other.jsonl", changed, {}, {})
    assert main(["eval", "compare", str(run_files[0]), str(other)]) == 0
    said = capsys.readouterr().out
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", said)
    assert r"a\x1b]0;b\x07\x9b2J" in said
    assert r"\x1b[2J" in said
    assert "[c]" in said
