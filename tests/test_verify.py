# SPDX-License-Identifier: Apache-2.0
"""Every mesh computes the same, and its results are written down so that they can be checked."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest

import reference
from mesh_model import bytes_on_one_device
from meshwen.checkpoints.digest import weights_sha256
from meshwen.errors import MeshwenError
from meshwen.ops.backend import Backend
from meshwen.ops.cpu import kernels
from meshwen.parallel.mesh import MeshSpec
from meshwen.verify.certificate import (
    certificate,
    differences,
    golden_comparison,
)
from meshwen.verify.certificate_file import as_json, read_certificate
from meshwen.verify.parity import verify
from meshwen.verify.picture import height, strip
from meshwen.verify.report_html import html_report
from meshwen.verify.workload import Workload, check_length
from tiny_model import TINY, greedy, weights
from verify_model import PROMPTS, STEPS, checkpoint, mesh_run, observed, without_tokens, workload

pytestmark = pytest.mark.usefixtures("unoptimised")
MESHES = ("1", "data=2,model=2")
HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def outcome():
    meshes = [MeshSpec.parse(mesh) for mesh in MESHES]
    return verify(checkpoint(), meshes, ["fast", "exact"], "float32", without_tokens())


@pytest.fixture(scope="module")
def found(outcome):
    return certified(checkpoint(), outcome)


def certified(source, outcome) -> dict:
    return certificate(source, outcome, "float32", weights_sha256=weights_sha256(source))


@pytest.mark.parametrize(
    ("mesh", "numerics"), [("1", "fast"), ("4", "fast"), ("data=2,model=2", "exact")]
)
def test_both_ways_to_compute_logits_give_those_of_float64(mesh, numerics):
    got = observed(mesh, numerics)
    for row, (prompt, tokens) in enumerate(zip(PROMPTS, workload().continuations, strict=True)):
        expected = reference.logits(weights(), TINY, [*prompt, *tokens.tolist()[:-1]])
        expected = expected[len(prompt) - 1 :]
        for logits in (got.whole[row], got.cached[row]):
            np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("mesh", ["1", "4"])
def test_generated_tokens_are_the_greedy_ones_of_float64(mesh):
    expected = [greedy(prompt)[0][:STEPS] for prompt in PROMPTS]
    assert mesh_run(mesh).generate().tolist() == [list(tokens) for tokens in expected]


def test_a_mesh_that_is_fed_other_tokens_reports_its_own_choice():
    run = mesh_run("4")
    fed = np.full((len(PROMPTS), STEPS), 7, np.int32)
    run.workload = Workload(PROMPTS, STEPS, 2, fed)
    try:
        got = run.observe()
    finally:
        run.workload = workload()
    expected = reference.logits(weights(), TINY, [*PROMPTS[1], 7, 7])[-STEPS:]
    assert got.greedy[1].tolist() == expected.argmax(axis=-1).tolist()
    np.testing.assert_array_equal(got.greedy, got.cached.argmax(axis=-1))


def test_exact_meshes_have_equal_bits_and_fast_ones_are_within_bounds(outcome):
    assert [(row.numerics, row.mesh) for row in outcome.rows] == [
        (numerics, mesh) for numerics in ("fast", "exact") for mesh in MESHES
    ]
    assert [row.bits_equal for row in outcome.rows] == [True, False, True, True]
    assert all(r.cached_against_whole.bits_equal for r in outcome.rows if r.numerics == "exact")
    assert not any(row.broken for row in outcome.rows)
    assert [row.first_divergence is None for row in outcome.rows] == [
        row.bits_equal for row in outcome.rows
    ]
    assert all(row.whole.positions == len(PROMPTS) * STEPS for row in outcome.rows)
    assert all(row.sampler_shortfall == 0 for row in outcome.rows)


def test_a_device_holds_its_part_and_sends_what_its_collectives_send(outcome):
    one, two = outcome.rows[:2]
    assert one.weight_bytes[1] == bytes_on_one_device(weights())
    assert two.weight_bytes[0] == two.weight_bytes[1] < one.weight_bytes[0] * 0.6
    # Keys and values of float32 in 2 layers: a block of each row, and one that none has.
    head_dim = TINY.head_dim if kernels.instruction_set() is None else 32
    block = 2 * 2 * Backend.block_size * TINY.num_key_value_heads * head_dim * 4
    assert one.cache_bytes == (5 * block, 5 * block)
    assert two.cache_bytes == (3 * block // 2, 3 * block // 2)
    assert one.sent_bytes_per_token == 0
    # On 2 devices a ring all-reduce sends all that it reduces, an all-gather half of its result.
    reduced, gathered = 5 * TINY.hidden_size * 4, 2 * (1 / 2) * 2 * 4
    assert two.sent_bytes_per_token == reduced + gathered


def test_rows_of_every_batch_divide_by_every_mesh(outcome):
    assert outcome.workload.rows_multiple == 2
    assert outcome.workload.rows == 4
    tokens, lengths = outcome.workload.sequences()
    assert (tokens[3] == tokens[0]).all()
    assert lengths.tolist() == [9, 4, 7, 9]


def test_the_same_run_has_the_same_certificate(found, outcome):
    again = json.loads(as_json(certified(checkpoint(), outcome)))
    assert found["ok"]
    assert differences(again, found) == {"outcome": [], "environment": []}


def test_a_certificate_reports_other_weights_tokens_and_logits(found, tmp_path):
    other = checkpoint(**{HEAD: weights()[HEAD][::-1].copy()})
    changed = verify(other, [MeshSpec.parse("1")], ["fast"], "float32", workload())
    after = certified(other, changed)
    assert differences(found, after)["outcome"] == [
        "weights",
        "tokens: the first mesh generates others in fast numerics",
        "logits (whole and cached) of fast 1",
    ]


def test_a_certificate_without_the_tokens_of_some_numerics_confirms_none(found):
    other = found | {"generated": {"exact": found["generated"]["exact"]}}
    (line,) = differences(other, found)["outcome"]
    assert line.startswith("tokens: the first mesh generates others in fast")


def test_tokens_in_numerics_that_a_certificate_has_not_are_no_difference(found):
    rows = [row for row in found["rows"] if row["numerics"] == "exact"]
    tokens = {"exact": found["generated"]["exact"]}
    other = found | {"numerics": ["exact"], "generated": tokens, "rows": rows}
    outcome = differences(other, found)["outcome"]
    assert outcome
    assert all(line.endswith("is not in the certificate") for line in outcome)


def test_a_certificate_from_before_int8_could_be_checked_is_one_without(found):
    older = {key: value for key, value in found.items() if key != "quantization"}
    assert differences(older, found)["outcome"] == []
    (line,) = differences(older, found | {"quantization": "int8"})["outcome"]
    assert line == "quantization: none before, int8 now"


def test_a_certificate_reports_another_environment(found):
    other = found | {"environment": found["environment"] | {"jax": "9.9"}}
    (line,) = differences(other, found)["environment"]
    assert line.startswith("jax: '9.9' before")


def test_a_certificate_of_another_kind_is_reported(found):
    rows = [row | {"products": "of another kind"} for row in found["rows"]]
    (line,) = differences(found | {"rows": rows}, found)["environment"]
    assert line.startswith("exact numerics: matmuls by of another kind before, by ")
    for row in rows:
        row.pop("products")
    (line,) = differences(found | {"rows": rows}, found)["environment"]
    assert line.startswith("exact numerics: matmuls by an earlier version before, by ")


def test_weights_are_hashed_by_name_and_value():
    first = weights_sha256(checkpoint())
    assert first == weights_sha256(checkpoint())
    changed = weights()[HEAD].copy()
    changed[-1, -1] += 1
    assert first != weights_sha256(checkpoint(**{HEAD: changed}))


def test_a_certificate_is_read_back_or_refused(found, tmp_path):
    path = tmp_path / "certificate.json"
    path.write_text(as_json(found))
    assert read_certificate(path) == json.loads(json.dumps(found))
    for text in ("{", "[]", "{}", json.dumps({"format": found["format"]})):
        path.write_text(text)
        with pytest.raises(MeshwenError, match=r"certificate\.json"):
            read_certificate(path)
    with pytest.raises(MeshwenError, match="cannot read"):
        read_certificate(tmp_path / "none.json")


def test_golden_tokens_are_compared_as_far_as_both_go():
    generated = np.array([[1, 2, 3], [4, 5, 6]])
    cases = [{"greedy": [1, 2]}, {"greedy": [4, 5, 6, 7]}]
    same = golden_comparison("g.json", cases, generated, "float32")
    assert (same["equal"], same["broken"]) == (2, [])
    cases[1] = {"greedy": [4, 9]}
    other = golden_comparison("g.json", cases, generated, "float32")
    assert other["equal"] == 1
    assert other["broken"] == ["fast, prompt 1, token 1: 5, but 9 in g.json"]
    assert golden_comparison("g.json", cases, generated, "bfloat16")["broken"] == []


@pytest.mark.parametrize(("margin", "broken"), [(5e-4, 0), (2e-3, 1)])
def test_a_near_tie_of_the_reference_may_fall_either_way(margin, broken):
    case = {"greedy": [4, 9, 9], "margins": [3.0, margin, 2.0]}
    found = golden_comparison("transformers", [case], np.array([[4, 5, 6]]), "float32")
    assert (found["equal"], len(found["differences"]), len(found["broken"])) == (0, 1, broken)


def test_a_prompt_that_leaves_no_room_is_refused():
    with pytest.raises(MeshwenError, match="do not fit"):
        check_length([[1] * 1095], 6, TINY)
    check_length([[1] * 1094], 6, TINY)


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.outside = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br", "line", "circle", "polyline"):
            self.open.append(tag)
        self.outside += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        if tag not in ("line", "circle", "polyline"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_report_is_one_page_that_loads_nothing(found):
    text = html_report(found)
    page = Page(text)
    assert page.open == []
    assert page.outside == []
    assert "://" not in text
    assert "@import" not in text
    assert text.count("<polyline") == len(MESHES) * 2
    assert "prefers-color-scheme: dark" in text
    headings = {f"{row['numerics']}, matmuls by {row['products']}" for row in found["rows"]}
    assert len(headings) == 2
    assert headings | {*MESHES} <= set(page.text)


def test_the_report_shows_what_broke_and_escapes_names(found):
    text = html_report(found | {"ok": False, "broken": ["<b>1x8</b>"], "model": "<script>"})
    assert "&lt;b&gt;1x8&lt;/b&gt;" in text
    assert "<script>" not in text


def test_a_picture_has_a_character_an_operation():
    row = {"operations_equal": [True, False, False, False], "divergence": [0, 1e-9, 1e-4, 2.0]}
    assert strip(row) == "·▁▅█"
    assert height(float("nan")) == 1
