# SPDX-License-Identifier: Apache-2.0
"""Tables are whole at every width, and texts of users and files are printed as they are."""

import io
import json
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from checkpoint_writers import random_weights, write_folder
from meshwen.cli import main
from meshwen.cli.console import output_console, say
from meshwen.cli.eval_tables import print_comparison
from meshwen.cli.inspect_tables import print_inspection
from meshwen.cli.tables import PlainTable, print_pairs
from meshwen.cli.verify_tables import print_certificate
from meshwen.evals.compare import compare
from meshwen.evals.run_file import RunFile

WIDTHS = (40, 60, 80, 200)


def console(width: int) -> Console:
    """The command line's, of another width."""
    made = output_console()
    made.width, made.file = width, io.StringIO()
    return made


def printed(write, width: int) -> str:
    one = console(width)
    write(one)
    return one.file.getvalue()


@pytest.mark.parametrize("width", WIDTHS)
def test_no_cell_is_cut_at_any_width(width):
    names = ("mesh", "devices", "weights", "relative difference", "mean KL", "greedy", "bits")
    table = PlainTable(
        "a title that is longer than forty columns are", "mesh", *(">" + n for n in names)
    )
    rows = [
        ("data=2,model=4", *(f"{value:.1e}" for value in (4.6e-13, 1e-300, 2, 3, 4, 5, 6))),
        ("1", *(f"{value:,.1f}" for value in (1e12, 2, 3, 4, 5, 6, 7))),
    ]
    for row in rows:
        table.add_row(*row)
    said = printed(table.print, width)
    assert {cell for row in rows for cell in row} <= set(said.split())
    assert all(word in said for name in names for word in name.split())
    assert max(map(len, said.splitlines())) <= max(width, 45)


@given(
    st.lists(st.lists(st.text("0123456789.e-%", min_size=1, max_size=30), min_size=3, max_size=3)),
    st.integers(20, 120),
)
def test_every_number_is_found_whole(rows, width):
    table = PlainTable("numbers", "first", ">second", "~prose")
    for row in rows:
        table.add_row(*row)
    assert {cell for row in rows for cell in row} <= set(printed(table.print, width).split())


def test_prose_is_folded_between_words_before_a_table_is_parted():
    table = PlainTable("texts", "~one[1]: right", "~other: wrong")
    table.add_row("said " * 40, "1234567 " * 20)
    lines = printed(table.print, 60).splitlines()
    assert "one[1]: right" in lines[2]
    assert lines[2].rstrip().endswith("other: wrong")
    assert sum(line.count("1234567") for line in lines) == 20
    assert all(len(line) <= 60 for line in lines)


def test_columns_that_do_not_fit_are_continued_below_and_last_become_lists():
    table = PlainTable("t", "name", *(f">number {i}" for i in range(6)))
    table.add_row("the name", *["12345.67"] * 6)
    assert printed(table.print, 80).count("the name") == 1
    assert printed(table.print, 40).count("the name") == 2
    assert "\nname: the name\n  number 0: 12345.67\n" in printed(table.print, 20)


def test_a_terminal_without_a_width_shows_everything(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "0")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    say(output_console(), "12345.67")
    assert capsys.readouterr().out == "12345.67\n"


MARKED = "run[bf16].jsonl [/x] :smile: [link=file:///x]y[/link] \\[z] '1'"


def test_texts_are_never_read_as_markup():
    table = PlainTable(MARKED, MARKED, "~" + MARKED)
    table.add_row(MARKED, MARKED)

    def write(one):
        say(one, MARKED)
        table.print(one)
        print_pairs(one, [(MARKED, MARKED)])

    assert printed(write, 200).count(MARKED) == 8


def test_a_text_is_folded_between_words_and_a_longer_word_is_whole():
    word = "1" * 50
    said = printed(lambda one: say(one, f"  two words, then {word} and more-and-more words"), 20)
    assert said.splitlines() == ["  two words, then", word, "and more-and-more", "words"]


def test_control_characters_are_shown_as_python_writes_them():
    said = printed(lambda one: say(one, "a\x1b]0;b\x07\x9b2J\rc\td\x00"), 80)
    assert said == r"a\x1b]0;b\x07\x9b2J\rc  d\x00" + "\n"


@pytest.fixture(scope="module")
def inspected(tmp_path_factory):
    """Writes a model's tables."""
    import jax.numpy as jnp

    from meshwen.checkpoints import open_checkpoint
    from meshwen.cli.inspect_report import inspection, tensor_rows
    from meshwen.models.parallel_model import ParallelModel
    from meshwen.parallel.mesh import MeshSpec

    folder = write_folder(tmp_path_factory.mktemp("models") / "a[b]c", random_weights())
    with open_checkpoint(str(folder)) as checkpoint:
        mesh = MeshSpec.parse("data=2,model=4").abstract()
        dtype = jnp.dtype(jnp.bfloat16)
        model = ParallelModel(checkpoint.config, mesh, dtype, "exact")
        rows = tensor_rows(model, checkpoint.tensors, "*")
        report = inspection(model, checkpoint, rows)
    return report, rows


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("fold", [True, False])
def test_inspect_shows_every_name_and_number(inspected, width, fold):
    report, rows = inspected
    said = printed(lambda one: print_inspection(report, rows, one, fold=fold), width)
    words = set(said.split())
    layers = r"model\.layers\.\d+\." if fold else "$"
    assert {re.sub(layers, "", row.name) for row in rows} <= words
    assert {"x".join(map(str, row.shape)) for row in rows} <= words
    assert str(report["config"]["rms_norm_eps"]) in words
    assert "a[b]c" in said


