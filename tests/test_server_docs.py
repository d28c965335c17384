# SPDX-License-Identifier: Apache-2.0
"""What docs/serving.md and the dashboard say of the server: its options and its metrics."""

import json
import re
from dataclasses import fields
from pathlib import Path

from meshwen.common.option_fields import options_of
from meshwen.engine.cache_stats import CacheStats
from meshwen.server.metrics import Metrics
from meshwen.server.options import ServerOptions

DOCS = Path(__file__).parents[1] / "docs"


def option_rows() -> list[str]:
    """The table of options, as it must be."""
    rows, defaults = [], {f.name: f.default for f in fields(ServerOptions)}
    for name, one in options_of(ServerOptions).items():
        default, flag = defaults[name], f"--{name.replace('_', '-')}"
        if isinstance(default, bool):
            default = "on" if default else "off"
        shown = f"{default:g}" if isinstance(default, float) else str(default or "")
        shown = f"`{shown}`" if shown else ""
        rows.append(f"| `{flag}` | {shown} | {one.help.replace('<', '&lt;')} |")
    return rows


def test_the_table_of_options_is_that_of_the_command():
    text = (DOCS / "serving.md").read_text("utf-8")
    table = re.search(r"<!-- options -->\n.*?\n.*?\n(.*?)\n<!-- options: end -->", text, re.DOTALL)
    assert table
    assert table[1].splitlines() == option_rows()


def exported() -> set[str]:
    """The names of all metrics."""
    engine = type("Engine", (), {"running": 0, "waiting": 0, "failures": 0})()
    metrics = Metrics("demo")
    metrics.watch(engine, lambda: CacheStats(0, 1, 0, 0, 0, 0))
    names = re.findall(r"^([\w:]+)\{", metrics.text().decode(), re.MULTILINE)
    return {one for one in names if one.startswith("vllm:") and not one.endswith("_created")}


def test_the_docs_and_the_dashboard_name_metrics_that_there_are():
    names = exported()
    page = (DOCS / "serving.md").read_text("utf-8")
    listed = set(re.findall(r"`(vllm:\w+)`", page))
    assert listed == {re.sub(r"_(bucket|count|sum)$", "", name) for name in names}
    board = json.loads((DOCS / "grafana.json").read_text("utf-8"))
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    used = {name for one in asked for name in re.findall(r"vllm:\w+", one)}
    assert used <= names
    assert len(used) > 8
