# SPDX-License-Identifier: Apache-2.0
"""The stored answers that a GPU is held against are those of a CPU."""

import importlib
import json
from pathlib import Path

SCRIPTS = Path(__file__).parents[1] / "scripts"


def test_the_demo_gives_the_stored_answers_on_a_mesh(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("demo_tokens")
    assert script.answers("1x8") == json.loads(script.STORED.read_text(encoding="utf-8"))
