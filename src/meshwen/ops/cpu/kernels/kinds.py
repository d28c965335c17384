# SPDX-License-Identifier: Apache-2.0
"""What tiles of a product are made for: instruction sets' registers, and kinds of operands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

MOST_ROWS = 12  # that attention takes at once


@dataclass(frozen=True)
class Registers:
    """What an instruction set's registers hold.

    Attributes:
        name: of the instruction set.
        lanes: float32 numbers in one.
        rows: how many rows of a panel have room for their sums. More are taken in parts.
        paired_rows: up to so many rows take two panels at once: memory is read faster in two
            places than in one.
    """

    name: str
    lanes: int
    rows: int
    paired_rows: int

    @property
    def sums(self) -> str:
        """The type of a register of sums."""
        return f"<{self.lanes} x float>"

    @property
    def bits(self) -> str:
        """The same register of integers."""
        return f"<{self.lanes} x i32>"


AVX512 = Registers("avx512", lanes=16, rows=12, paired_rows=6)
AVX2 = Registers("avx2", lanes=8, rows=3, paired_rows=1)


@dataclass(frozen=True)
class Kind:
    """What is multiplied, and how. A step of a tile takes some rows of b at once.

    Attributes:
        name: of the kind, in the names of functions.
        bytes: of a column of b in a step.
        factors: numbers of 4 bytes of a row of a in a step, each multiplied with all columns.
        run: steps that are summed by themselves.
        unpack: what makes float32 of some steps of b for many rows, or "null".
    """

    name: str
    bytes: int
    factors: int
    run: int
    unpack: str = "null"


FLOAT32 = Kind("float32", bytes=4, factors=1, run=128)
# Of AVX512-BF16: both are pairs of bfloat16.
BFLOAT16 = Kind("bfloat16", bytes=4, factors=1, run=128)
# a is float32; b, pairs of bfloat16, is converted to it.
PAIRS = Kind("pairs", bytes=4, factors=2, run=64, unpack="@unpack")
# The same of single ones, as the KV cache has them.
MIXED = Kind("mixed", bytes=2, factors=1, run=128)
CACHED = (FLOAT32, MIXED)  # what attention multiplies


def declarations(registers: Registers) -> str:
    """What tiles and their users call, and constants of an instruction set."""
    return f"""
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
declare <8 x float> @llvm.fma.v8f32(<8 x float>, <8 x float>, <8 x float>)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
@tile.rows = internal constant i64 {registers.rows}
@paired.rows = internal constant i64 {registers.paired_rows}
"""


def register_of_b(kind: Kind, registers: Registers, at: str, name: str) -> Iterator[str]:
    """The operands of a register of columns of b: `%b.NAME.0`, and `%b.NAME.1` of the next row."""
    sums, bits = registers.sums, registers.bits
    if kind is FLOAT32:
        yield f"%b.{name}.0 = load {sums}, ptr {at}, align 2"
    elif kind is MIXED:
        short = f"<{registers.lanes} x i16>"
        yield f"%b.{name}.short = load {short}, ptr {at}, align 2"
        yield f"%b.{name}.long = zext {short} %b.{name}.short to {bits}"
        yield f"%b.{name}.bits = shl {bits} %b.{name}.long, splat (i32 16)"
        yield f"%b.{name}.0 = bitcast {bits} %b.{name}.bits to {sums}"
    elif kind is BFLOAT16:
        yield f"%b.{name}.0 = load <32 x bfloat>, ptr {at}, align 64"
    else:
        yield f"%b.{name}.both = load {bits}, ptr {at}, align 32"
        yield f"%b.{name}.low = shl {bits} %b.{name}.both, splat (i32 16)"
        yield f"%b.{name}.high = and {bits} %b.{name}.both, splat (i32 -65536)"
        yield f"%b.{name}.0 = bitcast {bits} %b.{name}.low to {sums}"
        yield f"%b.{name}.1 = bitcast {bits} %b.{name}.high to {sums}"


def added(kind: Kind, registers: Registers, y: str, a: str, b: str, name: str) -> str:
    """Adds the products of operands to sums."""
    sums = registers.sums
    if kind is BFLOAT16:
        pairs = "<32 x bfloat>"
        call = f"@llvm.x86.avx512bf16.dpbf16ps.512({sums} {y}, {pairs} {a}, {pairs} {b})"
    else:
        call = f"@llvm.fma.v{registers.lanes}f32({sums} {a}, {sums} {b}, {sums} {y})"
    return f"{name} = call {sums} {call}"


def operand_of_a(kind: Kind, registers: Registers) -> str:
    """The type of a number of a in all of a register."""
    return "<32 x bfloat>" if kind is BFLOAT16 else registers.sums
