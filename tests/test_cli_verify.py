# SPDX-License-Identifier: Apache-2.0
"""`meshwen verify` through its command line: exit statuses, files, and what it refuses."""

import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import numpy as np
import pytest

from checkpoint_writers import random_weights, write_folder
from meshwen.cli import main
from meshwen.cli.options import parse_meshes
from meshwen.common.extras import how_to_install
from meshwen.engine.sampling import sample
from meshwen.errors import MeshwenError
from meshwen.ops.formats import Bounds
from meshwen.ops.numerics.exact import Exact
from meshwen.verify import parity, promises
from meshwen.verify.certificate_file import with_hash
from meshwen.verify.faults import negated, with_changed_weight
from meshwen.verify.operations import Operation

pytestmark = pytest.mark.usefixtures("unoptimised")
SHORT = ("--meshes", "1,2", "--numerics", "fast", "--max-new-tokens", "3")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_folder(tmp_path_factory.mktemp("models") / "tiny", random_weights()))


@pytest.fixture(scope="module")
def sound(model, tmp_path_factory):
    """A run whose faults are found: its folder, with certificate.json, and what it printed."""
    folder = tmp_path_factory.mktemp("certificates")
    options = ["--html", folder / "report.html", "--json", folder / "certificate.json"]
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        assert main(["verify", "--model", model, *SHORT, "--self-test", *map(str, options)]) == 0
    return folder, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def certificate(sound):
    return sound[0] / "certificate.json"


def test_a_sound_model_passes_and_its_faults_are_found(sound):
    folder, out, err = sound
    assert "every promise was kept" in out
    assert "fast 2: within bounds" in err
    found = json.loads((folder / "certificate.json").read_text())
    assert [fault["caught"] for fault in found["self_test"]["fast 2"]] == [True] * 3
    assert (folder / "report.html").read_text().startswith("<!doctype html>")


def test_int8_keeps_its_promises_its_faults_are_found_and_a_certificate_has_it(
    model, capsys, monkeypatch, tmp_path
):
    file, prompts = tmp_path / "certificate.json", tmp_path / "p.jsonl"
    prompts.write_text('{"prompt_tokens": [1, 2, 3]}\n{"prompt_tokens": [4]}\n')
    run = ["verify", "--model", model, "--meshes", "1,2"]
    asked = ["--quantization", "int8", "--prompts", str(prompts), "--max-new-tokens", "2"]
    assert main([*run, *asked, "--numerics", "fast", "--json", str(file)]) == 0
    assert "float32, int8: 2 prompts" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert (found["dtype"], found["quantization"]) == ("float32", "int8")
    assert found["prompts"] == [[1, 2, 3], [4]]
    assert main([*run, *asked, "--numerics", "exact", "--self-test"]) == 0
    assert "every promise was kept" in capsys.readouterr().out

    def only_asked(*_, quantization, **__):
        raise MeshwenError(f"asked for {quantization}")

    monkeypatch.setattr(parity, "verify", only_asked)
    assert main([*run, "--against", str(file)]) == 2
    assert "asked for int8" in capsys.readouterr().err


def test_a_broken_promise_is_exit_status_1(model, capsys, monkeypatch):
    strict = Bounds(sampler_shortfall=0.0, max_relative=0.0)
    monkeypatch.setitem(promises.OF_DTYPE, "float32", strict)
    assert main(["verify", "--model", model, *SHORT]) == 1
    assert "at most 0e+00 is promised" in capsys.readouterr().out


EXACT = ("--meshes", "1,2", "--numerics", "exact", "--max-new-tokens", "3")


def test_a_wrong_weight_on_one_mesh_breaks_exact_numerics_and_is_placed(model, capsys, monkeypatch):
    sound, place = parity.load_params, Operation(0, "MLP output")

    def load(checkpoint, weights):
        params = sound(checkpoint, weights)
        if weights.plan.model_devices == 1:
            return params
        return with_changed_weight(params, weights, place, negated)

    monkeypatch.setattr(parity, "load_params", load)
    assert main(["verify", "--model", model, *EXACT]) == 1
    output = capsys.readouterr().out
    assert "exact 2: whole-sequence logits, against the first mesh's: not the same bits" in output
    assert "first divergence: layer 0, MLP output" in output


def test_a_floating_point_all_reduce_breaks_exact_numerics(model, capsys, monkeypatch):
    def by_all_reduce(numerics, x, collectives):
        return collectives.all_reduce(x)

    monkeypatch.setattr(Exact, "all_reduce", by_all_reduce)
    assert main(["verify", "--model", model, *EXACT]) == 1
    assert "exact 2: an exact step has a floating-point all-reduce" in capsys.readouterr().out


def test_a_sampler_that_takes_other_tokens_breaks_a_promise(model, capsys, monkeypatch):
    def wrong(*arguments):
        sampled = sample(*arguments)
        return sampled._replace(tokens=(sampled.tokens + 1) % 100)

    monkeypatch.setattr("meshwen.engine.steps.sample", wrong)
    assert main(["verify", "--model", model, *SHORT]) == 1
    assert "less likely than the likeliest" in capsys.readouterr().out


