# SPDX-License-Identifier: Apache-2.0
"""What tiles of a product are made for: instruction sets' registers, and kinds of operands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

COLUMNS = 32  # of a panel
MOST_ROWS = 12  # of a tile


@dataclass(frozen=True)
class Registers:
    """What an instruction set's registers hold.

    Attributes:
        name: of the instruction set.
        lanes: float32 numbers in one.
        rows: how many rows of a panel have room for their sums. More are taken in parts.
        wide: how many panels few rows take at once, by rows from 1 on. Memory is read faster the
            more of a row of b is read at once.
        streamed: products of so many rows read b as it lies, row by row, and have their sums in
            memory: for a CPU that is slow to read many short pieces of memory.
    """

    name: str
    lanes: int
    rows: int
    wide: Mapping[int, int]
    streamed: int

    @property
    def sums(self) -> str:
        """The type of a register of sums."""
        return f"<{self.lanes} x float>"


AVX512 = Registers(
    "avx512", lanes=16, rows=12, wide={1: 4, 2: 4, 3: 4, 4: 2, 5: 2, 6: 2}, streamed=0
)
AVX2 = Registers("avx2", lanes=8, rows=3, wide={}, streamed=48)


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
    widths = ", ".join(f"i64 {width}" for width in registers.wide.values())
    return f"""
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
declare <8 x float> @llvm.fma.v8f32(<8 x float>, <8 x float>, <8 x float>)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
@streamed.rows = internal constant i64 {registers.streamed}
@wide.rows = internal constant i64 {len(registers.wide)}
@widths = internal constant [{len(registers.wide)} x i64] [{widths}]
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
