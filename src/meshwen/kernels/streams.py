# SPDX-License-Identifier: Apache-2.0
"""LLVM IR of tiles that stream: any number of columns, whose sums stay in the nearest cache.

A tile whose sums stay in registers reads short pieces of many rows of b. CPUs read those more
slowly than long ones (Zen 3 11 against 22 GB/s, Zen 4 22 against 28), and few rows of a leave
nothing to do meanwhile. So some rows of b are read along their length at once, and added to all
sums.
"""

from __future__ import annotations

from collections.abc import Iterator

from meshwen.kernels.kinds import Kind, Registers, added, in_order, interleaved, register_of_b


def stream(kind: Kind, registers: Registers, rows: int) -> Iterator[str]:
    """Any number of panels. Some rows of b at a time are added to the sums, which are in memory."""
    together = (registers.together if rows == 1 else 4) // kind.depth
    lanes = registers.lanes
    yield "%columns = mul i64 %panels, 32"
    yield f"%count = mul i64 %columns, {rows}"
    yield "%sums = alloca float, i64 %count, align 64"
    yield "%bytes = mul i64 %count, 4"
    yield "call void @llvm.memset.p0.i64(ptr align 64 %sums, i8 0, i64 %bytes, i1 false)"
    for i in range(rows):
        yield f"%sums.offset.{i} = mul i64 %columns, {i}"
        yield f"%sums.row.{i} = getelementptr float, ptr %sums, i64 %sums.offset.{i}"
    yield f"%steps.rest = urem i64 %steps, {together}"
    yield "%steps.whole = sub i64 %steps, %steps.rest"
    yield from _stream_steps(kind, registers, rows, "many", together, "0", "%steps.whole")
    yield from _stream_steps(kind, registers, rows, "one", 1, "%steps.whole", "%steps")
    # Zeros have no stride, and are no more than a panel.
    yield "%none = icmp eq i64 %x.stride, 0"
    vectors = kind.depth  # A panel, where sums are in the order of pairs.
    yield f"%x.step = select i1 %none, i64 0, i64 {vectors * lanes}"
    yield "br label %store"
    yield "store:"
    yield "%j = phi i64 [ 0, %one.end ], [ %j.next, %store ]"
    yield "%x.j = phi i64 [ 0, %one.end ], [ %x.next, %store ]"
    for i in range(rows):
        yield from _stored_row(kind, registers, i)
    yield f"%j.next = add i64 %j, {vectors * lanes}"
    yield "%x.next = add i64 %x.j, %x.step"
    yield "%more = icmp ult i64 %j.next, %columns"
    yield "br i1 %more, label %store, label %end"
    yield "end:"


def _stored_row(kind: Kind, registers: Registers, i: int) -> Iterator[str]:
    """Adds some of row i of x to its sums, and stores them."""
    sums = registers.sums
    for name, at, index in (
        ("sum", f"%sums.row.{i}", "%j"),
        ("x", f"%x.row.{i}", "%x.j"),
        ("y", f"%y.row.{i}", "%j"),
    ):
        yield f"%{name}.at.{i} = getelementptr float, ptr {at}, i64 {index}"
        for n in range(kind.depth):
            offset = n * registers.lanes
            yield f"%{name}.at.{i}.{n} = getelementptr float, ptr %{name}.at.{i}, i64 {offset}"
    for n in range(kind.depth):
        yield f"%sum.{i}.{n} = load {sums}, ptr %sum.at.{i}.{n}, align 32"
    if kind.depth == 2:
        yield from in_order((f"%sum.{i}.0", f"%sum.{i}.1"), (f"%sums.{i}.0", f"%sums.{i}.1"))
    for n in range(kind.depth):
        found = f"%sums.{i}.{n}" if kind.depth == 2 else f"%sum.{i}.{n}"
        yield f"%before.{i}.{n} = load {sums}, ptr %x.at.{i}.{n}, align 4"
        yield f"%total.{i}.{n} = fadd {sums} %before.{i}.{n}, {found}"
        yield f"store {sums} %total.{i}.{n}, ptr %y.at.{i}.{n}, align 4"


