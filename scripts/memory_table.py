# SPDX-License-Identifier: Apache-2.0
"""The table of what memory each published size needs, from `meshwen inspect PRESET --json`.

python scripts/memory_table.py            # prints it
python scripts/memory_table.py README.md  # puts it between the page's two markers
"""

import contextlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import meshwen.cli
from meshwen.models.presets import PRESETS

MESHES = ("1", "1x8", "1x32")
BEGIN, END = "<!-- memory table: begin -->\n", "<!-- memory table: end -->\n"
HEAD = """\
| size | weights in bfloat16, GB | weights in int8, GB | KV cache of 1,000 tokens, MB |
|---|---|---|---|
"""


def inspection(preset: str, mesh: str, *options: str) -> dict[str, Any]:
    """What `meshwen inspect PRESET --mesh MESH --json` prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = meshwen.cli.main(["inspect", preset, "--mesh", mesh, "--json", *options])
    assert status == 0, (preset, mesh, options)
    found: dict[str, Any] = json.loads(out.getvalue())
    return found


def row(preset: str) -> str:
    """A row of the table: on 1, 8 and 32 devices, what each device holds."""
    plain = [inspection(preset, mesh) for mesh in MESHES]
    int8 = [inspection(preset, mesh, "--quantization", "int8") for mesh in MESHES]
    cells = (
        f"`{preset}`",
        " / ".join(_number(one["weights"]["per_device"] / 1e9) for one in plain),
        " / ".join(_number(one["weights"]["per_device"] / 1e9) for one in int8),
        " / ".join(_number(one["kv_cache"]["per_device_per_token"] / 1e3) for one in plain),
    )
    return f"| {' | '.join(cells)} |\n"


def table() -> str:
    """The table as Markdown."""
    return HEAD + "".join(row(preset) for preset in PRESETS)


def _number(value: float) -> str:
    """Three digits at least: 0.0617, 15.2, 144."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}"


def main() -> None:
    if not sys.argv[1:]:
        print(table(), end="")
        return
    page = Path(sys.argv[1])
    text = page.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    assert pattern.search(text), f"{page} has no place for the table"
    page.write_text(pattern.sub(f"{BEGIN}{table()}{END}", text), encoding="utf-8")


if __name__ == "__main__":
    main()
