# SPDX-License-Identifier: Apache-2.0
"""`meshwen verify --activations`: exit statuses, reports, and what PyTorch's run gives."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import reference
from checkpoint_writers import write_model
from foreign_run import PROMPTS, foreign_run, save
from meshwen.cli import main
from meshwen.models.qwen2 import Qwen2Config
from meshwen.models.qwen3 import Qwen3Config
from tiny_model import TINY, weights

pytestmark = pytest.mark.usefixtures("unoptimised")
DOCS = Path(__file__).parents[1] / "docs" / "verify.md"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("models") / "tiny", TINY, weights()))


def verify(model, file, *options):
    return main(["verify", "--model", model, "--activations", str(file), *options])


def wrong_run():
    given = weights()
    name = "model.layers.1.mlp.down_proj.weight"
    return foreign_run(TINY, given | {name: -given[name]})


def test_a_right_run_is_exit_status_0(model, tmp_path, capsys):
    file = save(tmp_path, foreign_run(TINY, weights()))
    assert verify(model, file, "--meshes", "2", "--numerics", "exact") == 0
    output = capsys.readouterr().out
    assert "every activation is within the tolerance" in output
    assert "2 x 11 tokens, against tiny in float32 on 2" in " ".join(output.split())
    assert {"embedding", "layer", "logits", "1.000000"} <= set(output.split())


def test_an_error_is_exit_status_1_and_named_in_every_report(model, tmp_path, capsys):
    page, report = tmp_path / "r.html", tmp_path / "r.json"
    file = save(tmp_path, wrong_run())
    assert verify(model, file, "--html", str(page), "--json", str(report)) == 1
    output = capsys.readouterr().out
    assert "first outside of the tolerance: layer 1, MLP output (relative" in output
    assert "made by: layer 1, MLP output" in output
    (row,) = (line for line in output.splitlines() if "made here: MLP output" in line)
    assert row.startswith("layer 1 ")
    found = json.loads(report.read_text())
    assert (found["ok"], found["made"]) == (False, ["1:MLP output"])
    (one,) = (one for one in found["activations"] if one["made"])
    assert one["module"] == "model.layers.1.mlp"
    assert one["from_tokens"]["pcc"] == pytest.approx(-1)
    assert one["from_inputs"]["relative"] == pytest.approx(2)
    text = page.read_text()
    assert "made by: layer 1, MLP output" in text
    assert text.count("made here") == 1
    assert text.count("<polyline") == 2


def test_an_error_that_may_be_of_what_the_file_lacks_was_made_here_or_before(
    model, tmp_path, capsys
):
    page = tmp_path / "r.html"
    arrays = wrong_run()
    file = save(tmp_path, {name: arrays[name] for name in ("input_ids", "lm_head")})
    assert verify(model, file, "--html", str(page)) == 1
    output = capsys.readouterr().out
    assert "made here or before: logits" in output
    assert "made by logits, or by what the file lacks" in output
    assert page.read_text().count(">made here or before<") == 1


def test_the_tolerance_decides(model, tmp_path, capsys):
    file = save(tmp_path, wrong_run())
    assert verify(model, file, "--tolerance", "100", "--pcc", "-1") == 0
    file = save(tmp_path, foreign_run(TINY, weights()))
    assert verify(model, file, "--tolerance", "1e-12") == 1
    assert "of 1e-12 allowed" in " ".join(capsys.readouterr().out.split())


def test_what_a_file_says_is_no_part_of_the_page(tmp_path, capsys):
    model = str(write_model(tmp_path / "<b>tiny", TINY, weights()))
    file = save(tmp_path, foreign_run(TINY, weights()), "<script>.npz")
    page = tmp_path / "r.html"
    assert verify(model, file, "--html", str(page)) == 0
    assert "<script>" not in page.read_text()
    assert "<b>tiny" not in page.read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prompts", "p.txt", "--self-test"], "leave out --prompts, --self-test"),
        (["--against", "c.json"], "leave out --against"),
        (["--max-new-tokens", "3"], "leave out --max-new-tokens"),
        (["--meshes", "1,2"], "--activations runs on one mesh: give --meshes one"),
        (["--numerics", "both"], "--numerics must be fast or exact"),
        (["--tolerance", "-1"], "--tolerance must be at least 0, not -1"),
        (["--tolerance", "x"], "--tolerance must be a number, not 'x'"),
        (["--pcc", "1.5"], "--pcc must be from -1 to 1, not 1.5"),
        (["--json", "no/such/folder/r.json"], "cannot write"),
        (["--meshes", "0"], "mesh"),
        ([], "cannot read"),
    ],
)
def test_what_cannot_be_run_is_one_line_and_exit_status_2(model, options, said, capsys):
    assert verify(model, "none.npz", *options) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("meshwen: error: ")
    assert said in error


def test_a_report_takes_no_other_files_place(model, tmp_path, capsys):
    file = save(tmp_path, wrong_run())
    dump, report = file.read_bytes(), str(tmp_path / "report")
    for options in (("--json", str(file)), ("--json", report, "--html", report)):
        assert verify(model, file, *options) == 2
        assert "would replace a file that this command reads or writes" in capsys.readouterr().err
    assert file.read_bytes() == dump
    assert not (tmp_path / "report").exists()


def test_a_tolerance_of_nan_is_refused(model, tmp_path, capsys):
    assert verify(model, save(tmp_path, wrong_run()), "--tolerance", "nan") == 2
    assert "--tolerance must be a number, not NaN" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--tolerance", "--pcc"])
def test_a_tolerance_alone_is_refused(model, option, capsys):
    assert main(["verify", "--model", model, option, "1"]) == 2
    assert "are for --activations" in capsys.readouterr().err


# --- PyTorch's run, written by the script in the docs


SIZES = {
    **{name: getattr(TINY, name) for name in ("vocab_size", "hidden_size", "intermediate_size")},
    **{"num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8},
    **{"max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
}


def script():
    """The script of the docs that writes activations."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)
    (found,) = (block for block in blocks if "register_forward_hook" in block)
    return found


