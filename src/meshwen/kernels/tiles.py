# SPDX-License-Identifier: Apache-2.0
"""LLVM IR of the tiles of a matrix product, for x86 CPUs with AVX-512.

A tile is up to 12 rows and 32 columns of y = x + a b, of few rows up to 128 columns, whose sums
stay in registers while k runs over b. In float32 an instruction adds one product to each of 16
sums, in bfloat16 `vdpbf16ps` two:

    y[m, n] += a[m, k] * b[k, n] + a[m, k + 1] * b[k + 1, n]

It wants the pair of b side by side, where b has it in two rows: they are interleaved in registers,
which costs nothing beside the products, so that b can lie as XLA's own products have it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

COLUMNS = 32  # of a panel: two registers of sums
MOST_ROWS = 12  # of a tile: 24 of the 32 registers then hold sums
# Panels of a tile of few rows: memory is read faster the more of a row of b is read at once.
WIDE = {1: 4, 2: 4, 3: 4, 4: 2, 5: 2, 6: 2}

_SUMS = "<16 x float>"
INTRINSICS = f"""
declare {_SUMS} @llvm.x86.avx512bf16.dpbf16ps.512({_SUMS}, <32 x bfloat>, <32 x bfloat>)
declare {_SUMS} @llvm.fma.v16f32({_SUMS}, {_SUMS}, {_SUMS})
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
"""


@dataclass(frozen=True)
class Kind:
    """What is multiplied, and by which instruction.

    Attributes:
        name: of the kind, in the names of functions.
        depth: rows of b that the instruction takes at once, of as many numbers of 4 bytes of a.
        element: the type of a number of b.
        vector: the type of its operands a and b.
        multiply: the instruction, with places for sums, a and b.
        columns: which columns of the tile each of the two registers has.
    """

    name: str
    depth: int
    element: str
    vector: str
    multiply: str
    columns: tuple[tuple[int, ...], tuple[int, ...]]


_LANES = range(0, COLUMNS, 8)
BFLOAT16 = Kind(
    "bfloat16",
    depth=2,
    element="bfloat",
    vector="<32 x bfloat>",
    multiply=f"{_SUMS} @llvm.x86.avx512bf16.dpbf16ps.512({_SUMS} {{y}}, <32 x bfloat> {{a}}, "
    "<32 x bfloat> {b})",
    # `vpunpcklwd` and `vpunpckhwd` interleave the low and the high half of each lane of two rows.
    columns=(
        tuple(lane + i for lane in _LANES for i in range(4)),
        tuple(lane + i for lane in _LANES for i in range(4, 8)),
    ),
)
FLOAT32 = Kind(
    "float32",
    depth=1,
    element="float",
    vector=_SUMS,
    multiply=f"{_SUMS} @llvm.fma.v16f32({_SUMS} {{a}}, {_SUMS} {{b}}, {_SUMS} {{y}})",
    columns=(tuple(range(16)), tuple(range(16, 32))),
)


# a is float32; b, of bfloat16, is converted to it.
MIXED = replace(FLOAT32, name="mixed", element="bfloat")


def tiles(kind: Kind) -> str:
    """Functions for each number of rows, and tables of pointers to them: narrow ones, wide ones."""
    narrow = [(rows, 1) for rows in range(1, MOST_ROWS + 1)]
    wide = [(rows, WIDE[rows]) for rows in WIDE]
    lines = [_tile(kind, *shape) for shape in dict.fromkeys(narrow + wide)]
    for name, shapes in (("tiles", narrow), ("wide", wide)):
        pointers = ", ".join(f"ptr @tile_{kind.name}_{n}_{w}" for n, w in shapes)
        lines.append(f"@{name}_{kind.name} = internal constant [{len(shapes)} x ptr] [{pointers}]")
    return "\n".join(lines)


def widths() -> str:
    """A table of the widths of wide tiles, in panels of 32 columns, by rows - 1."""
    numbers = ", ".join(f"i64 {width}" for width in WIDE.values())
    return f"@widths = internal constant [{len(WIDE)} x i64] [{numbers}]"


def _tile(kind: Kind, rows: int, width: int) -> str:
    """A tile of so many rows and panels: y = x + a b. Strides are in bytes.

    Rows of b that will be needed next, from `%ahead` on, are fetched meanwhile.
    """
    sums = [f"%sum.{i}.{n}" for i in range(rows) for n in range(2 * width)]
    lines = [
        f"define internal void @tile_{kind.name}_{rows}_{width}(ptr %a, i64 %a.stride, ptr %b, "
        "i64 %b.stride, ptr %x, i64 %x.stride, ptr %y, i64 %y.stride, i64 %steps, "
        "ptr %ahead, i64 %ahead.stride) {",
        "entry:",
        *(line for name in "axy" for line in _rows(name, rows)),
        "br label %loop",
        "loop:",
        "%k = phi i64 [ 0, %entry ], [ %k.next, %loop ]",
        f"%b.0 = phi ptr [ %b, %entry ], [ %b.{kind.depth}, %loop ]",
        "%ahead.0 = phi ptr [ %ahead, %entry ], [ %ahead.next, %loop ]",
        *(f"{s} = phi {_SUMS} [ zeroinitializer, %entry ], [ {s}.next, %loop ]" for s in sums),
        *_fetch(kind, width),
        *(line for p in range(width) for line in _columns_of_b(kind, p)),
        *(line for i in range(rows) for line in _products(kind, i, width)),
        "%k.next = add i64 %k, 1",
        "%more = icmp ult i64 %k.next, %steps",
        "br i1 %more, label %loop, label %end",
        "end:",
        *(line for i in range(rows) for line in _store(kind, i, width)),
        "ret void",
        "}",
    ]
    return "\n".join(lines)


def _rows(name: str, rows: int) -> Iterator[str]:
    """Pointers to the rows of a matrix."""
    for i in range(rows):
        yield f"%{name}.offset.{i} = mul i64 %{name}.stride, {i}"
        yield f"%{name}.row.{i} = getelementptr i8, ptr %{name}, i64 %{name}.offset.{i}"


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
        for line in range(2 * width // kind.depth):
            yield f"%ahead.{row}.{line} = getelementptr i8, ptr %ahead.{row}, i64 {64 * line}"
            yield f"call void @llvm.prefetch.p0(ptr %ahead.{row}.{line}, i32 0, i32 3, i32 1)"


def _columns_of_b(kind: Kind, p: int) -> Iterator[str]:
    """The two operands b of the instruction, of a panel."""
    for row in range(kind.depth):
        offset = p * COLUMNS * (4 if kind.element == "float" else 2)
        yield f"%b.at.{p}.{row} = getelementptr i8, ptr %b.{row}, i64 {offset}"
    if kind.depth == 1:
        vector, half_vector = f"<32 x {kind.element}>", f"<16 x {kind.element}>"
        convert = "bitcast" if kind.element == "float" else "fpext"
        yield f"%b.columns.{p} = load {vector}, ptr %b.at.{p}.0, align 2"
        for half, columns in enumerate(kind.columns):
            n = 2 * p + half
            yield (
                f"%b.half.{n} = shufflevector {vector} %b.columns.{p}, {vector} poison, "
                f"<16 x i32> {_constants(columns)}"
            )
            yield f"%b.operand.{n} = {convert} {half_vector} %b.half.{n} to {kind.vector}"
        return
    for row in range(2):
        yield f"%b.row.{p}.{row} = load <32 x i16>, ptr %b.at.{p}.{row}, align 2"
    for half, columns in enumerate(kind.columns):
        pairs = [column + COLUMNS * row for column in columns for row in range(2)]
        n = 2 * p + half
        yield (
            f"%b.bits.{n} = shufflevector <32 x i16> %b.row.{p}.0, <32 x i16> %b.row.{p}.1, "
            f"<32 x i32> {_constants(pairs)}"
        )
        yield f"%b.operand.{n} = bitcast <32 x i16> %b.bits.{n} to {kind.vector}"


def _products(kind: Kind, i: int, width: int) -> Iterator[str]:
    """Adds the products of the next numbers of row i of a."""
    yield f"%a.at.{i} = getelementptr i32, ptr %a.row.{i}, i64 %k"
    yield f"%a.some.{i} = load i32, ptr %a.at.{i}, align 2"
    yield f"%a.one.{i} = insertelement <16 x i32> poison, i32 %a.some.{i}, i32 0"
    yield (
        f"%a.bits.{i} = shufflevector <16 x i32> %a.one.{i}, <16 x i32> poison, "
        "<16 x i32> zeroinitializer"
    )
    yield f"%a.operand.{i} = bitcast <16 x i32> %a.bits.{i} to {kind.vector}"
    for n in range(2 * width):
        call = kind.multiply.format(y=f"%sum.{i}.{n}", a=f"%a.operand.{i}", b=f"%b.operand.{n}")
        yield f"%sum.{i}.{n}.next = call {call}"


def _store(kind: Kind, i: int, width: int) -> Iterator[str]:
    """Adds row i of x to the sums, put in the order of their columns, and stores that."""
    both = [*kind.columns[0], *kind.columns[1]]
    order = [both.index(column) for column in range(COLUMNS)]
    for p in range(width):
        yield (
            f"%ordered.{i}.{p} = shufflevector {_SUMS} %sum.{i}.{2 * p}.next, "
            f"{_SUMS} %sum.{i}.{2 * p + 1}.next, <32 x i32> {_constants(order)}"
        )
        yield f"%x.at.{i}.{p} = getelementptr i8, ptr %x.row.{i}, i64 {128 * p}"
        yield f"%before.{i}.{p} = load <32 x float>, ptr %x.at.{i}.{p}, align 4"
        yield f"%total.{i}.{p} = fadd <32 x float> %before.{i}.{p}, %ordered.{i}.{p}"
        yield f"%y.at.{i}.{p} = getelementptr i8, ptr %y.row.{i}, i64 {128 * p}"
        yield f"store <32 x float> %total.{i}.{p}, ptr %y.at.{i}.{p}, align 4"


def _constants(numbers: Iterable[int]) -> str:
    return "<" + ", ".join(f"i32 {n}" for n in numbers) + ">"