def run_file(path, settings, *changes):
    asked = {"sample": 0, "question": "?", "tokens": [1], "finish_reason": "stop", "elapsed": 1.0}
    settings = {"mesh": "1", "prompt_style": "qwen"} | settings
    lines = [{"format": "meshwen-eval-3", "settings": settings}]
    for number, change in enumerate(changes):
        one = {"id": number, "prompt_sha256": "p", "text": "7", "extracted": "7", "gold": "7"}
        lines.append(one | asked | {"correct": True} | change)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return RunFile.read(path)


@pytest.mark.parametrize("width", WIDTHS)
def test_comparisons_show_paths_and_texts_as_they_are(tmp_path, monkeypatch, width):
    (folder := tmp_path / "[red]x:smile:").mkdir()
    text = "[bold]1,234,567.89[/bold] :smile: " + "word " * 30 + "99.75"
    one = run_file(folder / "run[bf16].jsonl", {"model": "a[b]"}, {}, {})
    wrong = {"correct": False, "text": text, "extracted": "[i]9", "tokens": [2]}
    other = run_file(folder / "run[i]:dog:.jsonl", {"model": "c:dog:"}, {}, wrong)
    to = console(width)
    monkeypatch.setattr("meshwen.cli.eval_tables.output_console", lambda: to)
    print_comparison(compare(one, other), (one, other))
    said = to.file.getvalue()
    for whole in (str(one.path), str(other.path), "[bold]1,234,567.89[/bold]", ":smile:", "99.75"):
        assert whole in said
    assert "model: a[b] and c:dog:" in " ".join(said.split())


@pytest.mark.parametrize("width", WIDTHS)
def test_a_certificates_numbers_are_whole(width):
    found = certificate()
    said = printed(lambda one: print_certificate(found, one), width)
    assert {"4.6e-13", "3.9e-15", "1.6e-28", "128/128", "data=2,model=4"} <= set(said.split())
    assert "m[odel]:x:" in said
    assert "1.20 MB to 4.70 MB" in said


def certificate() -> dict:
    """What `verify` prints of a run, with long numbers."""
    different = {"max_abs": 4.6e-13, "max_relative": 3.9e-15, "mean_kl": 1.6e-28}
    cached = different | {"agree": 128, "positions": 128, "proven": 128, "first_divergence": None}
    row = {
        **{"numerics": "exact", "mesh": "data=2,model=4", "devices": 8, "broken": False},
        "products": "kernels",
        **{"weight_bytes": (1_200_000, 4_700_000), "cache_bytes": (1, 2), "bits_equal": False},
        **{"sent_bytes_per_token": 41_200, "seconds": [100.0, 12.4]},
        **{"first_divergence": "0:MLP output"},
        **{"operations": ["embedding", *["0:MLP output"] * 59, "logits"]},
        **{"operations_equal": [True] * 60, "divergence": [0.0] * 60, "collectives": []},
        **{"whole": different, "cached": cached, "cached_against_whole": {"bits_equal": True}},
    }
    row["cached_against_whole"] |= different
    return {
        **{"model": "m[odel]:x:", "dtype": "float32", "quantization": None},
        **{"prompts": [1], "tokens": [[1, 2]]},
        **{"meshes": ["1x1"], "numerics": ["exact"], "rows": [row], "layers": 1, "self_test": {}},
        **{"golden": [], "ok": False, "broken": ["exact [1]: :x: 4.6e-13"]},
    }


def test_bench_shows_every_number_on_a_narrow_terminal(monkeypatch):
    from meshwen.bench.costs import Cost
    from meshwen.bench.measure import Seconds
    from meshwen.bench.report import Machine, Row
    from meshwen.cli import bench

    row = Row("decode", 8, 512, 8, Seconds(0.12345, 0.1, 9.9999), Cost(10**9, 10**12), 0.5)
    found = {
        **{"model": "m[x]", "quantization": None, "dtype": "float32", "numerics": "fast"},
        **{"mesh": "1", "jax": "1", "device": "cpu[0]", "peak_bytes": 1, "products": "avx2"},
        "compiler": "clang 22.1.8 (ziglang 0.17.1)",
    }
    for width in WIDTHS:
        to = console(width)
        monkeypatch.setattr(bench, "output_console", lambda to=to: to)
        bench._print(found, Machine(1e9, 1e10), [row])
        said = to.file.getvalue()
        assert {"512", "123.5", "100.0", "9999.9", "64.8", "8,100.4", "50%"} <= set(said.split())
        assert "m[x]" in said
        assert "cpu[0]" in said
        assert "matmuls by avx2, compiled by clang 22.1.8 (ziglang 0.17.1)" in " ".join(
            said.split()
        )


def test_a_path_in_brackets_is_named_in_errors(tmp_path, capsys):
    assert main(["eval", "compare", f"{tmp_path}/run[bf16].jsonl", "b[/].jsonl"]) == 2
    assert "run[bf16].jsonl" in capsys.readouterr().err
