# SPDX-License-Identifier: Apache-2.0
"""What tiles of a product are made for: instruction sets' registers, and kinds of operands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

COLUMNS = 32  # of a panel
MOST_ROWS = 12  # of a tile
# `vpunpcklwd` and `vpunpckhwd` interleave the low and the high half of each lane of two rows: these
# are the columns that each of two registers has then.
_LANES = range(0, COLUMNS, 8)
_PAIRED = (
    tuple(lane + i for lane in _LANES for i in range(4)),
    tuple(lane + i for lane in _LANES for i in range(4, 8)),
)


@dataclass(frozen=True)
class Registers:
    """What an instruction set's registers hold.

    Attributes:
        name: of the instruction set.
        lanes: float32 numbers in one.
        rows: how many rows of a panel have room for their sums. More are taken in parts.
        wide: how many panels few rows take at once, by rows, where it is more than one. Memory is
            read faster the more of a row of b is read at once.
        streamed: products of so many rows read b as it lies, row by row, and have their sums in
            memory: short pieces of memory are slow to read, on some CPUs more than on others.
        together: rows of b that are read at once for a product of one row.
        longest: columns that are read in one piece, at most.
    """

    name: str
    lanes: int
    rows: int
    wide: Mapping[int, int]
    streamed: int
    together: int
    longest: int

    @property
    def widths(self) -> list[int]:
        """How many panels are taken at once by 1, 2, ... rows, up to the last that `wide` names."""
        return [self.wide.get(rows, 1) for rows in range(1, max(self.wide, default=0) + 1)]

    @property
    def sums(self) -> str:
        """The type of a register of sums."""
        return f"<{self.lanes} x float>"


AVX512 = Registers(
    "avx512",
    lanes=16,
    rows=12,
    wide={2: 4, 3: 4, 4: 2, 5: 2, 6: 2},
    streamed=1,
    together=16,
    longest=6144,
)
AVX2 = Registers("avx2", lanes=8, rows=3, wide={}, streamed=48, together=8, longest=2048)


@dataclass(frozen=True)
class Kind:
    """What is multiplied, and how.

    Attributes:
        name: of the kind, in the names of functions.
        element: the type of a number of b.
        bytes: of that.
        depth: rows of b that an instruction takes at once, of as many numbers of 4 bytes of a.
        packed: the kind of a chunk of b that was copied, and converted if it is another.
    """

    name: str
    element: str
    bytes: int
    depth: int
    packed: str


FLOAT32 = Kind("float32", "float", bytes=4, depth=1, packed="float32")
# a is float32; b, of bfloat16, is converted to it.
MIXED = Kind("mixed", "bfloat", bytes=2, depth=1, packed="float32")
# Of AVX512-BF16.
BFLOAT16 = Kind("bfloat16", "bfloat", bytes=2, depth=2, packed="bfloat16")


def declarations(registers: Registers) -> str:
    """What tiles and their users call, and constants of an instruction set."""
    widths = ", ".join(f"i64 {width}" for width in registers.widths)
    return f"""
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
declare <8 x float> @llvm.fma.v8f32(<8 x float>, <8 x float>, <8 x float>)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
@streamed.rows = internal constant i64 {registers.streamed}
@longest = internal constant i64 {registers.longest}
@wide.rows = internal constant i64 {len(registers.widths)}
@widths = internal constant [{len(registers.widths)} x i64] [{widths}]
"""


def function(name: str, rows: int, body: Iterator[str]) -> str:
    """A tile of so many rows: y = x + a b, of one panel or so many. Strides are in bytes.

    Rows of b that will be needed next, from `%ahead` on, may be fetched meanwhile.
    """
    return "\n".join(
        [
            f"define internal void @{name}(ptr %a, i64 %a.stride, ptr %b, i64 %b.stride, ptr %x, "
            "i64 %x.stride, ptr %y, i64 %y.stride, i64 %steps, ptr %ahead, i64 %ahead.stride, "
            "i64 %panels) {",
            "entry:",
            *(line for matrix in "axy" for line in _rows(matrix, rows)),
            *body,
            "ret void",
            "}",
        ]
    )


def interleaved(upper: str, lower: str, column: int, first: str, second: str) -> Iterator[str]:
    """Pairs of numbers of two rows of bfloat16, of 32 columns: two operands `%b.operand.NAME`."""
    for i, row in enumerate((upper, lower)):
        yield f"%b.at.{first}.{i} = getelementptr i8, ptr {row}, i64 {2 * column}"
        yield f"%b.row.{first}.{i} = load <32 x i16>, ptr %b.at.{first}.{i}, align 2"
    for name, columns in zip((first, second), _PAIRED, strict=True):
        pairs = [column + COLUMNS * row for column in columns for row in range(2)]
        yield (
            f"%b.bits.{name} = shufflevector <32 x i16> %b.row.{first}.0, "
            f"<32 x i16> %b.row.{first}.1, <32 x i32> {_constants(pairs)}"
        )
        yield f"%b.operand.{name} = bitcast <32 x i16> %b.bits.{name} to <32 x bfloat>"


def added(kind: Kind, registers: Registers, y: str, a: str, b: str, name: str) -> str:
    """Adds the products of operands to sums."""
    sums = registers.sums
    if kind.depth == 1:
        call = f"@llvm.fma.v{registers.lanes}f32({sums} {a}, {sums} {b}, {sums} {y})"
    else:
        pairs = "<32 x bfloat>"
        call = f"@llvm.x86.avx512bf16.dpbf16ps.512({sums} {y}, {pairs} {a}, {pairs} {b})"
    return f"{name} = call {sums} {call}"


def in_order(sums: tuple[str, str], ordered: tuple[str, str]) -> Iterator[str]:
    """Two registers of sums in the order of their columns, from that of pairs."""
    both = [*_PAIRED[0], *_PAIRED[1]]
    for name, columns in zip(ordered, (range(16), range(16, 32)), strict=True):
        order = _constants(both.index(column) for column in columns)
        yield (
            f"{name} = shufflevector <16 x float> {sums[0]}, <16 x float> {sums[1]}, "
            f"<16 x i32> {order}"
        )


def _constants(numbers: Iterable[int]) -> str:
    return "<" + ", ".join(f"i32 {n}" for n in numbers) + ">"


def _rows(name: str, rows: int) -> Iterator[str]:
    """Pointers to the rows of a matrix."""
    for i in range(rows):
        yield f"%{name}.offset.{i} = mul i64 %{name}.stride, {i}"
        yield f"%{name}.row.{i} = getelementptr i8, ptr %{name}, i64 %{name}.offset.{i}"


def register_of_b(
    kind: Kind, registers: Registers, row: str, column: int, name: int | str
) -> Iterator[str]:
    """A register of a row of b, as float32: `%b.operand.NAME`."""
    lanes = registers.lanes
    yield f"%b.at.{name} = getelementptr i8, ptr {row}, i64 {column * kind.bytes}"
    if kind.element == "float":
        yield f"%b.operand.{name} = load {registers.sums}, ptr %b.at.{name}, align 2"
        return
    yield f"%b.short.{name} = load <{lanes} x i16>, ptr %b.at.{name}, align 2"
    yield f"%b.long.{name} = zext <{lanes} x i16> %b.short.{name} to <{lanes} x i32>"
    yield f"%b.bits.{name} = shl <{lanes} x i32> %b.long.{name}, splat (i32 16)"
    yield f"%b.operand.{name} = bitcast <{lanes} x i32> %b.bits.{name} to {registers.sums}"
