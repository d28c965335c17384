# SPDX-License-Identifier: Apache-2.0
"""`meshwen inspect` through its command line: what it lists is what the file and the mesh say."""

import json
import os
import re
import subprocess
import sys

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoint_writers import (
    CONFIG,
    SHAPES,
    float_gguf_tensors,
    random_weights,
    write_folder,
    write_gguf,
    write_json,
)
from meshwen.cli import main


def report(capsys, *arguments):
    assert main(["inspect", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_seven_b_on_eight_devices_pads_each_group_by_one_head(capsys):
    found = report(capsys, "qwen2.5-7b", "--mesh", "1x8")
    assert found["parameters"] == 7_615_616_512
    assert found["config"]["num_attention_heads"] == 28
    heads = found["head_layout"]
    assert heads["device_key_value_heads"] == [[0], [0], [1], [1], [2], [2], [3], [3]]
    assert heads["device_query_heads"][0:4] == [
        [[0, 1, 2, 3]],
        [[4, 5, 6, None]],
        [[7, 8, 9, 10]],
        [[11, 12, 13, None]],
    ]
    assert heads["padding_query_heads"] == 4
    assert heads["query_cost_percent"] == pytest.approx(100 * 4 / 28, abs=0.01)
    assert heads["key_value_cost_percent"] == 100


def test_exact_numerics_shows_its_leaves_and_its_tree(capsys):
    sums = report(capsys, "qwen2.5-7b", "--mesh", "2x4", "--numerics", "exact")["sums"]
    assert sums["MLP output"]["leaves_per_device"] == 4
    assert sums["MLP output"]["leaf"] == "1/32 of the inner dimension: 592 inputs"
    assert sums["attention output"]["device_tree"] == "((0+1)+(2+3))"
    assert sums["across_devices"] == "(((d0+d1)+(d2+d3))+((d4+d5)+(d6+d7)))"
    one = report(capsys, "qwen2.5-7b", "--numerics", "exact")["sums"]
    assert one["attention output"]["leaves_per_device"] == 28
    # The padding eighth head of a group adds nothing, so the tree is cut short there.
    group = "(((0+1)+(2+3))+((4+5)+6))"
    assert one["attention output"]["device_tree"].startswith(f"(({group}+")
    assert report(capsys, "qwen2.5-7b", "--mesh", "2x4")["sums"] is None


def test_bytes_of_a_device_are_those_of_its_shards(capsys):
    found = report(capsys, "qwen2.5-7b", "--mesh", "2x4")
    shards = sum(np.prod(tensor["shard_shape"], dtype=int) * 2 for tensor in found["tensors"])
    assert found["weights"]["per_device"] == shards
    assert found["weights"]["all_devices"] == 8 * shards
    assert found["weights"]["model"] == 2 * 7_615_616_512
    # 28 layers, one kv head of 128 dimensions a device, keys and values of 2 bytes.
    assert found["kv_cache"]["per_device_per_token"] == 28 * 128 * (2 + 2)
    by_name = {tensor["name"]: tensor for tensor in found["tensors"]}
    gate = by_name["model.layers.3.mlp.gate_proj.weight"]
    assert gate["axes"] == ["mlp", "embed"]
    assert gate["mesh_axes"] == [["model0", "model1"], []]
    assert gate["shape"] == [18944, 3584]
    assert gate["device_axes"] == ["embed", "mlp"]
    assert gate["shard_shape"] == [3584, 18944 // 8]


def test_a_data_axis_multiplies_the_bytes_of_all_devices_only(capsys):
    one = report(capsys, "qwen2.5-0.5b", "--mesh", "4")
    two = report(capsys, "qwen2.5-0.5b", "--mesh", "data=2,model=4")
    assert two["weights"]["per_device"] == one["weights"]["per_device"]
    assert two["weights"]["all_devices"] == 2 * one["weights"]["all_devices"]


def test_every_tensor_of_a_file_is_listed_with_its_dtype(tmp_path, capsys):
    folder = write_folder(tmp_path / "tiny", random_weights())
    found = report(capsys, folder, "--mesh", "3")
    assert {t["name"]: tuple(t["file_shape"]) for t in found["tensors"]} == SHAPES
    assert {t["file_dtype"] for t in found["tensors"]} == {"bfloat16"}
    assert found["format"] == "safetensors"


def test_a_quantised_tensor_shows_its_block_format(tmp_path, capsys):
    gguf = pytest.importorskip("gguf")
    tensors = float_gguf_tensors()
    weight, _ = tensors["blk.0.ffn_up.weight"]
    packed = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
    tensors["blk.0.ffn_up.weight"] = (packed, gguf.GGMLQuantizationType.Q8_0)
    found = report(capsys, write_gguf(tmp_path / "tiny.gguf", tensors), "--filter", "*up_proj*")
    (tensor,) = found["tensors"]
    assert tensor["quantization"] == "Q8_0"


def test_stats_are_those_of_the_finite_values(tmp_path, capsys):
    weights = random_weights(dtype=np.float32)
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name][3, 4:6] = np.nan, -np.inf
    folder = write_folder(tmp_path / "tiny", weights)
    found = report(capsys, folder, "--stats", "--filter", "*.up_proj.*")
    (tensor,) = found["tensors"]
    finite = weights[name][np.isfinite(weights[name])].astype(np.float64)
    stats = tensor["stats"]
    assert (stats["nan"], stats["inf"]) == (1, 1)
    assert stats["mean"] == pytest.approx(finite.mean(), rel=1e-6)
    assert (stats["min"], stats["max"]) == (finite.min(), finite.max())


def test_stats_of_a_scalar_and_of_integers(tmp_path, capsys):
    extra = {"scalar": np.array(-2.5, np.float32), "integers": np.arange(5)}
    folder = write_folder(tmp_path / "tiny", random_weights() | extra)
    assert main(["inspect", str(folder), "--stats", "--json"]) == 2  # No Qwen2 has such tensors.
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["tensors"]}
    found = {name: [rows[name]["stats"][key] for key in ("min", "max", "mean")] for name in extra}
    assert found == {"scalar": [-2.5] * 3, "integers": [0, 4, 2]}
    assert (rows["scalar"]["file_shape"], rows["integers"]["file_dtype"]) == ([], "int64")


def test_a_hub_id_is_inspected_without_its_weights_unless_asked_for(tmp_path, capsys, monkeypatch):
    asked = []

    def snapshot_download(repo_id, *, allow_patterns, **options):
        asked.append("*.safetensors" in allow_patterns)
        return str(write_folder(tmp_path, random_weights()))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert main(["inspect", "org/name"]) == 0
    output = capsys.readouterr()
    assert output.out.startswith("org/name (config only, no weights)")
    assert "--stats, or --load-format safetensors, downloads the weights" in output.err
    for arguments in (("--stats",), ("--load-format", "safetensors")):
        assert report(capsys, "org/name", *arguments)["format"] == "safetensors"
    assert asked == [False, True, True]


def test_the_bytes_table_names_the_dtype_of_each_part(capsys):
    for dtype, title in (
        ("bfloat16", "Bytes in bfloat16"),
        ("float32", "Bytes in float32"),
        ("float32 --quantization int8", "Bytes in float32, of matrices in int8"),
    ):
        assert main(["inspect", "qwen2.5-7b", "--dtype", *dtype.split()]) == 0
        assert title in [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_tables_show_the_layout_and_fold_layers_that_are_alike(capsys):
    assert main(["inspect", "qwen2.5-7b", "--mesh", "1x8"]) == 0
    output = capsys.readouterr().out
    lines = [line.rstrip() for line in output.splitlines()]
    assert max(map(len, lines)) <= 100
    assert lines[0] == "qwen2.5-7b (config only, no weights): 7,615,616,512 parameters (7.62 B)"
    assert lines.count("model.layers.{0-27}.") == 1
    row = next(line for line in lines if "q_proj.weight" in line)
    assert row.split() == [
        *("self_attn.q_proj.weight", "3584x3584", "-"),
        *("query:model1", "embed", "512x3584"),
    ]
    devices = [line.split() for line in lines if re.fullmatch(r" +\d +\d +[\d. ]+", line)]
    assert devices[1] == ["1", "0", "4", "5", "6", "."]
    assert len(devices) == 8


def test_a_tensor_that_does_not_fit_is_shown_and_is_an_error(tmp_path, capsys):
    weights = random_weights()
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1]
    folder = write_folder(tmp_path / "tiny", weights)
    assert main(["inspect", str(folder)]) == 2
    output = capsys.readouterr()
    assert re.search(r"^model\.norm\.weight +64 +bfloat16 63 ", output.out, re.MULTILINE)
    assert output.err.startswith("meshwen: error: ")
    assert "model.norm.weight" in output.err


def test_unused_and_missing_tensors_are_marked(tmp_path, capsys):
    weights = random_weights()
    del weights["lm_head.weight"]
    folder = write_folder(tmp_path / "tiny", weights)
    assert main(["inspect", str(folder)]) == 2
    assert re.search(r"^lm_head\.weight +50x64 +missing ", capsys.readouterr().out, re.MULTILINE)
    weights = random_weights()
    write_json(folder / "config.json", CONFIG | {"tie_word_embeddings": True})
    save_file(weights, folder / "model.safetensors")
    assert main(["inspect", str(folder)]) == 0
    assert re.search(r"^lm_head\.weight +50x64 .*not used", capsys.readouterr().out, re.MULTILINE)


def test_only_a_config_is_needed_for_a_dummy(tmp_path, capsys):
    found = report(capsys, write_folder(tmp_path / "tiny"), "--load-format", "dummy")
    assert found["parameters"] == sum(np.prod(shape, dtype=int) for shape in SHAPES.values())


def test_no_back_end_starts_so_any_mesh_can_be_inspected():
    environment = os.environ | {"JAX_PLATFORMS": "no-such-platform"}
    command = [sys.executable, "-m", "meshwen", "inspect", "qwen2.5-72b", "--mesh", "1x256"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "and 192 more devices" in done.stdout
