# SPDX-License-Identifier: Apache-2.0
"""Tables for people that are whole on every terminal: nothing in them is cut, whatever its width.

Where the columns do not fit side by side, the columns of prose are folded between words; then the
table is continued below, its first column repeated; and on the narrowest terminals each row becomes
a list, a line a cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from meshwen.cli.console import plain, say

_GAP = 2  # cells between two columns
_MOST_PARTS = 3  # tables below each other before rows become lists
_Cells = tuple[str, ...]


class PlainTable:
    """Rows of plain texts under a title and headings.

    Args:
        title: in bold above the table.
        columns: the headings; with `>` before it a column is aligned to the right, with `~` it is
            prose and may be folded between words. Others are never folded.
    """

    def __init__(self, title: str, *columns: str):
        self._title = title
        self._headings = tuple(column[column[:1] in (">", "~") :] for column in columns)
        self._right = tuple(column.startswith(">") for column in columns)
        self._prose = tuple(column.startswith("~") for column in columns)
        self._rows: list[tuple[_Cells, str]] = []

    def add_row(self, *cells: str, style: str = "") -> None:
        """Adds a row; one of a single cell is a heading of those that follow."""
        self._rows.append((cells, style))

    def print(self, console: Console) -> None:
        """Prints it as wide as the console, or narrower."""
        say(console, f"\n{self._title}", "bold")
        parts = self._parts(console.width)
        for number, part in enumerate(parts):
            if number:
                console.print()
            console.print(self._table(part, console.width))
        if not parts:
            self._print_lists(console)

    def _parts(self, width: int) -> list[list[int]]:
        """The columns of each table to print, the first column in all; none where that is wider."""
        least = [self._least(column) for column in range(len(self._headings))]
        parts = [[0]]
        for column in range(1, len(least)):
            if sum(least[i] + _GAP for i in parts[-1]) + least[column] <= width:
                parts[-1].append(column)
            elif least[0] + _GAP + least[column] <= width:
                parts.append([0, column])
            else:
                return []
        parts = [part for part in parts if len(part) > 1]
        return parts if len(parts) <= _MOST_PARTS else []

    def _cells(self, column: int) -> list[str]:
        """A column's texts, but those of headings."""
        return [cells[column] for cells, _ in self._rows if 1 < len(cells) > column]

    def _least(self, column: int) -> int:
        """The least width of a column, in terminal cells: headings may be folded, and prose."""
        alone = [cells[0] for cells, _ in self._rows if len(cells) == 1 and column == 0]
        foldable = [self._headings[column], *alone]
        texts = self._cells(column)
        whole = 0 if self._prose[column] else _widest(texts)
        folded = [*foldable, *texts] if self._prose[column] else foldable
        return max(1, whole, _widest([word for text in folded for word in text.split()]))

    def _table(self, part: Sequence[int], width: int) -> Table:
        least = [self._least(column) for column in part]
        natural = [_widest([self._headings[i], *self._cells(i)]) for i in part]
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0))
        room = width - _GAP * (len(part) - 1)
        for column, given in zip(part, _shared_out(least, natural, room), strict=True):
            table.add_column(
                plain(self._headings[column]),
                justify="right" if self._right[column] else "left",
                width=given,
                overflow="fold",
            )
        for cells, style in self._rows:
            row = [cells[i] if i < len(cells) else "" for i in part]
            table.add_row(*map(plain, row), style=style or None)
        return table

    def _print_lists(self, console: Console) -> None:
        for cells, style in self._rows:
            for number, (heading, text) in enumerate(zip(self._headings, cells, strict=False)):
                label = "  " * bool(number) + f"{heading}: " * bool(heading and len(cells) > 1)
                if label.strip() and ("\n" in text or _widest([label + text]) > console.width):
                    label = label.rstrip() + "\n"
                if text:
                    say(console, label + text, style)


def print_pairs(console: Console, pairs: Sequence[tuple[str, str]]) -> None:
    """Prints names with their values, in two columns where they fit."""
    half = (len(pairs) + 1) // 2
    columns = [pairs[:half], pairs[half:]]
    widths = [_widest([one[i] for one in column]) for column in columns for i in (0, 1)]
    if sum(widths) + 3 * _GAP > console.width:
        columns, widths = [pairs, []], [_widest([name for name, _ in pairs]), 0, 0, 0]
    for line in zip_longest(*columns, fillvalue=("", "")):
        texts = zip((text for pair in line for text in pair), widths, strict=True)
        say(
            console,
            (" " * _GAP).join(text + " " * (w - cell_len(text)) for text, w in texts).rstrip(),
        )


def _widest(texts: Sequence[str]) -> int:
    """The cells of the widest line."""
    return max(
        (cell_len(line) for text in texts for line in plain(text).plain.split("\n")), default=0
    )


def _shared_out(least: Sequence[int], natural: Sequence[int], room: int) -> list[int]:
    """The least widths, and what room is left in equal shares, up to the natural widths."""
    widths, extra = list(least), room - sum(least)
    columns = sorted(range(len(least)), key=lambda i: natural[i] - least[i])
    for done, column in enumerate(columns):
        more = max(0, min(natural[column] - least[column], extra // (len(columns) - done)))
        widths[column] += more
        extra -= more
    return widths
