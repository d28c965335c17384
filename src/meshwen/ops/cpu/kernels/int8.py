# SPDX-License-Identifier: Apache-2.0
"""LLVM IR of the tiles of products with int8 weights, which `int8.ll` calls.

A step of a tile multiplies 4 numbers of a row of a, quantised, with 4 of each of 32 columns of b,
which lie next to one another. 8 steps are a group, whose sum of integers is exact: 32 products of
at most 127 x 127.

Instructions multiply unsigned with signed bytes. `vpdpbusd` does and adds all of a step at once: b
gets 128 added, and sums begin with what that is too much. `vpmaddubsw`, of AVX2, adds two products
in 16 bits: b loses its sign, which a gets, so that they do not overflow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from meshwen.ops.cpu.panels import COLUMNS, STEP
from meshwen.ops.quant.int8 import GROUP


@dataclass(frozen=True)
class Dots:
    """Instructions that multiply bytes.

    Attributes:
        name: of them.
        lanes: sums in a register.
        rows: how many rows of a a tile has at most.
        adds: whether one instruction multiplies and adds up a step (`vpdpbusd`).
    """

    name: str
    lanes: int
    rows: int
    adds: bool


VNNI_512 = Dots("avx512_vnni", lanes=16, rows=6, adds=True)
VNNI_256 = Dots("avx_vnni", lanes=8, rows=3, adds=True)
AVX2 = Dots("avx2", lanes=8, rows=3, adds=False)


def int8_tiles(dots: Dots) -> str:
    """Functions for each number of rows, and what `int8.ll` has to know of them."""
    names = {rows: f"int8_tile_{rows}" for rows in range(1, dots.rows + 1)}
    pointers = ", ".join(f"ptr @{name}" for name in names.values())
    return "\n".join(
        [
            *(_tile(dots, name, rows) for rows, name in names.items()),
            f"@int8.rows = internal constant i64 {dots.rows}",
            f"@int8.tiles = internal constant [{dots.rows} x ptr] [{pointers}]",
            """
