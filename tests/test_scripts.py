# SPDX-License-Identifier: Apache-2.0
"""The scripts of our own loop: the faults that tests must find, and the tests near a change."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"


@pytest.fixture
def script(monkeypatch):
    """Imports a script by name."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


def test_every_fault_can_be_put_in_and_names_tests_that_are_there(script):
    mutants, faults = script("mutants"), script("mutants_list").FAULTS
    assert len({fault.name for fault in faults}) == len(faults)
    for fault in faults:
        source = (ROOT / fault.path).read_text(encoding="utf-8")
        found = mutants.mutated(fault, source)
        assert found != source
        if fault.path.endswith(".py"):
            compile(found, fault.path, "exec")
        assert fault.tests
        for name in fault.tests:
            assert (ROOT / "tests" / f"test_{name}.py").is_file(), (fault.name, name)


def test_costs_are_written_for_each_test_and_read_back(tmp_path, capsys):
    costs = importlib.import_module("costs")
    file = tmp_path / "costs.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-n", "1", f"--costs={file}"]
    command += ["tests/test_heads.py", "-k", "7b_lies"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    found = costs.read(file)
    assert len(found) == 5
    assert all(one.wall > 0 for one in found.values())
    with file.open("a", encoding="utf-8") as more:
        more.write("{}\n")
    assert costs.read(file) == found
    assert f"{file}, line 6: not the costs of a test" in capsys.readouterr().err
    assert costs.summary(found).splitlines()[-1].endswith("  tests/test_heads.py")


def test_a_fault_whose_place_has_gone_is_named(script):
    mutants, (fault, *_) = script("mutants"), script("mutants_list").FAULTS
    with pytest.raises(ValueError, match=f"^{fault.name}: .* 0 times"):
        mutants.mutated(fault, "nothing of it")


@pytest.mark.parametrize(
    ("changed", "first", "others"),
    [
        ("tests/test_rope_frequencies.py", ["test_rope_frequencies"], []),
        ("tests/speller.py", ["test_arguments"], ["test_cli_chat", "test_cli_generate"]),
        (
            "src/meshwen/engine/engine.py",
            ["test_engine", "test_engine_batching"],
            ["test_prompt_lookup"],
        ),
        ("src/meshwen/cli/chat.py", ["test_chat_template", "test_cli_chat"], []),
        (
            "src/meshwen/ops/cpu/csrc/attention.h",
            ["test_build_kernels", "test_kernels"],
            ["test_quantization"],
        ),
        (
            "src/meshwen/ops/numerics/exact.py",
            ["test_exact", "test_exact_models"],
            ["test_prompt_lookup"],
        ),
        ("src/meshwen/gone.py", [], []),
        ("scripts/check.py", ["test_scripts"], []),
        ("scripts/build_kernels.py", ["test_build_kernels", "test_scripts"], []),
        ("tests/conftest.py", ["test_heads"], []),
        ("docs/architecture.md", [], []),
    ],
)
def test_the_tests_near_a_change_come_the_nearest_first(script, changed, first, others):
    near = [path.stem for path in script("check").near_tests([ROOT / changed])]
    assert near[: len(first)] == first
    assert set(others) <= set(near[len(first) :])
    assert bool(near) == bool(first)


def test_tests_beyond_the_deadline_are_counted_and_do_not_pass(script):
    check = script("check")
    arguments = ("-q", "--seconds=0.001", "tests/test_heads.py", "-k", "7b_lies")
    found = check.run("tests", "pytest", *arguments)
    assert found.status == 2  # pytest's own, of a run that was interrupted.
    assert "1 passed" in found.output
    assert "skipped" not in found.output
    judged = check._judged(found)
    assert (judged.status, judged.name) == (0, "tests (4 tests had not begun: make test)")
    whole = check.run("tests", "pytest", "-q", "--seconds=600", *arguments[2:])
    assert (whole.status, check._judged(whole)) == (0, whole)


def test_only_what_did_not_run_is_no_failure(script):
    check = script("check")
    assert check._judged(check.Step("tests", 5, "9 deselected", 1.0)).status == 0
    for status in (1, 2, 3, 4, -11):  # Also of an interruption that no deadline caused.
        assert check._judged(check.Step("tests", status, "", 1.0)).status == status
