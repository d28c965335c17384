# SPDX-License-Identifier: Apache-2.0
"""LLVM IR of the tiles of a matrix product, for x86 CPUs with AVX2 or AVX-512.

A tile is up to 12 rows and 32 columns of y = x + a b, of few rows twice as many columns, whose sums
stay in registers while k runs over b. In float32 an instruction adds one product to each of a
register's sums, in bfloat16 `vdpbf16ps` two:

    y[m, n] += a[m, k] * b[k, n] + a[m, k + 1] * b[k + 1, n]

It wants the pair of b side by side, and so do weights lie (`meshwen.ops.cpu.panels`). CPUs without
it multiply bfloat16 as float32, which numbers become in registers, or for many rows beforehand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise

from meshwen.ops.cpu.kernels.kinds import (
    CACHED,
    MIXED,
    MOST_ROWS,
    Kind,
    Registers,
    added,
    operand_of_a,
    register_of_b,
)
from meshwen.ops.cpu.panels import COLUMNS


def all_tiles(kind: Kind, registers: Registers) -> str:
    """Functions for each number of rows, and what `product.ll` has to know of them."""
    most = MOST_ROWS if kind in CACHED else registers.rows
    single = {rows: f"tile_{kind.name}_{rows}" for rows in range(1, most + 1)}
    most = 0 if kind is MIXED else registers.paired_rows  # Only weights lie in panels.
    paired = {rows: f"tile_{kind.name}_{rows}_paired" for rows in range(1, most + 1)}
    functions = []
    for rows, name in single.items():
        whole = rows <= registers.rows
        body = _loop(kind, registers, rows, 1) if whole else _parts(single, registers, rows)
        functions.append(_function(name, rows, body))
    for rows, name in paired.items():
        functions.append(_function(name, rows, _loop(kind, registers, rows, 2)))
    for table, names in (("tiles", single), ("paired", paired)):
        pointers = ", ".join(f"ptr @{name}" for name in names.values())
        functions.append(
            f"@{table}_{kind.name} = internal constant [{len(names)} x ptr] [{pointers}]"
        )
    functions.append(
        f"@kind_{kind.name} = internal constant %Kind {{ i64 {kind.bytes}, i64 {4 * kind.factors}, "
        f"i64 {kind.run}, ptr @tiles_{kind.name}, ptr @paired_{kind.name}, ptr {kind.unpack} }}"
    )
    return "\n".join(functions)


def _function(name: str, rows: int, body: Iterator[str]) -> str:
    """A tile of so many rows: y = x + a b, of one panel or two. Strides are in bytes.

    What will be needed next, from `%ahead` on, is fetched meanwhile: 128 bytes each stride. The
    second panel lies `%panel` bytes behind the first.
    """
    return "\n".join(
        [
            f"define internal void @{name}(ptr %a, i64 %a.stride, ptr %b, i64 %b.stride, ptr %x, "
            "i64 %x.stride, ptr %y, i64 %y.stride, i64 %steps, ptr %ahead, i64 %ahead.stride, "
            "i64 %panel) {",
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


def _loop(kind: Kind, registers: Registers, rows: int, panels: int) -> Iterator[str]:
    """So many panels, with their sums in registers."""
    zero = f"{registers.sums} [ zeroinitializer, %entry ]"
    registers_of_b = [(p, n) for p in range(panels) for n in range(COLUMNS // registers.lanes)]
    names = [f"{p}.{n}" for p, n in registers_of_b]
    yield "br label %loop"
    yield "loop:"
    yield "%k = phi i64 [ 0, %entry ], [ %k.next, %loop ]"
    yield "%b.0 = phi ptr [ %b, %entry ], [ %b.next, %loop ]"
    yield "%ahead.0 = phi ptr [ %ahead, %entry ], [ %ahead.next, %loop ]"
    for i in range(rows):
        for name in names:
            yield f"%sum.{i}.{name} = phi {zero}, [ %sum.{i}.{name}.next, %loop ]"
    yield "%b.next = getelementptr i8, ptr %b.0, i64 %b.stride"
    yield "%ahead.next = getelementptr i8, ptr %ahead.0, i64 %ahead.stride"
    yield from _fetch(panels)
    if panels == 2:
        yield "%b.1 = getelementptr i8, ptr %b.0, i64 %panel"
    loads = {}
    for (p, n), name in zip(registers_of_b, names, strict=True):
        offset = n * registers.lanes * kind.bytes
        at = f"%b.at.{name} = getelementptr i8, ptr %b.{p}, i64 {offset}"
        loads[name] = [at, *register_of_b(kind, registers, f"%b.at.{name}", name)]
    broadcasts = [list(_broadcasts(kind, registers, i)) for i in range(rows)]
    products = {
        (i, name): list(_products(kind, registers, i, name)) for i in range(rows) for name in names
    }
    if rows < len(names):  # Registers have the fewer operands; of a,
        yield from (line for lines in broadcasts for line in lines)
        for name in names:
            yield from loads[name]
            yield from (line for i in range(rows) for line in products[i, name])
    else:  # or of b.
        yield from (line for lines in loads.values() for line in lines)
        for i in range(rows):
            yield from broadcasts[i]
            yield from (line for name in names for line in products[i, name])
    yield "%k.next = add i64 %k, 1"
    yield "%more = icmp ult i64 %k.next, %steps"
    yield "br i1 %more, label %loop, label %end"
    yield "end:"
    for i in range(rows):
        for number, name in enumerate(names):
            yield from _store(registers, i, name, number)


def _parts(single: Mapping[int, str], registers: Registers, rows: int) -> Iterator[str]:
    """More rows than registers have room for. The first part fetches."""
    count = -(-rows // registers.rows)
    bounds = [i * rows // count for i in range(count + 1)]
    for begin, end in pairwise(bounds):
        ahead = "ptr %b, i64 0" if begin else "ptr %ahead, i64 %ahead.stride"
        yield (
            f"call void @{single[end - begin]}(ptr %a.row.{begin}, i64 %a.stride, "
            f"ptr %b, i64 %b.stride, ptr %x.row.{begin}, i64 %x.stride, ptr %y.row.{begin}, "
            f"i64 %y.stride, i64 %steps, {ahead}, i64 0)"
        )


def _fetch(panels: int) -> Iterator[str]:
    for p in range(panels):
        if p:
            yield "%ahead.1 = getelementptr i8, ptr %ahead.0, i64 %panel"
        yield f"%ahead.{p}.other = getelementptr i8, ptr %ahead.{p}, i64 64"
        yield f"call void @llvm.prefetch.p0(ptr %ahead.{p}, i32 0, i32 3, i32 1)"
        yield f"call void @llvm.prefetch.p0(ptr %ahead.{p}.other, i32 0, i32 3, i32 1)"


def _broadcasts(kind: Kind, registers: Registers, i: int) -> Iterator[str]:
    """The next numbers of row i of a, each in all of a register."""
    bits = registers.bits
    yield f"%a.step.{i} = mul i64 %k, {4 * kind.factors}"
    for f in range(kind.factors):
        name = f"{i}.{f}"
        yield f"%a.at.{name}.0 = getelementptr i8, ptr %a.row.{i}, i64 %a.step.{i}"
        yield f"%a.at.{name} = getelementptr i8, ptr %a.at.{name}.0, i64 {4 * f}"
        yield f"%a.some.{name} = load i32, ptr %a.at.{name}, align 2"
        yield f"%a.one.{name} = insertelement {bits} poison, i32 %a.some.{name}, i32 0"
        yield (
            f"%a.bits.{name} = shufflevector {bits} %a.one.{name}, {bits} poison, "
            f"{bits} zeroinitializer"
        )
        yield f"%a.{name} = bitcast {bits} %a.bits.{name} to {operand_of_a(kind, registers)}"


def _products(kind: Kind, registers: Registers, i: int, name: str) -> Iterator[str]:
    """Adds the products of the next numbers of row i of a to its sums."""
    sums = f"%sum.{i}.{name}"
    after = [sums, *(f"{sums}.{f}" for f in range(1, kind.factors)), f"{sums}.next"]
    for f in range(kind.factors):
        yield added(kind, registers, after[f], f"%a.{i}.{f}", f"%b.{name}.{f}", after[f + 1])


def _store(registers: Registers, i: int, name: str, number: int) -> Iterator[str]:
    """Adds row i of x to a register of sums, and stores that."""
    sums, offset = registers.sums, 4 * registers.lanes * number
    yield f"%x.at.{i}.{name} = getelementptr i8, ptr %x.row.{i}, i64 {offset}"
    yield f"%before.{i}.{name} = load {sums}, ptr %x.at.{i}.{name}, align 4"
    yield f"%y.{i}.{name} = fadd {sums} %before.{i}.{name}, %sum.{i}.{name}.next"
    yield f"%y.at.{i}.{name} = getelementptr i8, ptr %y.row.{i}, i64 {offset}"
    yield f"store {sums} %y.{i}.{name}, ptr %y.at.{i}.{name}, align 4"