declare <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32>, <16 x i32>, <16 x i32>)
declare <8 x i32> @llvm.x86.avx512.vpdpbusd.256(<8 x i32>, <8 x i32>, <8 x i32>)
declare <32 x i8> @llvm.abs.v32i8(<32 x i8>, i1)
declare <32 x i8> @llvm.x86.avx2.psign.b(<32 x i8>, <32 x i8>)
declare <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8>, <32 x i8>)
declare <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16>, <16 x i16>)
""",
        ]
    )


def _tile(dots: Dots, name: str, rows: int) -> str:
    """y = a b of so many rows and 32 columns."""
    vectors = range(COLUMNS // dots.lanes)
    ints, floats = f"<{dots.lanes} x i32>", f"<{dots.lanes} x float>"
    pairs = [(i, n) for i in range(rows) for n in vectors]
    lines = [
        f"define internal void @{name}(ptr %a, ptr %a.scales, ptr %corrections, ptr %b, "
        "ptr %b.scales, ptr %y, i64 %y.stride, i64 %groups) {",
        "entry:",
        f"%a.stride = mul i64 %groups, {GROUP}",
        "br label %group",
        "group:",
        "%g = phi i64 [ 0, %entry ], [ %g.next, %group ]",
        *(
            f"%total.{i}.{n} = phi {floats} [ zeroinitializer, %entry ], "
            f"[ %total.{i}.{n}.next, %group ]"
            for i, n in pairs
        ),
        f"%a.offset = mul i64 %g, {GROUP}",
        f"%b.offset = mul i64 %g, {GROUP * COLUMNS}",
        "%b.group = getelementptr i8, ptr %b, i64 %b.offset",
        f"%b.scales.offset = mul i64 %g, {2 * COLUMNS}",
        "%b.scales.group = getelementptr i8, ptr %b.scales, i64 %b.scales.offset",
    ]
    if rows == 1:
        lines += _fetch()
    for i in range(rows):
        lines += _row(dots, i)
    for step in range(GROUP // STEP):
        lines += _step(dots, rows, step)
    for n in vectors:
        lines += _scales_of_b(dots, n)
    for i, n in pairs:
        total = f"%total.{i}.{n}"
        lines += [
            f"%float.{i}.{n} = sitofp {ints} %sum.{i}.{n}.{GROUP // STEP} to {floats}",
            f"%scaled.{i}.{n} = fmul {floats} %float.{i}.{n}, %b.scale.{n}",
            f"{total}.next = call {floats} @llvm.fma.v{dots.lanes}f32({floats} %scaled.{i}.{n}, "
            f"{floats} %a.scale.{i}, {floats} {total})",
        ]
    lines += [
        "%g.next = add i64 %g, 1",
        "%more = icmp ult i64 %g.next, %groups",
        "br i1 %more, label %group, label %end",
        "end:",
    ]
    for i, n in pairs:
        at = f"%y.at.{i}.{n}"
        lines += [
            f"{at}.row = mul i64 %y.stride, {i}",
            f"{at}.offset = add i64 {at}.row, {4 * dots.lanes * n}",
            f"{at} = getelementptr i8, ptr %y, i64 {at}.offset",
            f"store {floats} %total.{i}.{n}.next, ptr {at}, align 4",
        ]
    return "\n".join([*lines, "ret void", "}"])


def _fetch() -> Iterator[str]:
    """Fetches a group of the next page of memory, where processors do not look ahead themselves.

    One row waits for memory alone: it takes 5% less time so (Zen 4). More rows do not.
    """
    for line in range(GROUP * COLUMNS // 64):
        yield f"%ahead.{line} = getelementptr i8, ptr %b.group, i64 {4096 + 64 * line}"
        yield f"call void @llvm.prefetch.p0(ptr %ahead.{line}, i32 0, i32 2, i32 1)"


def _row(dots: Dots, i: int) -> Iterator[str]:
    """A group of row i of a, its scale, and what its sums begin with."""
    yield f"%a.row.{i} = mul i64 %a.stride, {i}"
    yield f"%a.at.{i} = add i64 %a.row.{i}, %a.offset"
    yield f"%a.group.{i} = getelementptr i8, ptr %a, i64 %a.at.{i}"
    yield f"%group.row.{i} = mul i64 %groups, {i}"
    yield f"%group.{i} = add i64 %group.row.{i}, %g"
    yield f"%a.scale.at.{i} = getelementptr float, ptr %a.scales, i64 %group.{i}"
    yield f"%a.scale.number.{i} = load float, ptr %a.scale.at.{i}"
    yield from _broadcast(dots, "float", f"%a.scale.number.{i}", f"%a.scale.{i}")
    yield f"%correction.at.{i} = getelementptr i32, ptr %corrections, i64 %group.{i}"
    yield f"%correction.number.{i} = load i32, ptr %correction.at.{i}"
    begin = f"%correction.number.{i}" if dots.adds else "0"
    for n in range(COLUMNS // dots.lanes):
        yield from _broadcast(dots, "i32", begin, f"%sum.{i}.{n}.0")


def _step(dots: Dots, rows: int, step: int) -> Iterator[str]:
    """Adds the products of 4 numbers of each row of a to its sums."""
    ints, some = f"<{dots.lanes} x i32>", f"<{4 * dots.lanes} x i8>"
    for n in range(COLUMNS // dots.lanes):
        at, offset = f"%b.at.{step}.{n}", COLUMNS * STEP * step + STEP * dots.lanes * n
        yield f"{at} = getelementptr i8, ptr %b.group, i64 {offset}"
        yield f"%b.signed.{step}.{n} = load {some}, ptr {at}, align {STEP}"
        if dots.adds:
            yield f"%b.more.{step}.{n} = xor {some} %b.signed.{step}.{n}, splat (i8 -128)"
            yield f"%b.{step}.{n} = bitcast {some} %b.more.{step}.{n} to {ints}"
        else:
            yield f"%b.{step}.{n} = call {some} @llvm.abs.v32i8({some} %b.signed.{step}.{n}, i1 0)"
    for i in range(rows):
        yield f"%a.at.{step}.{i} = getelementptr i8, ptr %a.group.{i}, i64 {STEP * step}"
        yield f"%a.some.{step}.{i} = load i32, ptr %a.at.{step}.{i}, align 4"
        yield from _broadcast(dots, "i32", f"%a.some.{step}.{i}", f"%a.{step}.{i}")
        if not dots.adds:
            yield f"%a.bytes.{step}.{i} = bitcast {ints} %a.{step}.{i} to {some}"
        for n in range(COLUMNS // dots.lanes):
            yield from _multiply(dots, step, i, n)


def _multiply(dots: Dots, step: int, i: int, n: int) -> Iterator[str]:
    ints, some = f"<{dots.lanes} x i32>", f"<{4 * dots.lanes} x i8>"
    before, after = f"%sum.{i}.{n}.{step}", f"%sum.{i}.{n}.{step + 1}"
    if dots.adds:
        yield (
            f"{after} = call {ints} @llvm.x86.avx512.vpdpbusd.{32 * dots.lanes}({ints} {before}, "
            f"{ints} %b.{step}.{n}, {ints} %a.{step}.{i})"
        )
        return
    name = f"{step}.{i}.{n}"
    yield (
        f"%turned.{name} = call {some} @llvm.x86.avx2.psign.b({some} %a.bytes.{step}.{i}, "
        f"{some} %b.signed.{step}.{n})"
    )
    yield (
        f"%two.{name} = call <16 x i16> @llvm.x86.avx2.pmadd.ub.sw({some} %b.{step}.{n}, "
        f"{some} %turned.{name})"
    )
    yield (
        f"%four.{name} = call {ints} @llvm.x86.avx2.pmadd.wd(<16 x i16> %two.{name}, "
        "<16 x i16> splat (i16 1))"
    )
    yield f"{after} = add {ints} {before}, %four.{name}"


def _scales_of_b(dots: Dots, n: int) -> Iterator[str]:
    """A register of scales, bfloat16 in memory."""
    lanes = dots.lanes
    yield f"%b.scale.at.{n} = getelementptr i8, ptr %b.scales.group, i64 {2 * lanes * n}"
    yield f"%b.scale.short.{n} = load <{lanes} x i16>, ptr %b.scale.at.{n}, align 2"
    yield f"%b.scale.long.{n} = zext <{lanes} x i16> %b.scale.short.{n} to <{lanes} x i32>"
    yield f"%b.scale.bits.{n} = shl <{lanes} x i32> %b.scale.long.{n}, splat (i32 16)"
    yield f"%b.scale.{n} = bitcast <{lanes} x i32> %b.scale.bits.{n} to <{lanes} x float>"


def _broadcast(dots: Dots, kind: str, number: str, name: str) -> Iterator[str]:
    """A number in all of a register."""
    register = f"<{dots.lanes} x {kind}>"
    yield f"{name}.one = insertelement {register} poison, {kind} {number}, i32 0"
    yield (
        f"{name} = shufflevector {register} {name}.one, {register} poison, "
        f"<{dots.lanes} x i32> zeroinitializer"
    )
