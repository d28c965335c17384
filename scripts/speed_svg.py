# SPDX-License-Identifier: Apache-2.0
"""The chart of speed in the docs: tokens a second of several engines, from docs/speed.json.

python scripts/speed_svg.py docs/speed.json docs/speed.svg

Bars, not lines, and a panel for each batch: engines are compared within a panel, which has a scale
of its own.
"""

import json
import sys
from html import escape
from pathlib import Path
from typing import Any

LEFT, TOP, WIDTH, ROW, PANEL, GAP = 192, 44, 840, 21, 300, 24
NUMBER = 48  # What the number at the end of the longest bar takes.
STYLE = """<style>
text { font: 12px system-ui, sans-serif; fill: #24292f } .soft { fill: #57606a }
.title { font-weight: 600 } .ours { fill: #0969da } .theirs { fill: #afb8c1 }
.name { font-weight: 600 } .axis { stroke: #d0d7de }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .soft { fill: #9198a1 } .ours { fill: #4493f8 } .theirs { fill: #59636e }
.axis { stroke: #3d444d } }
</style>"""


def chart(data: dict[str, Any]) -> str:
    """The chart as SVG: two panels beside each other, a bar for each engine and format."""
    engines = data["engines"]
    height_of_panel = ROW * len(engines) + 34
    lines = []
    for number, (title, tokens) in enumerate(zip(data["panels"], data["tokens"], strict=True)):
        x = LEFT + number % 2 * (PANEL + GAP)
        y = TOP + number // 2 * height_of_panel
        rates = [tokens / engine["milliseconds"][number] * 1e3 for engine in engines]
        scale = (PANEL - NUMBER) / max(rates)
        lines.append(f'<text class="title" x="{x}" y="{y - 8}">{escape(title)}, tokens/s</text>')
        for row, (engine, rate) in enumerate(zip(engines, rates, strict=True)):
            bar, base = y + row * ROW, y + row * ROW + 14
            ours = engine["name"] == "meshwen"
            if number % 2 == 0:
                kind = "name" if ours else "soft"
                label = escape(f"{engine['name']} {engine['format']}")
                lines.append(
                    f'<text class="{kind}" x="{x - 8}" y="{base}" text-anchor="end">{label}</text>'
                )
            lines.append(
                f'<rect class="{"ours" if ours else "theirs"}" x="{x}" y="{bar + 3}"'
                f' width="{rate * scale:.1f}" height="{ROW - 6}"/>'
            )
            text = f"{rate:.1f}" if rate < 100 else f"{rate:.0f}"
            lines.append(
                f'<text class="soft" x="{x + rate * scale + 5:.1f}" y="{base}">{text}</text>'
            )
        bottom = y + ROW * len(engines)
        lines.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{y}" y2="{bottom}"/>')
    height = TOP + -(-len(data["panels"]) // 2) * height_of_panel
    conditions = escape(data["conditions"])
    lines.append(f'<text class="soft" x="12" y="{height - 8}">{conditions}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img"\n'
        f'  aria-label="Tokens a second of several engines. {conditions}">{STYLE}\n'
        + "\n".join(lines)
        + "\n</svg>\n"
    )


def main() -> None:
    data, picture = map(Path, sys.argv[1:])
    picture.write_text(chart(json.loads(data.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
