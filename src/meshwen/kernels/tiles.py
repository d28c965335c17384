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

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import pairwise

from meshwen.kernels.kinds import COLUMNS, MOST_ROWS, Kind, Registers, function, register_of_b
from meshwen.kernels.streams import stream

# `vpunpcklwd` and `vpunpckhwd` interleave the low and the high half of each lane of two rows: these
# are the columns that each of two registers has then.
_LANES = range(0, COLUMNS, 8)
_PAIRED = (
    tuple(lane + i for lane in _LANES for i in range(4)),
    tuple(lane + i for lane in _LANES for i in range(4, 8)),
)


def all_tiles(kind: Kind, registers: Registers) -> str:
    """Functions for each number of rows, and what `product.ll` has to know of them."""
    all_rows = range(1, MOST_ROWS + 1)
    narrow = {rows: f"tile_{kind.name}_{rows}_1" for rows in all_rows}
    wide = {rows: f"tile_{kind.name}_{rows}_{width}" for rows, width in registers.wide.items()}
    streams = {rows: f"stream_{kind.name}_{rows}" for rows in all_rows if registers.streamed}
    functions = []
    for rows, name in narrow.items():
        whole = rows <= registers.rows
        body = _loop(kind, registers, rows, 1) if whole else _parts(narrow, registers, rows)
        functions.append(function(name, rows, body))
    for rows, name in wide.items():
        functions.append(function(name, rows, _loop(kind, registers, rows, registers.wide[rows])))
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
            yield from (line for p in range(width) for line in _in_order(i, p))
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
        yield from _interleaved(kind, p)
        return
    vectors = COLUMNS // registers.lanes
    for n in range(p * vectors, (p + 1) * vectors):
        yield from register_of_b(kind, registers, "%b.0", n * registers.lanes, n)


def _interleaved(kind: Kind, p: int) -> Iterator[str]:
    """The two operands b of a panel, of pairs of rows."""
    for row in range(2):
        offset = p * COLUMNS * kind.bytes
        yield f"%b.at.{p}.{row} = getelementptr i8, ptr %b.{row}, i64 {offset}"
        yield f"%b.row.{p}.{row} = load <32 x i16>, ptr %b.at.{p}.{row}, align 2"
    for half, columns in enumerate(_PAIRED):
        pairs = [column + COLUMNS * row for column in columns for row in range(2)]
        n = 2 * p + half
        yield (
            f"%b.bits.{n} = shufflevector <32 x i16> %b.row.{p}.0, <32 x i16> %b.row.{p}.1, "
            f"<32 x i32> {_constants(pairs)}"
        )
        yield f"%b.operand.{n} = bitcast <32 x i16> %b.bits.{n} to <32 x bfloat>"


def _multiply(kind: Kind, registers: Registers, i: int, n: int) -> str:
    """Adds the products of the next numbers of row i of a to its sums n."""
    sums = registers.sums
    y, a, b = f"%sum.{i}.{n}", f"%a.operand.{i}", f"%b.operand.{n}"
    if kind.depth == 1:
        call = f"@llvm.fma.v{registers.lanes}f32({sums} {a}, {sums} {b}, {sums} {y})"
    else:
        pairs = "<32 x bfloat>"
        call = f"@llvm.x86.avx512bf16.dpbf16ps.512({sums} {y}, {pairs} {a}, {pairs} {b})"
    return f"{y}.next = call {sums} {call}"


def _in_order(i: int, p: int) -> Iterator[str]:
    """The sums of a panel in the order of their columns, from that of pairs."""
    low, high = 2 * p, 2 * p + 1
    both = [*_PAIRED[0], *_PAIRED[1]]
    for n, columns in ((low, range(16)), (high, range(16, 32))):
        order = _constants(both.index(column) for column in columns)
        yield (
            f"%ordered.{i}.{n} = shufflevector <16 x float> %sum.{i}.{low}.next, "
            f"<16 x float> %sum.{i}.{high}.next, <16 x i32> {order}"
        )


def _store(registers: Registers, i: int, n: int, total: str) -> Iterator[str]:
    """Adds row i of x to a register of sums, and stores that."""
    sums, offset = registers.sums, 4 * registers.lanes * n
    yield f"%x.at.{i}.{n} = getelementptr i8, ptr %x.row.{i}, i64 {offset}"
    yield f"%before.{i}.{n} = load {sums}, ptr %x.at.{i}.{n}, align 4"
    yield f"%y.{i}.{n} = fadd {sums} %before.{i}.{n}, {total}"
    yield f"%y.at.{i}.{n} = getelementptr i8, ptr %y.row.{i}, i64 {offset}"
    yield f"store {sums} %y.{i}.{n}, ptr %y.at.{i}.{n}, align 4"


def _constants(numbers: Iterable[int]) -> str:
    return "<" + ", ".join(f"i32 {n}" for n in numbers) + ">"