def run_script(folder, file, dtype="float32", wrong=lambda model: None):
    """Runs it, on other files and with something wrong in the model."""
    changed = {
        'FOLDER = "path/to/model"': f"FOLDER = {str(folder)!r}",
        '"dump.npz"': repr(str(file)),
        "torch.float32": f"torch.{dtype}",
    }
    text = script()
    for old, new in changed.items():
        assert old in text
        text = text.replace(old, new)
    text, count = re.subn(r"\[\[[\d, ]+\]\]", repr(PROMPTS[:1].tolist()), text)
    assert count == 1
    text, count = re.subn(r"^(model = .*)$", r"\1; wrong(model)", text, flags=re.MULTILINE)
    assert count == 1
    exec(text, {"wrong": wrong})


@pytest.fixture
def torch():
    pytest.importorskip("transformers")
    return pytest.importorskip("torch")


def rotated_too_far(model):
    """Queries are rotated as if they stood one position further."""
    attention = sys.modules[type(model).__module__]
    before = attention.apply_rotary_pos_emb
    rotary = model.model.rotary_emb

    def wrong(q, k, cos, sin, *rest):
        import torch

        further = rotary(q, torch.arange(1, q.shape[2] + 1)[None])
        return before(q, q, *further, *rest)[0], before(k, k, cos, sin, *rest)[0]

    attention.apply_rotary_pos_emb = wrong
    model.undo = lambda: setattr(attention, "apply_rotary_pos_emb", before)


def changed(path, change):
    """One of the model's weights is another."""

    def wrong(model):
        import torch

        with torch.no_grad():
            weight = model.get_parameter(path)
            weight.copy_(change(weight))

    return wrong


def without_half(weight):
    weight = weight.clone()
    weight[:, : weight.shape[1] // 2] = 0
    return weight


def of_another_eps(model):
    for name, module in model.named_modules():
        if name.endswith("layernorm"):
            module.variance_epsilon = 0.1


FAULTS = {
    "nothing": (lambda model: None, []),
    "rope": (rotated_too_far, [f"{i}:attention output" for i in range(3)]),
    "transposed": (
        changed("model.layers.1.mlp.up_proj.weight", lambda w: w.T.reshape(w.shape)),
        ["1:MLP output"],
    ),
    "partial sum": (
        changed("model.layers.2.self_attn.o_proj.weight", without_half),
        ["2:attention output"],
    ),
    "eps": (
        of_another_eps,
        [f"{i}:{n}_layernorm" for i in range(3) for n in ("input", "post_attention")],
    ),
}


@pytest.mark.torch
@pytest.mark.parametrize("kind", [Qwen2Config, Qwen3Config])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_in_pytorch_is_named(kind, fault, torch, tmp_path):
    folder, report, config = tmp_path / "model", tmp_path / "r.json", kind(**SIZES)
    write_model(folder, config, reference.random_weights(config))
    wrong, made = FAULTS[fault]
    undo = []
    run_script(
        folder,
        tmp_path / "dump.npz",
        wrong=lambda model: (wrong(model), undo.append(getattr(model, "undo", lambda: None))),
    )
    undo[0]()
    status = verify(str(folder), tmp_path / "dump.npz", "--json", str(report))
    assert json.loads(report.read_text())["made"] == made
    assert status == bool(made)


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pytorchs_run_of_the_demo_model_agrees(dtype, torch, tmp_path, capsys):
    from meshwen import demo

    run_script(demo.path(), tmp_path / "dump.npz", dtype)
    assert verify("demo", tmp_path / "dump.npz", "--meshes", "1x2") == 0
    with np.load(tmp_path / "dump.npz") as written:
        assert written["lm_head"].dtype == ("float32" if dtype == "float32" else "uint16")
