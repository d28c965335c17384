# SPDX-License-Identifier: Apache-2.0
"""The scripts of our own loop: the faults that tests must find, and the tests near a change."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"


@pytest.fixture
def script(monkeypatch):
    """Imports a script by name."""
    if not SCRIPTS.is_dir():
        pytest.skip("the scripts are not beside the tests")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


def test_every_fault_can_be_put_in_and_names_tests_that_are_there(script):
    mutants, faults = script("mutants"), script("mutants_list").FAULTS
    assert len({fault.name for fault in faults}) == len(faults)
    for fault in faults:
        source = (ROOT / fault.path).read_text(encoding="utf-8")
        assert mutants.mutated(fault, source) != source
        assert fault.tests
        for name in fault.tests:
            assert (ROOT / "tests" / f"test_{name}.py").is_file(), (fault.name, name)


def test_a_fault_whose_place_has_gone_is_named(script):
    mutants, (fault, *_) = script("mutants"), script("mutants_list").FAULTS
    with pytest.raises(ValueError, match=f"^{fault.name}: .* 0 times"):
        mutants.mutated(fault, "nothing of it")


@pytest.mark.parametrize(
    ("changed", "first", "others"),
    [
        ("tests/test_rope.py", ["test_rope"], []),
        ("tests/speller.py", ["test_causal_lm"], ["test_cli_chat", "test_cli_generate"]),
        ("src/meshwen/engine.py", ["test_engine", "test_engine_batching"], ["test_lookup"]),
        ("src/meshwen/cli/chat.py", ["test_chat_template", "test_cli_chat"], []),
        ("src/meshwen/kernels/attention.ll", ["test_kernels"], ["test_quantization"]),
        ("docs/design.md", [], []),
    ],
)
def test_the_tests_near_a_change_come_the_nearest_first(script, changed, first, others):
    near = [path.stem for path in script("check").near_tests([ROOT / changed])]
    assert near[: len(first)] == first
    assert set(others) <= set(near[len(first) :])
    assert bool(near) == bool(first)
