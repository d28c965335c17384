# SPDX-License-Identifier: Apache-2.0
"""The collectives of a compiled program, read from its optimised HLO text.

XLA prints them in several ways, by version and back end: asynchronous (`all-reduce-start`), several
arrays combined in one tuple, replica groups as lists, as an iota or by mesh axes. An operation in
the body of a loop counts once.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

from meshwen.models.decoder import LAYER_SCOPE

_COLLECTIVE = re.compile(
    r"= (?P<result>.*?) (?P<kind>all-reduce|all-gather|all-to-all|ragged-all-to-all"
    r"|collective-permute|collective-broadcast|reduce-scatter)(?P<start>-start)?"
    r"\((?P<rest>.*)"
)
_ARRAY = re.compile(r"\b([a-z]+\d+[a-z\d]*|pred)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^%?(\S+) \(.*\) -> .*\{$")
_ROOT = re.compile(r"^ROOT %?\S+ = \S+ ([a-z\-]+)\(")
_BITS = re.compile(r"\d+")
_METADATA = re.compile(r", metadata=\{[^}]*\}")
_Array = tuple[str, int]  # Element type, bytes.


@dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
        kind: as XLA calls it, `all-reduce`, without `-start`.
        dtype: element type as XLA calls it, `f32`; several, in a combined one, joined by `+`.
        group_size: devices that take part together; 0 where the text does not say.
        nbytes: the larger of what goes into it and what comes out of it, on one device.
        reducer: how elements are combined, `add`; "" where nothing is.
        in_layer: whether it belongs to a decoder layer; the sampler's and the embedding's do not.
    """

    kind: str
    dtype: str
    group_size: int
    nbytes: int
    reducer: str = ""
    in_layer: bool = False

    @property
    def adds_floats(self) -> bool:
        """Whether it adds floating-point numbers, in an order that is XLA's to choose.

        Where the reducer is none that is known to have no order, it is taken to add.
        """
        floating = any(name[0] == "f" or name[:2] == "bf" for name in self.dtype.split("+"))
        return floating and self.reducer not in ("", "maximum", "minimum", "and", "or")

    @property
    def sent_bytes(self) -> float:
        """What one device sends where devices form a ring."""
        others = 1 - 1 / self.group_size if self.group_size else 1.0
        if self.kind == "all-reduce":
            return 2 * others * self.nbytes
        if self.kind in ("collective-permute", "collective-broadcast"):
            return float(self.nbytes)
        return others * self.nbytes


def collectives(hlo: str) -> list[Collective]:
    """The collectives of a compiled program's HLO text, in the text's order."""
    reducers = dict(_reducers(hlo.splitlines()))
    return [
        _collective(match, reducers) for match in map(_COLLECTIVE.search, hlo.splitlines()) if match
    ]


def summary(found: Iterable[Collective]) -> list[tuple[Collective, int]]:
    """Collectives that are alike, each with how many there are, in order of first appearance."""
    return list(Counter(found).items())


def fingerprint(hlo: str) -> str:
    """SHA-256 of a program's instructions, without where in the source they come from."""
    lines = (_METADATA.sub("", line) for line in hlo.splitlines() if " = " in line)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _collective(match: re.Match[str], reducers: dict[str, str]) -> Collective:
    kind, rest = match["kind"], match["rest"]
    group = _group_size(rest)
    arrays = _payload(kind, bool(match["start"]), match["result"])
    nbytes = sum(size for _, size in arrays)
    if kind == "reduce-scatter":
        nbytes *= max(1, group)
    to_apply = re.search(r"to_apply=%?([\w.\-]+)", rest)
    return Collective(
        kind,
        "+".join(dict.fromkeys(dtype for dtype, _ in arrays)),
        group,
        nbytes,
        reducers.get(to_apply[1], "unknown") if to_apply else "",
        LAYER_SCOPE in rest,
    )


def _payload(kind: str, start: bool, result: str) -> list[_Array]:
    """The result's arrays; of an asynchronous form that also lists its operands, these left out."""
    arrays = [(dtype, _nbytes(dtype, shape)) for dtype, shape in _ARRAY.findall(result)]
    if not start or kind == "all-reduce" or not result.startswith("("):
        return arrays
    if kind == "collective-permute":  # (operand, result, two counters of 4 bytes)
        return arrays[1:2]
    return arrays[len(arrays) // 2 :]


def _nbytes(dtype: str, shape: str) -> int:
    found = _BITS.search(dtype)
    bits = int(found[0]) if found else 8  # pred
    return prod(int(size) for size in shape.split(",") if size) * bits // 8


def _reducers(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each computation's name, and the operation that its result comes from."""
    name = ""
    for line in lines:
        if found := _COMPUTATION.match(line):
            name = found[1]
        elif found := _ROOT.match(line.strip()):
            yield name, found[1]


def _group_size(attributes: str) -> int:
    """Devices in a replica group, 0 if none is given."""
    groups = attributes.partition("replica_groups=")[2]
    if found := re.match(r"\{\{([\d,]+)\}", groups):  # {{0,1},{2,3}}
        return found[1].count(",") + 1
    if found := re.match(r"\[(\d+),(\d+)\]<=", groups):  # [2,2]<=[4]
        return int(found[2])
    if found := re.match(r"mesh\[(.*?)\] \{(.*?)\}", groups):  # mesh['a'=2,'b'=2] {'b'}
        sizes = dict(axis.split("=") for axis in found[1].split(","))
        return prod(int(sizes[axis]) for axis in found[2].split(","))
    return 0
