# SPDX-License-Identifier: Apache-2.0
"""The roofline plot of a report that `meshwen bench --html` wrote, as a picture by itself.

python scripts/roofline_svg.py bench.html docs/roofline.svg
"""

import re
import sys
from pathlib import Path

COLOURS = {"var(--ink)": "#1c2126", "var(--s1)": "#1f77b4", "var(--s2)": "#d9730d"}
STYLE = (
    "<style>svg { background: #fff } .grid { stroke: #d5dade }"
    " text { fill: #5d6770; font: 11px system-ui, sans-serif }</style>"
)


def main() -> None:
    report, picture = map(Path, sys.argv[1:])
    found = re.search(r"<svg(.*?)>(.*?)</svg>", report.read_text(encoding="utf-8"), re.DOTALL)
    if not found:
        sys.exit(f"{report} has no plot: it is not what meshwen bench --html writes")
    attributes, content = found.groups()
    for name, colour in COLOURS.items():  # Not everything that shows pictures knows variables.
        content = content.replace(name, colour)
    picture.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg"{attributes}>{STYLE}{content}</svg>\n',
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
