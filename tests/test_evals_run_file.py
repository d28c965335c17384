# SPDX-License-Identifier: Apache-2.0
"""A run file loses nothing, whatever stops the run, and goes on only where it may."""

import errno
import json
import os
import signal
from pathlib import Path

import pytest

from meshwen.errors import MeshwenError
from meshwen.evals import run_file
from meshwen.evals.compare import alone_text, compare
from meshwen.evals.run_file import FORMAT, RunFile

SETTINGS = {"model": "m", "mesh": "1", "prompt_style": "qwen", "seed": 0}


def answer(
    number: int, correct: bool = True, tokens: tuple[int, ...] = (1, 2), sample: int = 0
) -> dict:
    asked = {"id": number, "sample": sample, "question": "?", "prompt_sha256": f"p{number}"}
    found = {"tokens": list(tokens), "text": "7", "extracted": "7", "finish_reason": "stop"}
    return asked | found | {"gold": "7", "correct": correct, "elapsed": 1.5 * number}


def written(path, *answers) -> RunFile:
    run = RunFile.begin(path, SETTINGS, resume=False)
    for one in answers:
        run.write(one)
    run.close()
    return run


def test_answers_come_back_as_they_were_written(tmp_path):
    run = written(tmp_path / "r.jsonl", answer(0), answer(3, False))
    found = RunFile.read(run.path)
    assert (found.settings, found.records) == (
        SETTINGS,
        {(0, 0): answer(0), (3, 0): answer(3, False)},
    )


@pytest.mark.parametrize("lost", range(1, 40))
def test_a_torn_last_line_is_cut_off_and_the_run_goes_on(tmp_path, lost):
    path = written(tmp_path / "r.jsonl", answer(0), answer(1)).path
    whole = path.read_bytes()
    path.write_bytes(whole[:-lost])
    assert set(RunFile.read(path).records) == {(0, 0)}
    run = RunFile.begin(path, SETTINGS, resume=True)
    assert set(run.records) == {(0, 0)}
    run.write(answer(1))
    run.close()
    assert path.read_bytes() == whole