def _stream_steps(
    kind: Kind, registers: Registers, rows: int, name: str, together: int, begin: str, end: str
) -> Iterator[str]:
    """Adds steps `begin` to `end` to all sums, so many at once."""
    yield f"br label %{name}.begin"
    yield f"{name}.begin:"
    yield f"%{name}.some = icmp ult i64 {begin}, {end}"
    yield f"br i1 %{name}.some, label %{name}.rows, label %{name}.end"
    yield f"{name}.rows:"
    yield f"%{name}.k = phi i64 [ {begin}, %{name}.begin ], [ %{name}.k.next, %{name}.rows.end ]"
    yield f"%{name}.row = mul i64 %{name}.k, {kind.depth}"
    yield f"%{name}.offset = mul i64 %{name}.row, %b.stride"
    yield f"%{name}.b.0 = getelementptr i8, ptr %b, i64 %{name}.offset"
    for r in range(1, together * kind.depth):
        yield f"%{name}.b.{r} = getelementptr i8, ptr %{name}.b.{r - 1}, i64 %b.stride"
    yield f"br label %{name}.columns"
    yield f"{name}.columns:"
    yield f"%{name}.j = phi i64 [ 0, %{name}.rows ], [ %{name}.j.next, %{name}.columns ]"
    yield f"%{name}.j.bytes = mul i64 %{name}.j, {kind.bytes}"
    vectors = 1 if rows == 1 and kind.depth == 1 else 2
    for r in range(together * kind.depth):
        yield f"%{name}.b.at.{r} = getelementptr i8, ptr %{name}.b.{r}, i64 %{name}.j.bytes"
    for r in range(together):
        if kind.depth == 2:
            upper, lower = (f"%{name}.b.at.{2 * r + i}" for i in range(2))
            yield from interleaved(upper, lower, 0, f"{name}.{r}.0", f"{name}.{r}.1")
            continue
        for n in range(vectors):
            at, offset = f"%{name}.b.at.{r}", n * registers.lanes
            yield from register_of_b(kind, registers, at, offset, f"{name}.{r}.{n}")
    for i in range(rows):
        yield from _stream_row(kind, registers, i, name, together, vectors)
    yield f"%{name}.j.next = add i64 %{name}.j, {vectors * registers.lanes}"
    yield f"%{name}.more.columns = icmp ult i64 %{name}.j.next, %columns"
    yield f"br i1 %{name}.more.columns, label %{name}.columns, label %{name}.rows.end"
    yield f"{name}.rows.end:"
    yield f"%{name}.k.next = add i64 %{name}.k, {together}"
    yield f"%{name}.more.rows = icmp ult i64 %{name}.k.next, {end}"
    yield f"br i1 %{name}.more.rows, label %{name}.rows, label %{name}.end"
    yield f"{name}.end:"


def _stream_row(
    kind: Kind, registers: Registers, i: int, name: str, together: int, vectors: int
) -> Iterator[str]:
    """Adds some rows of b to some sums of row i."""
    sums, lanes = registers.sums, registers.lanes
    yield f"%{name}.sums.at.{i} = getelementptr float, ptr %sums.row.{i}, i64 %{name}.j"
    for n in range(vectors):
        at = f"%{name}.sum.at.{i}.{n}"
        yield f"{at} = getelementptr float, ptr %{name}.sums.at.{i}, i64 {n * lanes}"
        yield f"%{name}.sum.{i}.{n}.0 = load {sums}, ptr {at}, align 32"
    for r in range(together):
        a = f"%{name}.a.{i}.{r}"
        yield f"{a}.k = add i64 %{name}.k, {r}"
        yield f"{a}.at = getelementptr float, ptr %a.row.{i}, i64 {a}.k"
        yield f"{a} = load float, ptr {a}.at, align 4"
        yield f"{a}.one = insertelement {sums} poison, float {a}, i32 0"
        zeros = f"<{lanes} x i32> zeroinitializer"
        yield f"{a}.all = shufflevector {sums} {a}.one, {sums} poison, {zeros}"
        if kind.depth == 2:
            yield f"{a}.operand = bitcast {sums} {a}.all to <32 x bfloat>"
        for n in range(vectors):
            sum_, b = f"%{name}.sum.{i}.{n}", f"%b.operand.{name}.{r}.{n}"
            operand = f"{a}.operand" if kind.depth == 2 else f"{a}.all"
            yield added(kind, registers, f"{sum_}.{r}", operand, b, f"{sum_}.{r + 1}")
    for n in range(vectors):
        yield f"store {sums} %{name}.sum.{i}.{n}.{together}, ptr %{name}.sum.at.{i}.{n}, align 32"
