# SPDX-License-Identifier: Apache-2.0
"""Files that `verify` reads: certificates and reference outputs, damaged, edited, contradictory."""

import json
from copy import deepcopy

import pytest

from meshwen.errors import MeshwenError
from meshwen.verify.certificate_file import FORMAT, as_json, read_certificate, with_hash
from meshwen.verify.reference import read_golden

ROW = {
    "mesh": "1",
    "numerics": "fast",
    "logits_sha256": {"whole": ["a", "b"], "cached": ["c", "d"]},
    "hlo_sha256": "e",
    "whole": {"max_abs": float("nan")},
}
CONTENT = {
    "format": FORMAT,
    "ok": True,
    "broken": [],
    "model": "tiny",
    "weights_sha256": "f",
    "dtype": "float32",
    "numerics": ["fast"],
    "meshes": ["1"],
    "prompts": [[1, 2], [3]],
    "tokens": [[4, 5], [6, 7]],
    "generated": {"fast": [[4, 5], [6, 7]]},
    "layers": 2,
    "rows": [ROW],
    "environment": {"jax": "1"},
}


def written(path, content):
    path.write_text(as_json(content))
    return path


def refusal(read, path):
    with pytest.raises(MeshwenError) as raised:
        read(path)
    assert "\n" not in str(raised.value)
    return str(raised.value).removeprefix(f"{path}: ")


def test_a_certificate_is_read_as_it_was_written(tmp_path):
    found = read_certificate(written(tmp_path / "c.json", with_hash(CONTENT)))
    assert found["rows"][0].pop("whole") == {"max_abs": None}
    assert found["generated"] == CONTENT["generated"]


def test_a_certificate_written_with_other_spaces_and_order_is_the_same(tmp_path):
    path = written(tmp_path / "c.json", with_hash(CONTENT))
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    assert read_certificate(path)["ok"]


EDITS = [
    (("generated",), {}),
    (("generated", "fast", 0, 0), 9),
    (("model",), "other"),
    (("layers",), 3),
    (("rows", 0, "whole", "max_abs"), 0.0),
    (("rows", 0, "hlo_sha256"), "f"),
    (("environment", "jax"), "2"),
    (("added",), None),
]


@pytest.mark.parametrize(("keys", "value"), EDITS, ids=[".".join(map(str, k)) for k, _ in EDITS])
def test_an_edit_anywhere_is_reported(tmp_path, keys, value):
    content = deepcopy(json.loads(as_json(with_hash(CONTENT))))
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    assert "which was edited" in refusal(read_certificate, written(tmp_path / "c.json", content))


CONTRADICTIONS = [
    ({"generated": {}}, "generated does not have the tokens of each of numerics"),
    ({"generated": {"fast": [[4, 5]]}}, "generated.fast does not have 2 tokens for each of 2"),
    ({"generated": {"fast": [[4, 5], [6]]}}, "generated.fast does not have 2 tokens"),
    ({"tokens": [[4, 5], [6]]}, "tokens does not have 2 tokens for each of 2 prompts"),
    ({"rows": []}, "rows does not have each of numerics on each of meshes"),
    ({"meshes": ["1", "2"]}, "rows does not have each"),
    ({"rows": [ROW | {"logits_sha256": {"whole": [], "cached": []}}]}, "rows[0].logits_sha256.wh"),
    ({"broken": ["x"]}, "ok does not say what broken says"),
    ({"ok": 1}, "ok is 1; expected true or false"),
    ({"dtype": "float16"}, """dtype is "float16"; expected 'float32' or 'bfloat16'"""),
    ({"numerics": []}, "numerics is []"),
    ({"prompts": [[-1], [3]]}, "prompts[0][0] is -1; expected greater than or equal to 0"),
    ({"prompts": [[2**31], [3]]}, "prompts[0][0] is 2147483648; expected less than 2147483648"),
    ({"prompts": "ab"}, 'prompts is "ab"; expected a list'),
    ({"rows": [{}]}, "rows[0].mesh is missing"),
    ({"format": "meshwen-certificate-1"}, """format is "meshwen-certificate-1"; expected '"""),
]


@pytest.mark.parametrize(("edit", "message"), CONTRADICTIONS, ids=[m for _, m in CONTRADICTIONS])
def test_a_certificate_that_contradicts_itself_is_refused(tmp_path, edit, message):
    path = written(tmp_path / "c.json", with_hash(CONTENT | edit))
    assert refusal(read_certificate, path).startswith(message)


GOLDEN = [
    ("[]", "found []; expected an object"),
    ("{}", "cases is missing"),
    ('{"cases": []}', "cases is []"),
    ('{"cases": [{"input_ids": [1]}]}', "cases[0].greedy is missing"),
    ('{"cases": [{"input_ids": [], "greedy": [1]}]}', "cases[0].input_ids is []"),
    ('{"cases": [{"input_ids": ["1"], "greedy": [1]}]}', "cases[0].input_ids[0] is"),
    ('{"cases": [{"input_ids": [1.5], "greedy": [1]}]}', "cases[0].input_ids[0] is 1.5"),
    ('{"cases": [{"input_ids": [1], "greedy": [1], "margins": []}]}', "cases[0].margins has 0"),
    ('{"cases": [{"input_ids": [1], "greedy": [1], "margins": [NaN]}]}', "cases[0].margins[0] is"),
    ('{"cases": [{"input_ids": [1], "greedy": [1], "margins": null}]}', "cases[0].margins is null"),
]


@pytest.mark.parametrize(("text", "message"), GOLDEN, ids=[text for text, _ in GOLDEN])
def test_reference_outputs_of_another_form_are_refused_with_the_key(tmp_path, text, message):
    path = tmp_path / "g.json"
    path.write_text(text)
    assert refusal(read_golden, path).startswith(message)
