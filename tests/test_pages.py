# SPDX-License-Identifier: Apache-2.0
"""Reports need nothing else, fit a phone, and take nothing that a model says for a part of them."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from meshwen.bench.report_html import _overlap, _plot
from meshwen.bench.report_html import html_report as bench_report
from meshwen.evals.compare import compare
from meshwen.evals.report_html import html_report as eval_report
from meshwen.evals.run_file import RunFile

HOSTILE = "</div></script><script>alert(1)</script><img src=//x onerror=alert(2)> {{ 7 * 7 }}"


class Page(HTMLParser):
    """What stands in a page: tags, what is around each, and the texts of scripts."""

    VOID = ("meta", "line", "polyline", "circle", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.scripts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.seen.append((tag, found, [found.get("class") for _, found in self.open]))
        if tag not in self.VOID:
            self.open.append((tag, found))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "script":
            self.scripts.append(data)

    def all(self, tag):
        return [found for name, found, _ in self.seen if name == tag]


def run_file(path, settings, answers):
    asked = {"sample": 0, "prompt_sha256": "p", "tokens": [1], "gold": "7", "elapsed": 1.0}
    lines = [{"format": "meshwen-eval-3", "settings": {"prompt_style": "demo"} | settings}]
    for number, (correct, reason) in enumerate(answers):
        said = {"question": HOSTILE, "text": HOSTILE, "extracted": HOSTILE, "error": HOSTILE}
        lines.append({"id": number, "finish_reason": reason, "correct": correct} | asked | said)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return RunFile.read(path)


RIGHT, WRONG, CUT, FAILED = (True, "stop"), (False, "stop"), (False, "length"), (False, "error")


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    settings = {"model": HOSTILE, "mesh": "1", "jax": "1", "dtype": "float32", "numerics": "exact"}
    first = run_file(folder / "a.jsonl", settings, [RIGHT, WRONG, CUT, FAILED])
    changed = {"mesh": "8", "jax": "2", "model": "m", "temperature": 0.5}
    second = run_file(folder / "b.jsonl", settings | changed, [WRONG, WRONG, RIGHT])
    return eval_report([first, second], [compare(first, second)])


def measured(phase, batch, length, flops):
    seconds = {"median": 1.0, "least": 1.0, "most": 1.0}
    rates = {"tokens_per_second": 1.0, "bytes_per_second": 1e9, "flops_per_second": flops}
    row = {"phase": phase, "batch": batch, "length": length, "seconds": seconds, "share": 0.5}
    return row | rates | {"cost": {"bytes": 1e9, "flops": flops}}


@pytest.fixture(scope="module")
def benched():
    """Points that lie on each other, at the plot's edges too."""
    rows = [measured("decode", batch, n, 1e9) for batch in (1, 8, 128) for n in (128, 512, 32768)]
    rows += [measured("prefill", 1, n, 1e12) for n in (128, 32768)]
    told = ("model", "dtype", "mesh", "numerics", "jax", "meshwen", "products", "compiler")
    names = dict.fromkeys(told, HOSTILE)
    machine = {"bandwidth": 1e9, "rate": 1e12}
    about = {"quantization": None, "device": HOSTILE, "peak_bytes": 1}
    return names | about | {"machine": machine, "rows": rows}


def test_hostile_texts_stay_texts_and_only_the_pages_own_script_may_run(compared, benched):
    for text in (compared, bench_report(benched)):
        page = Page(text)
        assert page.open == []
        assert page.all("img") == []
        assert not any(name.startswith("on") for _, found, _ in page.seen for name in found)
        assert not re.search(r"(src|href)=(?!//x)", text)
        assert "{{ 7 * 7 }}" in text
        policy = next(m["content"] for m in page.all("meta") if "http-equiv" in m)
        assert "default-src 'none'" in policy
        digests = [hashlib.sha256(script.encode()).digest() for script in page.scripts]
        allowed = [f"'sha256-{base64.b64encode(one).decode()}'" for one in digests] or ["'none'"]
        assert f"script-src {allowed[0]};" in policy
        assert len(allowed) == 1


def test_what_is_wide_scrolls_by_itself(compared, benched):
    for text in (compared, bench_report(benched)):
        page = Page(text)
        assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all(
            "meta"
        )
        wide = [around for tag, _, around in page.seen if tag in ("table", "svg")]
        assert wide
        assert all("scroll" in around for around in wide)


def test_answers_are_marked_by_what_is_looked_for(compared):
    page = Page(compared)
    answers = [one for one in page.all("details") if one.get("class") == "answer"]
    kinds = ["all right", "all wrong", "all wrong cut-off", "all wrong failed"]
    assert [one["data-kinds"] for one in answers] == kinds
    assert [one["value"] for one in page.all("option")] == [
        *("all", "wrong", "right", "cut-off", "failed")
    ]
    for said in ("all (4)", "wrong (3)", "right (1)", "cut off (1)", "failed (1)"):
        assert f">{said}</option>" in compared
    # What the script asks for is there; without it, every answer stays.
    ids = {found.get("id") for _, found, _ in page.seen}
    assert {"filter", "kind", "words", "shown"} <= ids
    assert all("hidden" not in one for one in answers)


def test_what_two_runs_differ_in_is_listed(compared):
    start = compared.index("What the runs differ in")
    table = compared[start : compared.index("</table>", start)]
    found = re.findall(r'<td class="l soft">(.*?)</td>((?:<td class="l">.*?</td>)+)', table)
    rows = {name: re.findall(">(.*?)</td>", values) for name, values in found}
    assert rows.pop("model: model")[1] == "m"
    assert rows == {
        "option: temperature": ["none", "0.5"],
        "machine: mesh": ["1", "8"],
        "version: jax": ["1", "2"],
    }


def test_labels_of_points_cover_nothing(benched):
    plot = _plot(benched)
    labels = [
        (
            one["label_x"],
            one["label_y"] - 10,
            one["label_x"] + 8 * len(one["label"]),
            one["label_y"],
        )
        for one in plot["points"]
    ]
    assert [one["label"] for one in plot["points"]][:2] == ["1\u00d7128", "1\u00d7512"]
    for number, one in enumerate(labels):
        assert not any(_overlap(one, other) for other in labels[:number])
        for point in plot["points"]:
            assert not _overlap(one, (point["x"], point["y"], point["x"], point["y"]))
        assert plot["left"] <= one[0]
        assert one[2] <= plot["right"]
    assert bench_report(benched).count("\u00d7128</text>") == 4
