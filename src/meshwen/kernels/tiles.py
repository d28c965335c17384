# SPDX-License-Identifier: Apache-2.0
"""LLVM IR of the tiles of a matrix product, for x86 CPUs with AVX2 or AVX-512.

A tile is up to 12 rows and 32 columns of y = x + a b, of few rows more columns, whose sums stay in
registers while k runs over b. In float32 an instruction adds one product to each of a register's
sums, in bfloat16 `vdpbf16ps` two:

    y[m, n] += a[m, k] * b[k, n] + a[m, k + 1] * b[k + 1, n]

It wants the pair of b side by side, where b has it in two rows: they are interleaved in registers,
which costs nothing beside the products, so that b can lie as XLA's own products have it. CPUs
without it multiply bfloat16 as float32, which numbers become in registers, or when they are copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import pairwise

from meshwen.kernels.kinds import (
    COLUMNS,
    MOST_ROWS,
    Kind,
    Registers,
    added,
    function,
    in_order,
    interleaved,
    register_of_b,
)
from meshwen.kernels.streams import stream


def all_tiles(kind: Kind, registers: Registers) -> str:
    """Functions for each number of rows, and what `product.ll` has to know of them."""
    all_rows = range(1, MOST_ROWS + 1)
    narrow = {rows: f"tile_{kind.name}_{rows}_1" for rows in all_rows}
    wide = {
        rows: f"tile_{kind.name}_{rows}_{width}"
        for rows, width in enumerate(registers.widths, start=1)
    }
    streamed = all_rows[: registers.streamed]
    streams = {rows: f"stream_{kind.name}_{rows}" for rows in streamed}
    functions = []
    for rows, name in narrow.items():
        whole = rows <= registers.rows
        body = _loop(kind, registers, rows, 1) if whole else _parts(narrow, registers, rows)
        functions.append(function(name, rows, body))
    for rows, width in registers.wide.items():
        functions.append(function(wide[rows], rows, _loop(kind, registers, rows, width)))
    for rows, name in streams.items():
        functions.append(function(name, rows, stream(kind, registers, rows)))
    for table, names in (("tiles", narrow), ("wide", wide), ("streams", streams)):
        pointers = ", ".join(f"ptr @{name}" for name in names.values())
        functions.append(
            f"@{table}_{kind.name} = internal constant [{len(names)} x ptr] [{pointers}]"
        )
    pack, packed_bytes = ("pack", kind.bytes)
    if kind.packed != kind.name:
        pack, packed_bytes = ("pack_as_float32", 4)
    functions.append(
        f"@kind_{kind.name} = internal constant %Kind {{ i64 {kind.bytes}, i64 {kind.depth}, "
        f"ptr @tiles_{kind.name}, ptr @wide_{kind.name}, ptr @streams_{kind.name}, "
        f"ptr @tiles_{kind.packed}, i64 {packed_bytes}, ptr @{pack} }}"
    )
    return "\n".join(functions)


def _loop(kind: Kind, registers: Registers, rows: int, width: int) -> Iterator[str]:
    """So many panels, with their sums in registers."""
    zero = f"{registers.sums} [ zeroinitializer, %entry ]"
    yield "br label %loop"
    yield "loop:"
    yield "%k = phi i64 [ 0, %entry ], [ %k.next, %loop ]"
    yield f"%b.0 = phi ptr [ %b, %entry ], [ %b.{kind.depth}, %loop ]"
    yield "%ahead.0 = phi ptr [ %ahead, %entry ], [ %ahead.next, %loop ]"
    vectors = width * COLUMNS // registers.lanes
    for i in range(rows):
        for n in range(vectors):
            yield f"%sum.{i}.{n} = phi {zero}, [ %sum.{i}.{n}.next, %loop ]"
    yield from _fetch(kind, width)
    multiply = partial(_multiply, kind, registers)
    if rows < vectors and kind.depth == 1:  # Registers have the fewer operands; of a,
        for i in range(rows):
            yield from _broadcast(kind, registers, i)
        for n in range(vectors):
            yield from register_of_b(kind, registers, "%b.0", n * registers.lanes, n)
            yield from (multiply(i, n) for i in range(rows))
    else:  # or of b.
        for p in range(width):
            yield from _columns_of_b(kind, registers, p)
        for i in range(rows):
            yield from _broadcast(kind, registers, i)
            yield from (multiply(i, n) for n in range(vectors))
    yield "%k.next = add i64 %k, 1"
    yield "%more = icmp ult i64 %k.next, %steps"
    yield "br i1 %more, label %loop, label %end"
    yield "end:"
    for i in range(rows):
        if kind.depth == 2:
            for p in range(width):
                low, high = f"{i}.{2 * p}", f"{i}.{2 * p + 1}"
                sums = f"%sum.{low}.next", f"%sum.{high}.next"
                yield from in_order(sums, (f"%ordered.{low}", f"%ordered.{high}"))
        for n in range(vectors):
            total = f"%ordered.{i}.{n}" if kind.depth == 2 else f"%sum.{i}.{n}.next"
            yield from _store(registers, i, n, total)


def _parts(narrow: Mapping[int, str], registers: Registers, rows: int) -> Iterator[str]:
    """More rows than registers have room for. The first part fetches."""
    count = -(-rows // registers.rows)
    bounds = [i * rows // count for i in range(count + 1)]
    for begin, end in pairwise(bounds):
        ahead = "ptr %b, i64 0" if begin else "ptr %ahead, i64 %ahead.stride"
        yield (
            f"call void @{narrow[end - begin]}(ptr %a.row.{begin}, i64 %a.stride, "
            f"ptr %b, i64 %b.stride, ptr %x.row.{begin}, i64 %x.stride, ptr %y.row.{begin}, "
            f"i64 %y.stride, i64 %steps, {ahead}, i64 1)"
        )


def _fetch(kind: Kind, width: int) -> Iterator[str]:
    """Fetches what lies ahead, and goes on to the next rows."""
    for row in range(kind.depth):
        yield f"%b.{row + 1} = getelementptr i8, ptr %b.{row}, i64 %b.stride"
    if width == 1:
        yield "%ahead.next = getelementptr i8, ptr %ahead.0, i64 %ahead.stride"
        yield "%ahead.other = getelementptr i8, ptr %ahead.0, i64 64"
        yield "call void @llvm.prefetch.p0(ptr %ahead.0, i32 0, i32 2, i32 1)"
        yield "call void @llvm.prefetch.p0(ptr %ahead.other, i32 0, i32 2, i32 1)"
        return
    for row in range(kind.depth):
        name = "next" if row == kind.depth - 1 else row + 1
        yield f"%ahead.{name} = getelementptr i8, ptr %ahead.{row}, i64 %ahead.stride"
        for line in range(width * COLUMNS * kind.bytes // 64):
            yield f"%ahead.{row}.{line} = getelementptr i8, ptr %ahead.{row}, i64 {64 * line}"
            yield f"call void @llvm.prefetch.p0(ptr %ahead.{row}.{line}, i32 0, i32 3, i32 1)"


def _broadcast(kind: Kind, registers: Registers, i: int) -> Iterator[str]:
    """The next 4 bytes of row i of a, in all of a register."""
    bits = f"<{registers.lanes} x i32>"
    operand = registers.sums if kind.depth == 1 else "<32 x bfloat>"
    yield f"%a.at.{i} = getelementptr i32, ptr %a.row.{i}, i64 %k"
    yield f"%a.some.{i} = load i32, ptr %a.at.{i}, align 2"
    yield f"%a.one.{i} = insertelement {bits} poison, i32 %a.some.{i}, i32 0"
    yield f"%a.bits.{i} = shufflevector {bits} %a.one.{i}, {bits} poison, {bits} zeroinitializer"
    yield f"%a.operand.{i} = bitcast {bits} %a.bits.{i} to {operand}"


def _columns_of_b(kind: Kind, registers: Registers, p: int) -> Iterator[str]:
    """The operands b of a panel."""
    if kind.depth == 2:
        yield from interleaved("%b.0", "%b.1", p * COLUMNS, str(2 * p), str(2 * p + 1))
        return
    vectors = COLUMNS // registers.lanes
    for n in range(p * vectors, (p + 1) * vectors):
        yield from register_of_b(kind, registers, "%b.0", n * registers.lanes, n)


def _multiply(kind: Kind, registers: Registers, i: int, n: int) -> str:
    """Adds the products of the next numbers of row i of a to its sums n."""
    y = f"%sum.{i}.{n}"
    return added(kind, registers, y, f"%a.operand.{i}", f"%b.operand.{n}", f"{y}.next")


def _store(registers: Registers, i: int, n: int, total: str) -> Iterator[str]:
    """Adds row i of x to a register of sums, and stores that."""
    sums, offset = registers.sums, 4 * registers.lanes * n
    yield f"%x.at.{i}.{n} = getelementptr i8, ptr %x.row.{i}, i64 {offset}"
    yield f"%before.{i}.{n} = load {sums}, ptr %x.at.{i}.{n}, align 4"
    yield f"%y.{i}.{n} = fadd {sums} %before.{i}.{n}, {total}"
    yield f"%y.at.{i}.{n} = getelementptr i8, ptr %y.row.{i}, i64 {offset}"
    yield f"store {sums} %y.{i}.{n}, ptr %y.at.{i}.{n}, align 4"