def test_a_run_that_was_killed_before_its_first_line_begins_anew(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"format": "mesh')
    with pytest.raises(MeshwenError, match="first line is cut off"):
        RunFile.read(path)
    RunFile.begin(path, SETTINGS, resume=True).close()
    assert RunFile.read(path).records == {}


def test_a_run_that_was_stopped_before_its_first_answer_is_in_nobodys_way(tmp_path):
    path = tmp_path / "r.jsonl"
    RunFile.begin(path, SETTINGS, resume=False).close()
    with path.open("ab") as file:
        file.write(b'{"id": 0, "sam')
    run = RunFile.begin(path, SETTINGS | {"seed": 1}, resume=False)
    run.close()
    assert RunFile.read(path).settings["seed"] == 1


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("content", [b'{"precious": 1}', b'{"precious": 1}\n', b"x", b"\n"])
def test_a_file_that_is_no_run_is_never_touched(tmp_path, content, resume):
    path = tmp_path / "r.jsonl"
    path.write_bytes(content)
    with pytest.raises(MeshwenError):
        RunFile.begin(path, SETTINGS, resume=resume)
    assert path.read_bytes() == content


def test_an_existing_file_is_kept_unless_it_is_to_go_on(tmp_path):
    path = written(tmp_path / "r.jsonl", answer(0)).path
    with pytest.raises(MeshwenError, match="add --resume"):
        RunFile.begin(path, SETTINGS, resume=False)
    with pytest.raises(MeshwenError, match="made with seed 0, this run has 1"):
        RunFile.begin(path, SETTINGS | {"seed": 1}, resume=True)
    with pytest.raises(MeshwenError, match="made with style None, this run has 'x'"):
        RunFile.begin(path, SETTINGS | {"style": "x"}, resume=True)
    assert set(RunFile.read(path).records) == {(0, 0)}


def test_two_runs_cannot_write_one_file(tmp_path):
    path = tmp_path / "r.jsonl"
    first = RunFile.begin(path, SETTINGS, resume=False)
    with pytest.raises(MeshwenError, match="another run is writing"):
        RunFile.begin(path, SETTINGS, resume=True)
    first.write(answer(0))
    first.close()
    second = RunFile.begin(path, SETTINGS, resume=True)
    assert set(second.records) == {(0, 0)}
    second.close()


def test_a_file_of_other_settings_is_left_free(tmp_path):
    path = written(tmp_path / "r.jsonl", answer(0)).path
    with pytest.raises(MeshwenError, match="made with seed"):
        RunFile.begin(path, SETTINGS | {"seed": 1}, resume=True)
    RunFile.begin(path, SETTINGS, resume=True).close()


def test_a_full_disk_stops_the_run_with_what_was_saved_intact(tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    run = RunFile.begin(path, SETTINGS, resume=False)
    run.write(answer(0))
    saved = path.read_bytes()

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MeshwenError, match="No space left on device; 1 answers are saved"):
        run.write(answer(1))
    assert path.read_bytes() == saved
    assert set(run.records) == {(0, 0)}


def test_a_line_that_the_disk_took_in_part_is_cut_off(tmp_path):
    resource = pytest.importorskip("resource")
    run = written(tmp_path / "r.jsonl", answer(0))
    saved = run.path.read_bytes()
    run = RunFile.begin(run.path, SETTINGS, resume=True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(saved) + 20, before[1]))
    try:
        with pytest.raises(MeshwenError, match="1 answers are saved"):
            run.write(answer(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    run.close()
    assert run.path.read_bytes() == saved


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(MeshwenError, match=r"cannot write .*none/r\.jsonl: No such file"):
        RunFile.begin(tmp_path / "none" / "r.jsonl", SETTINGS, resume=False)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: not valid JSON"),
        ("[]", r"line 2: found \[\]; expected an object: it was edited or damaged"),
        ("{}", "line 2: id is missing"),
        ("[" * 10_000, "line 2: nested deeper than 100 levels"),
        (json.dumps(answer(0) | {"tokens": None}), "line 2: tokens is null; expected a list"),
        (json.dumps(answer(0) | {"tokens": [1, -1]}), r"line 2: tokens\[1\] is -1"),
        (json.dumps(answer(0) | {"elapsed": float("nan")}), "line 2: elapsed is NaN"),
        (json.dumps(answer(0) | {"id": True}), "line 2: id is true; expected an integer"),
        (json.dumps(answer(0) | {"id": 2**31}), "line 2: id is 2147483648"),
        (json.dumps(answer(0) | {"finish_reason": "error"}), "line 2: error is missing"),
        (json.dumps(answer(1)), "line 3: answers problem 1 again"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, said):
    path = tmp_path / "r.jsonl"
    header = json.dumps({"format": FORMAT, "settings": SETTINGS})
    path.write_text(f"{header}\n{line}\n{json.dumps(answer(1))}\n")
    with pytest.raises(MeshwenError, match=said):
        RunFile.read(path)
    for settings, said in (
        ({"format": FORMAT, "settings": []}, r"line 1: settings is \[\]"),
        ({"format": FORMAT, "settings": SETTINGS | {"mesh": 8}}, "line 1: settings.mesh is 8"),
        ({"format": FORMAT, "settings": {"mesh": "8"}}, "line 1: settings.model is missing"),
    ):
        path.write_text(json.dumps(settings) + "\n")
        with pytest.raises(MeshwenError, match=said):
            RunFile.read(path)
    path.write_text('{"question": "?"}\n')
    with pytest.raises(MeshwenError, match="no run file of this version"):
        RunFile.read(path)


def test_runs_are_compared_answer_by_answer(tmp_path):
    first = written(
        tmp_path / "a.jsonl",
        *(answer(0), answer(1), answer(2, False, (5, 6, 7)), answer(3, tokens=(1, 2, 3))),
    )
    second = written(
        tmp_path / "b.jsonl",
        *(answer(3, tokens=(1, 2)), answer(2, True, (5, 6, 8)), answer(1, False, (9,)), answer(0)),
    )
    found = compare(first, second)
    assert (found.answers, found.correct) == (4, (3, 3))
    assert (found.only_first, found.only_second, found.p) == (((1, 0),), ((2, 0),), 1.0)
    assert (found.identical, found.parted) == (1, ((1, 0, 0), (2, 0, 2), (3, 0, 2)))
    assert found.same_score
    assert not found.all_identical
    assert compare(first, first).all_identical


def test_samples_of_a_problem_are_told_apart_and_have_no_p(tmp_path):
    answers = [answer(0), answer(0, False, (3,), sample=1), answer(1)]
    first = written(tmp_path / "a.jsonl", *answers)
    assert set(RunFile.read(first.path).records) == {(0, 0), (0, 1), (1, 0)}
    second = written(tmp_path / "b.jsonl", *answers[::2], answer(0, sample=1))
    found = compare(first, second)
    assert (found.answers, found.only_second, found.p) == (3, ((0, 1),), None)
    assert found.parted == ((0, 1, 0),)


def test_what_both_runs_have_is_compared(tmp_path):
    first = written(tmp_path / "a.jsonl", answer(0), answer(1), answer(2))
    second = written(tmp_path / "b.jsonl", answer(5), answer(1, False, (3,)), answer(2), answer(4))
    found = compare(first, second)
    assert (found.answers, found.correct, found.identical) == (2, (2, 1), 1)
    assert found.alone == (((0, 0),), ((4, 0), (5, 0)))
    assert alone_text(found, (first, second)).endswith(
        f"left out: 1 in {first.path} and 2 in {second.path}"
    )
    assert compare(first, first).alone == ((), ())


def test_runs_of_other_problems_are_not_compared(tmp_path):
    first = written(tmp_path / "a.jsonl", answer(0), answer(1))
    with pytest.raises(MeshwenError, match=r"no problem has an answer in both .* \(1\)"):
        compare(first, written(tmp_path / "b.jsonl", answer(2)))
    other = written(tmp_path / "c.jsonl", answer(0), answer(1) | {"prompt_sha256": "other"})
    with pytest.raises(MeshwenError, match="problem 1 has another prompt_sha256"):
        compare(first, other)
    empty = written(tmp_path / "d.jsonl")
    with pytest.raises(MeshwenError, match="no problem has an answer"):
        compare(empty, empty)


@pytest.mark.parametrize("device", ["/dev/full", "/dev/zero", "/dev/null"])
def test_a_device_is_no_run_file(device):
    with pytest.raises(MeshwenError, match=f"{device} is not a regular file"):
        RunFile.begin(Path(device), SETTINGS, resume=False)
    with pytest.raises(MeshwenError, match=f"{device} is not a regular file"):
        RunFile.read(Path(device))


def test_a_pipe_is_no_run_file_and_nobody_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MeshwenError, match="pipe is not a regular file"):
        RunFile.begin(tmp_path / "pipe", SETTINGS, resume=True)


def test_a_foreign_file_is_refused_without_reading_all_of_it(tmp_path):
    path = tmp_path / "model.gguf"
    with path.open("wb") as file:
        file.write(b"GGUF")
        file.truncate(1 << 40)  # Of which nothing is on the disk.
    with pytest.raises(MeshwenError, match="no run file of this version"):
        RunFile.read(path)
    with pytest.raises(MeshwenError, match="no run file of this version"):
        RunFile.begin(path, SETTINGS, resume=True)
    assert path.stat().st_size == 1 << 40


def test_a_run_from_before_there_were_kernels_goes_on_without_them(tmp_path):
    path = written(tmp_path / "r.jsonl", answer(0)).path
    RunFile.begin(path, SETTINGS | {"products": "xla"}, resume=True).close()
    with pytest.raises(MeshwenError, match=r"products 'xla', .* \(none for xla\)"):
        RunFile.begin(path, SETTINGS | {"products": "avx512_bf16"}, resume=True)


def test_a_run_does_not_go_on_with_other_rules_to_grade_by(tmp_path):
    path = written(tmp_path / "r.jsonl", answer(0)).path
    RunFile.begin(path, SETTINGS | {"grading": 1, "prompt_style_why": "x"}, resume=True).close()
    with pytest.raises(MeshwenError, match=r"grading 1, this run has 2: .* by earlier rules; give"):
        RunFile.begin(path, SETTINGS | {"grading": 2}, resume=True)


def test_an_exact_run_does_not_go_on_where_exact_numerics_have_other_bits(tmp_path):
    path = written(tmp_path / "r.jsonl", answer(0)).path  # As from before there were versions.
    RunFile.begin(path, SETTINGS | {"exact_version": 1}, resume=True).close()
    with pytest.raises(MeshwenError, match=r"exact_version 1, this run has 2: its answers have"):
        RunFile.begin(path, SETTINGS | {"exact_version": 2}, resume=True)


@pytest.mark.parametrize(("before", "now"), [("8", "1x8"), ("1", "1x1"), ("2x4", "2x1x4")])
def test_meshes_of_the_same_axes_are_the_same(tmp_path, before, now):
    path = tmp_path / "r.jsonl"
    RunFile.begin(path, SETTINGS | {"mesh": before}, resume=False).write(answer(0))
    RunFile.begin(path, SETTINGS | {"mesh": now}, resume=True).close()
    for other in ("2", "4x2", "data=2,model=4"):
        with pytest.raises(MeshwenError, match="was made with mesh"):
            RunFile.begin(path, SETTINGS | {"mesh": other}, resume=True)


@pytest.mark.parametrize("missing", ["of the system", "of the file's disk"])
def test_a_run_goes_on_where_files_cannot_be_locked_and_says_so(
    tmp_path, monkeypatch, caplog, missing
):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    if missing == "of the system":
        monkeypatch.setattr(run_file, "fcntl", None)
    else:
        monkeypatch.setattr(run_file.fcntl, "flock", refuse)
    run = RunFile.begin(tmp_path / "run.jsonl", SETTINGS, resume=False)
    run.close()
    assert "run.jsonl cannot be locked" in caplog.text
