# SPDX-License-Identifier: Apache-2.0
"""The stored answers that a GPU is held against are those of a CPU, on any mesh."""

import importlib
import json
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.mark.parametrize("mesh", ["1x8"])
def test_the_demo_gives_the_stored_answers(mesh, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("demo_tokens")
    assert script.answers(mesh) == json.loads(script.STORED.read_text(encoding="utf-8"))