def test_an_exact_certificate_holds_for_another_mesh(model, capsys, tmp_path):
    file = tmp_path / "c.json"
    run = ["verify", "--model", model, "--numerics", "exact"]
    assert main([*run, "--meshes", "1", "--max-new-tokens", "3", "--json", str(file)]) == 0
    assert "only one mesh" in capsys.readouterr().err
    assert main([*run, "--meshes", "2", "--against", str(file)]) == 0
    assert "the outcome is the certificate's, to the bit" in capsys.readouterr().out


def test_a_fault_that_is_not_found_is_exit_status_1(model, capsys, monkeypatch):
    monkeypatch.setattr("meshwen.verify.faults.negated", np.ones_like)
    assert main(["verify", "--model", model, *SHORT, "--self-test"]) == 1
    assert "but nowhere: one element" in capsys.readouterr().out


def test_a_certificate_is_run_again_with_all_its_settings(model, certificate, capsys):
    assert main(["verify", "--model", model, "--against", str(certificate)]) == 0
    assert "the outcome is the certificate's, to the bit" in capsys.readouterr().out


def test_another_outcome_than_the_certificates_is_exit_status_1(
    model, certificate, capsys, tmp_path
):
    found = json.loads(certificate.read_text())
    (row,) = (one for one in found["rows"] if (one["numerics"], one["mesh"]) == ("fast", "2"))
    row["logits_sha256"] = {kind: digest[::-1] for kind, digest in row["logits_sha256"].items()}
    other = tmp_path / "c.json"
    other.write_text(json.dumps(with_hash(found)))
    assert main(["verify", "--model", model, "--against", str(other)]) == 1
    output = capsys.readouterr().out
    assert "differs from the certificate: logits (whole and cached) of fast 2" in output


def test_other_weights_than_the_certificates_are_reported_before_anything_is_computed(
    certificate, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(parity, "verify", None)
    other = write_folder(tmp_path / "other", random_weights(seed=1))
    assert main(["verify", "--model", str(other), "--against", str(certificate)]) == 1
    assert "differs from the certificate: weights; nothing was" in capsys.readouterr().out


def test_prompts_and_reference_outputs_come_from_files(model, capsys, tmp_path):
    golden, file = tmp_path / "golden.json", tmp_path / "c.json"
    cases = [{"input_ids": ids, "greedy": [0, 0, 0]} for ids in ([1, 2, 3], [4])]
    golden.write_text(json.dumps({"cases": cases}))
    run = ["verify", "--model", model, *SHORT, "--golden", str(golden)]
    assert main([*run, "--json", str(file)]) == 1
    assert "prompt 1, token 0: " in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["prompts"] == [[1, 2, 3], [4]]
    for case, tokens in zip(cases, found["tokens"], strict=True):
        case["greedy"] = tokens
    golden.write_text(json.dumps({"cases": cases}))
    assert main(run) == 0


@pytest.mark.torch
def test_transformers_generates_the_same_tokens(model, capsys):
    pytest.importorskip("transformers")
    run = ["verify", "--model", model, *SHORT, "--reference", "transformers"]
    assert main(run) == 0
    assert "transformers: 4 of 4 prompts equal" in capsys.readouterr().out


def test_a_missing_reference_says_what_to_install(model, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["verify", "--model", model, *SHORT, "--reference", "transformers"]) == 2
    assert how_to_install("transformers") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "meshes"),
    [
        ("1x1,1x8,2x4", ["1x1", "1x8", "2x4"]),
        ("1;data=2,model=4;8", ["1", "data=2,model=4", "8"]),
        ("1, data=2,model=4, 8", ["1", "data=2,model=4", "8"]),
        ("data=2,data=4,model=2,model=8", ["data=2,model=1", "data=4,model=2", "model=8"]),
    ],
)
def test_meshes_are_split_where_one_ends(text, meshes):
    expected = [mesh.removeprefix("model=") for mesh in meshes]
    assert [str(spec) for spec in parse_meshes(text)] == expected


@pytest.mark.parametrize(
    ("text", "output"),
    [("1,1x8,8,8", "twice"), (";", "must name a mesh"), ("x", "mesh must be such as 8")],
)
def test_meshes_that_make_no_sense_are_refused(text, output):
    with pytest.raises(MeshwenError, match=output):
        parse_meshes(text)


@pytest.mark.parametrize(
    ("options", "output"),
    [
        (["--meshes", "1,3", "--numerics", "exact"], "exact numerics splits a model over"),
        (["--max-new-tokens", "120"], "do not fit the model's context"),
        (["--json", "no/such/folder/c.json"], "cannot write"),
        (["--against", "pyproject.toml"], "pyproject.toml: not valid JSON"),
        (["--against", "none.json"], "cannot read none.json"),
        (["--golden", "none.json"], "cannot read none.json"),
        (["--golden", "pyproject.toml"], 'with as many "margins" as tokens'),
        (["--reference", "transformers", "--golden", "g.json"], "leave out --golden"),
        (["--reference", "transformers", "--load-format", "dummy"], "transformers cannot read"),
        (["--prompts", "none.txt"], "cannot read none.txt"),
    ],
)
def test_what_cannot_be_run_is_one_line_and_exit_status_2(model, options, output, capsys):
    assert main(["verify", "--model", model, *options]) == 2
    *notes, error = capsys.readouterr().err.splitlines()
    assert error.startswith("meshwen: error: ")
    assert output in error
    expected = ("dummy token ids", "transformers generates")
    assert all(line.endswith(expected) for line in notes)
