# SPDX-License-Identifier: Apache-2.0
"""LLVM IR of the tiles of a bfloat16 matrix product, for x86 CPUs with AVX512-BF16.

A tile is up to 12 rows and 32 columns of y = a b, whose sums stay in registers while k runs over
all of b. The instruction `vdpbf16ps` adds two products to each of 16 sums:

    y[m, n] += a[m, k] * b[k, n] + a[m, k + 1] * b[k + 1, n]

It wants the pair of b side by side, where b has it in two rows: they are interleaved in registers,
which costs nothing beside the products, so that b can lie as XLA's own products have it.
"""

from __future__ import annotations

from collections.abc import Iterator

COLUMNS = 32  # of a tile: the bfloat16 numbers in a register
MOST_ROWS = 12  # of a tile: 24 of the 32 registers then hold sums

_LANES = range(0, COLUMNS, 8)
# `vpunpcklwd` and `vpunpckhwd`: the low and the high half of each lane of two rows, interleaved.
_LOW = [lane + i // 2 + COLUMNS * (i % 2) for lane in _LANES for i in range(8)]
_HIGH = [i + 4 for i in _LOW]
# They have columns 0-3, 8-11, ... and 4-7, 12-15, ...: this puts their sums in order.
_ORDERED = [lane // 2 + i % 4 + 16 * (i // 4) for lane in _LANES for i in range(8)]

_DECLARATIONS = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
"""


def tiles() -> str:
    """A function for each number of rows, and a table of pointers to them."""
    rows = range(1, MOST_ROWS + 1)
    pointers = ", ".join(f"ptr @tile_{n}" for n in rows)
    table = f"@tiles = internal constant [{MOST_ROWS} x ptr] [{pointers}]"
    return "\n".join([_DECLARATIONS, *map(_tile, rows), table])


def _tile(rows: int) -> str:
    """A tile of so many rows; strides, and `%ahead` to what will be needed next, are in bytes."""
    sums = [f"%sum.{i}.{half}" for i in range(rows) for half in range(2)]
    lines = [
        f"define internal void @tile_{rows}(ptr %a, i64 %a.stride, ptr %b, i64 %b.stride,"
        " ptr %y, i64 %y.stride, i64 %pairs, i64 %ahead) {",
        "entry:",
        *_rows("a", rows),
        *_rows("y", rows),
        "br label %loop",
        "loop:",
        "%k = phi i64 [ 0, %entry ], [ %k.next, %loop ]",
        "%b.0 = phi ptr [ %b, %entry ], [ %b.next, %loop ]",
        *(f"{s} = phi <16 x float> [ zeroinitializer, %entry ], [ {s}.next, %loop ]" for s in sums),
        "%b.1 = getelementptr i8, ptr %b.0, i64 %b.stride",
        "%b.next = getelementptr i8, ptr %b.1, i64 %b.stride",
        *_pairs_of_b(),
        *(line for i in range(rows) for line in _products(i)),
        "%k.next = add i64 %k, 1",
        "%more = icmp ult i64 %k.next, %pairs",
        "br i1 %more, label %loop, label %end",
        "end:",
        *(line for i in range(rows) for line in _store(i)),
        "ret void",
        "}",
    ]
    return "\n".join(lines)


def _rows(name: str, rows: int) -> Iterator[str]:
    """Pointers to the rows of a matrix."""
    for i in range(rows):
        yield f"%{name}.offset.{i} = mul i64 %{name}.stride, {i}"
        yield f"%{name}.row.{i} = getelementptr i8, ptr %{name}, i64 %{name}.offset.{i}"


def _pairs_of_b() -> Iterator[str]:
    """Interleaves two rows of b, and fetches what lies ahead of them."""
    for row in range(2):
        yield f"%b.row.{row} = load <32 x i16>, ptr %b.{row}, align 2"
        yield f"%b.ahead.{row} = getelementptr i8, ptr %b.{row}, i64 %ahead"
        yield f"call void @llvm.prefetch.p0(ptr %b.ahead.{row}, i32 0, i32 2, i32 1)"
    for half, order in enumerate((_LOW, _HIGH)):
        yield (
            f"%b.bits.{half} = shufflevector <32 x i16> %b.row.0, <32 x i16> %b.row.1, "
            f"<32 x i32> {_constants(order)}"
        )
        yield f"%b.pairs.{half} = bitcast <32 x i16> %b.bits.{half} to <32 x bfloat>"


def _products(i: int) -> Iterator[str]:
    """Adds the products of a pair of numbers in row i of a."""
    yield f"%a.at.{i} = getelementptr i32, ptr %a.row.{i}, i64 %k"
    yield f"%a.pair.{i} = load i32, ptr %a.at.{i}, align 2"
    yield f"%a.one.{i} = insertelement <16 x i32> poison, i32 %a.pair.{i}, i32 0"
    yield (
        f"%a.bits.{i} = shufflevector <16 x i32> %a.one.{i}, <16 x i32> poison, "
        "<16 x i32> zeroinitializer"
    )
    yield f"%a.pairs.{i} = bitcast <16 x i32> %a.bits.{i} to <32 x bfloat>"
    for half in range(2):
        yield (
            f"%sum.{i}.{half}.next = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x "
            f"float> %sum.{i}.{half}, <32 x bfloat> %a.pairs.{i}, <32 x bfloat> %b.pairs.{half})"
        )


def _store(i: int) -> Iterator[str]:
    """Stores the sums of row i in the order of their columns."""
    yield (
        f"%ordered.{i} = shufflevector <16 x float> %sum.{i}.0.next, "
        f"<16 x float> %sum.{i}.1.next, <32 x i32> {_constants(_ORDERED)}"
    )
    yield f"store <32 x float> %ordered.{i}, ptr %y.row.{i}, align 4"


def _constants(numbers: list[int]) -> str:
    return "<" + ", ".join(f"i32 {n}" for n in numbers) + ">"
