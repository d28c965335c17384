# SPDX-License-Identifier: Apache-2.0
"""`meshwen export`, and what it writes, run where this package cannot be imported."""

import json
import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from safetensors.numpy import save_file

import reference
from checkpoint_writers import write_model
from meshwen.cli import main
from meshwen.errors import MeshwenError
from meshwen.handoff import exporting, load_weights, parallel_model, program, run_exported
from meshwen.handoff.run_exported import tensors
from tiny_model import ONE_LAYER

FLOAT32 = ("--dtype", "float32")

# Anything that imports the package fails.
_WITHOUT_PACKAGE = "import runpy, sys; sys.modules['meshwen'] = None; sys.argv = sys.argv[1:]; "
_RUN = _WITHOUT_PACKAGE + "runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    weights = reference.random_weights(ONE_LAYER)
    return write_model(tmp_path_factory.mktemp("model"), ONE_LAYER, weights)


def exported(checkpoint, folder, *arguments):
    program = dict(pairwise(arguments)).get("--program", "decode")
    options = ["--length", "12"] * (program != "logits") + ["--tokens", "5"] * (program != "decode")
    return main(["export", str(checkpoint), "--out", str(folder), *options, *arguments])


def run_plain(folder, *arguments):
    """Exit status, stdout and stderr of the folder's own script."""
    ended = subprocess.run(
        [sys.executable, "-c", _RUN, folder / "run.py", *arguments],
        capture_output=True,
        check=False,
        text=True,
        timeout=300,
        cwd=folder.parent,
        # XLA notes on some processors what features kept programs were compiled for.
        env={k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
        | {"TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    return ended.returncode, ended.stdout, ended.stderr


@pytest.fixture
def run_here(capsys):
    """The same of the script's own function, in this process, as nothing depends on its own."""

    def run(folder):
        try:
            status = run_exported.main([str(folder)])
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def decode(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "decode"
    arguments = ("--mesh", "2x4", "--batch", "2", *FLOAT32, "--weights")
    assert exported(checkpoint, folder, *arguments) == 0
    return folder


@pytest.fixture
def copied(decode, tmp_path):
    """The exported folder, to be altered; its files are replaced, never written to."""
    for file in decode.iterdir():
        (tmp_path / file.name).hardlink_to(file)

    def replace(name, content):
        (tmp_path / name).unlink()
        (tmp_path / name).write_bytes(content)

    return tmp_path, replace


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def test_a_decode_step_gives_the_same_bits_in_plain_jax(decode):
    status, out, error = run_plain(decode)
    assert (status, error) == (0, "")
    assert out.splitlines() == ["logits: the same bits", "cache: the same bits"]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("--numerics", "exact", "--dtype", "bfloat16"), ["logits", "cache"]),
        (("--quantization", "int8", "--program", "prefill", "--output", "tokens"), None),
        (("--profile", "portable", "--composites"), ["logits", "cache"]),
        (("--profile", "portable", "--program", "logits"), ["logits"]),
    ],
    ids=["exact bfloat16", "int8 tokens", "portable", "portable logits"],
)
def test_other_programs_do_too(arguments, names, checkpoint, tmp_path):
    folder = tmp_path / "new" / "program"
    assert exported(checkpoint, folder, "--mesh", "8", "--weights", *arguments) == 0
    status, out, error = run_plain(folder)
    assert (status, error) == (0, "")
    assert out == "".join(f"{name}: the same bits\n" for name in names or ["tokens", "cache"])


def test_the_golden_outputs_are_what_the_model_gives(decode):
    """The tokens before the step are those of the golden inputs' generator."""
    ids = np.random.default_rng(0).integers(0, ONE_LAYER.vocab_size, (2, 9))
    golden = tensors(decode / "golden_outputs.safetensors")["logits"]
    inputs = tensors(decode / "golden_inputs.safetensors")
    assert inputs["positions"].tolist() == [8, 7]  # A stack that takes one for all is found out.
    np.testing.assert_array_equal(inputs["input_ids"], ids[:, 8:])
    weights = reference.random_weights(ONE_LAYER)
    wanted = reference.logits(weights, ONE_LAYER, ids[0].tolist())[8]
    found = golden[0, : ONE_LAYER.vocab_size]
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_the_manifest_says_what_a_caller_has_to_know(decode):
    found = manifest_of(decode)
    assert found["mesh"] == [["model0", 2], ["model1", 4]]
    assert found["versions"].keys() == {"meshwen", "jax", "jaxlib"}
    assert (found["program"], found["profile"], found["donated"]) == ("decode", "native", [1])
    assert "xla_disable_hlo_passes" in found["compiler_options"]
    by_name = {one["name"]: one for one in found["arguments"]}
    assert by_name["params.model.embed_tokens.weight"]["spec"] == [["model0", "model1"], None]
    assert by_name["cache.0.keys"]["dtype"] == "float32"
    assert by_name["input_ids"] == {
        "name": "input_ids",
        "shape": [2, 1],
        "dtype": "int32",
        "spec": [None],
    }
    assert found["files"].keys() == {file.name for file in decode.iterdir()} - {"manifest.json"}
    assert "stablehlo" in (decode / "program.stablehlo.mlir").read_text()


@pytest.mark.parametrize(("value", "said"), [(99, "of its largest value, "), (np.nan, "to nan ")])
def test_other_outputs_than_the_golden_ones_are_told(value, said, copied, run_here):
    folder, replace = copied
    golden = {n: a.copy() for n, a in tensors(folder / "golden_outputs.safetensors").items()}
    golden["logits"][1, 7] = value
    save_file(golden, folder / "changed")
    replace("golden_outputs.safetensors", (folder / "changed").read_bytes())
    found = manifest_of(folder)
    found["files"]["golden_outputs.safetensors"] = exporting.described_file(folder / "changed")
    replace("manifest.json", json.dumps(found).encode())
    status, out, _ = run_here(folder)
    assert status == 1
    first, second = out.splitlines()
    assert first.startswith("logits: differs by up to")
    assert said in first
    assert first.endswith("beyond 0.0001")
    assert second == "cache: the same bits"


def manifest_with(**changes):
    """Makes of a folder's own manifest another."""

    def changed(folder):
        found = manifest_of(folder)
        changes.get("files", {}).update(found["files"])
        return json.dumps(found | changes).encode()

    return changed


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("weights.safetensors", b"", "is not the file that was exported: its SHA-256 is e3b0"),
        ("program.jax_export", b"no program", "is not the file that was exported"),
        ("manifest.json", b"{", "manifest.json: not an exported program"),
        ("manifest.json", b'{"format": 2, "files": {}}', "this script reads format 1"),
        ("manifest.json", b'{"format": 1, "files": []}', "and nothing to run: export it with"),
        ("manifest.json", b'{"format": 1, "files": 3}', "not an exported program"),
        ("manifest.json", manifest_with(files={"../x": {}}), "../x is missing"),
        ("manifest.json", manifest_with(mesh=None), "cannot be run: TypeError"),
        ("manifest.json", manifest_with(versions={}), "cannot be run: KeyError: 'jax'"),
        ("manifest.json", manifest_with(arguments=[]), "cannot be run: "),
        ("manifest.json", manifest_with(compiler_options={"xla_no": 1}), "cannot be run: "),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_line_and_status_2(
    copied, name, content, message, run_here
):
    folder, replace = copied
    replace(name, content(folder) if callable(content) else content)
    status, out, error = run_here(folder)
    assert (status, out) == (2, "")
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_a_program_of_another_version_is_named(copied, run_here):
    folder, replace = copied
    replace("program.jax_export", b"of the future")
    found = manifest_of(folder)
    found["versions"]["jax"] = "9.9"
    file = exporting.described_file(folder / "program.jax_export")
    found["files"]["program.jax_export"] = file
    replace("manifest.json", json.dumps(found).encode())
    status, _, error = run_here(folder)
    assert status == 2
    note, message = error.splitlines()
    assert note.startswith("note: exported with jax 9.9, and this is ")
    assert "cannot read what jax 9.9 wrote (" in message


def test_a_folder_that_exists_is_refused_before_anything_is_loaded(tmp_path, capsys):
    assert exported("nowhere", tmp_path) == 2
    assert f"{tmp_path} exists: name a folder that does not" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--program", "train"), "--program must be logits, prefill or decode, not 'train'"),
        (("--mesh", "64x64x64"), "axis sizes must be"),
        (("--mesh", "3", "--numerics", "exact"), "exact numerics splits a model over 1, 2, 4"),
        (("--profile", "portable", "--numerics", "exact"), "has fast numerics alone"),
        (("--no-golden", "--weights"), "leave out --no-golden"),
        (("--platform", "tpu"), "add --no-golden"),
        (("--platform", "foo", "--no-golden"), "--platform must be cpu, tpu, cuda or rocm"),
        (("--no-golden", "--numerics", "exact"), "exact numerics are for the devices of a mesh"),
        (("--batch", "0"), "--batch must be at least 1, not 0"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(
    arguments, message, checkpoint, tmp_path, capsys
):
    assert exported(checkpoint, tmp_path / "new", *arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not list(tmp_path.iterdir())


def test_a_program_that_is_not_run_needs_neither_weights_nor_devices(tmp_path, capsys, run_here):
    arguments = ("--no-golden", "--mesh", "8x8", "--platform", "tpu", "--program", "logits")
    assert exported("qwen2.5-0.5b", tmp_path / "new", *arguments) == 0
    assert "kernels" not in capsys.readouterr().err
    found = manifest_of(tmp_path / "new")
    assert found["platforms"] == ["tpu"]
    assert found["compiler_options"] == {}
    names = {"program.jax_export", "program.stablehlo.mlir", "run.py"}
    assert found["files"].keys() == names
    status, _, error = run_here(tmp_path / "new")
    assert (status, error.count("\n")) == (2, 1)
    assert "nothing to run: export it with --weights" in error


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_export_that_fails_half_way_leaves_nothing(checkpoint, tmp_path, monkeypatch, error):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(exporting, "described_file", fail)
    step = program("logits", parallel_model(str(checkpoint)))
    with pytest.raises(MeshwenError if isinstance(error, OSError) else KeyboardInterrupt):
        step.export(tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_weights_of_another_mesh_are_refused(checkpoint, tmp_path):
    weights = load_weights(parallel_model(str(checkpoint), "8"), str(checkpoint))
    step = program("logits", parallel_model(str(checkpoint), "1"))
    with pytest.raises(MeshwenError, match="as for this model on this mesh"):
        step.export(tmp_path / "new", weights)
    assert not list(tmp_path.iterdir())
