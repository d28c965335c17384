# SPDX-License-Identifier: Apache-2.0
"""LLVM IR of the attention of one key/value head: see `attention.ll`.

Three passes over the slots that are seen: scores, 16 slots at a time; their exponentials and the
sum of these; values, 16 dimensions at a time. The G queries of a head share each key and value that
is loaded. Nothing beyond the last slot is read but what is left of 16.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

MOST_QUERIES = 8  # of a key/value head
WIDTH = 16  # float32 numbers in a register

_VECTOR = f"<{WIDTH} x float>"
_LOWEST = -3.4028234663852886e38  # a float32 that stands for minus infinity

_DECLARATIONS = f"""
declare {_VECTOR} @llvm.fma.v16f32({_VECTOR}, {_VECTOR}, {_VECTOR})
declare {_VECTOR} @llvm.maximum.v16f32({_VECTOR}, {_VECTOR})
declare <{WIDTH} x i32> @llvm.fptosi.sat.v16i32.v16f32({_VECTOR})
declare {_VECTOR} @llvm.rint.v16f32({_VECTOR})
declare float @llvm.vector.reduce.fmaximum.v16f32({_VECTOR})
declare float @llvm.vector.reduce.fadd.v16f32(float, {_VECTOR})
"""

# e^r = 1 + r + r^2 (c0 r^5 + ... + c5) for |r| up to ln(2) / 2: Cephes, `expf`.
_POLYNOMIAL = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
_SMALLEST_EXPONENT = -87.0  # of e, below which a float32 would be subnormal


def attends() -> str:
    """A function for each number of queries, and a table of pointers to them."""
    numbers = range(1, MOST_QUERIES + 1)
    pointers = ", ".join(f"ptr @attend_{n}" for n in numbers)
    table = f"@attends = internal constant [{MOST_QUERIES} x ptr] [{pointers}]"
    return "\n".join([_DECLARATIONS, _EXP, *map(_attend, numbers), table])


def _attend(queries: int) -> str:
    """Of `queries` queries; `%scores` has room for float32 [queries, S]."""
    g = range(queries)
    return "\n".join(
        [
            f"define internal void @attend_{queries}(ptr %q, ptr %keys, ptr %values, ptr %y, "
            "ptr %scores, i64 %H, i64 %S, i32 %first.slot, i32 %last.slot) {",
            "entry:",
            *_splat("first", "i32", "%first.slot"),
            *_splat("last", "i32", "%last.slot"),
            "%first.64 = zext i32 %first.slot to i64",
            "%last.64 = zext i32 %last.slot to i64",
            f"%begin = and i64 %first.64, {-WIDTH}",
            "%key.stride = mul i64 %S, 4",
            *(f"%q.offset.{i} = mul i64 %H, {i}" for i in g),
            *(f"%q.row.{i} = getelementptr float, ptr %q, i64 %q.offset.{i}" for i in g),
            *(f"%y.row.{i} = getelementptr float, ptr %y, i64 %q.offset.{i}" for i in g),
            *(f"%s.offset.{i} = mul i64 %S, {i}" for i in g),
            *(f"%s.row.{i} = getelementptr float, ptr %scores, i64 %s.offset.{i}" for i in g),
            "br label %score",
            *_scores(g),
            *_exponentials(g),
            *_weighted_values(g),
            "}",
        ]
    )


def _scores(g: range) -> Iterable[str]:
    """`%scores`, the lowest number where a slot is not seen, and the largest of each query."""
    return [
        "score:",
        "%j = phi i64 [ %begin, %entry ], [ %j.next, %scored ]",
        *(
            f"%top.{i} = phi {_VECTOR} [ {_all(_LOWEST)}, %entry ], [ %top.{i}.next, %scored ]"
            for i in g
        ),
        "%keys.j = getelementptr float, ptr %keys, i64 %j",
        "br label %dimension",
        "dimension:",
        "%h = phi i64 [ 0, %score ], [ %h.next, %dimension ]",
        "%key.at = phi ptr [ %keys.j, %score ], [ %key.next, %dimension ]",
        *(
            f"%dot.{i} = phi {_VECTOR} [ {_all(0)}, %score ], [ %dot.{i}.next, %dimension ]"
            for i in g
        ),
        f"%key = load {_VECTOR}, ptr %key.at, align 4",
        # The same dimension of slots to come: the next dimension's are a row of slots away.
        "%key.ahead = getelementptr i8, ptr %key.at, i64 128",
        "call void @llvm.prefetch.p0(ptr %key.ahead, i32 0, i32 3, i32 1)",
        *(
            line
            for i in g
            for line in (
                f"%q.at.{i} = getelementptr float, ptr %q.row.{i}, i64 %h",
                f"%q.one.{i} = load float, ptr %q.at.{i}",
                *_splat(f"q.all.{i}", "float", f"%q.one.{i}"),
                f"%dot.{i}.next = call {_VECTOR} @llvm.fma.v16f32({_VECTOR} %q.all.{i}, "
                f"{_VECTOR} %key, {_VECTOR} %dot.{i})",
            )
        ),
        "%key.next = getelementptr i8, ptr %key.at, i64 %key.stride",
        "%h.next = add i64 %h, 1",
        "%h.more = icmp ult i64 %h.next, %H",
        "br i1 %h.more, label %dimension, label %scored",
        "scored:",
        *_seen("seen", "%j"),
        *(
            line
            for i in g
            for line in (
                f"%score.{i} = select <16 x i1> %seen, {_VECTOR} %dot.{i}.next, "
                f"{_VECTOR} {_all(_LOWEST)}",
                f"%score.at.{i} = getelementptr float, ptr %s.row.{i}, i64 %j",
                f"store {_VECTOR} %score.{i}, ptr %score.at.{i}, align 4",
                f"%top.{i}.next = call {_VECTOR} @llvm.maximum.v16f32({_VECTOR} %top.{i}, "
                f"{_VECTOR} %score.{i})",
            )
        ),
        f"%j.next = add i64 %j, {WIDTH}",
        "%j.more = icmp ule i64 %j.next, %last.64",
        "br i1 %j.more, label %score, label %largest",
    ]


def _exponentials(g: range) -> Iterable[str]:
    """Turns scores into weights, not divided by their sum yet."""
    return [
        "largest:",
        *(
            line
            for i in g
            for line in (
                f"%largest.{i} = call float @llvm.vector.reduce.fmaximum.v16f32("
                f"{_VECTOR} %top.{i}.next)",
                *_splat(f"largest.all.{i}", "float", f"%largest.{i}"),
            )
        ),
        "br label %weigh",
        "weigh:",
        "%w = phi i64 [ %begin, %largest ], [ %w.next, %weigh ]",
        *(
            f"%sum.{i} = phi {_VECTOR} [ {_all(0)}, %largest ], [ %sum.{i}.next, %weigh ]"
            for i in g
        ),
        *_seen("counts", "%w"),
        *(
            line
            for i in g
            for line in (
                f"%w.at.{i} = getelementptr float, ptr %s.row.{i}, i64 %w",
                f"%w.score.{i} = load {_VECTOR}, ptr %w.at.{i}, align 4",
                f"%w.less.{i} = fsub {_VECTOR} %w.score.{i}, %largest.all.{i}",
                f"%w.exp.{i} = call {_VECTOR} @exp_16({_VECTOR} %w.less.{i})",
                f"%weight.{i} = select <16 x i1> %counts, {_VECTOR} %w.exp.{i}, "
                f"{_VECTOR} {_all(0)}",
                f"store {_VECTOR} %weight.{i}, ptr %w.at.{i}, align 4",
                f"%sum.{i}.next = fadd {_VECTOR} %sum.{i}, %weight.{i}",
            )
        ),
        f"%w.next = add i64 %w, {WIDTH}",
        "%w.more = icmp ule i64 %w.next, %last.64",
        "br i1 %w.more, label %weigh, label %total",
        "total:",
        *(
            line
            for i in g
            for line in (
                f"%total.{i} = call reassoc float @llvm.vector.reduce.fadd.v16f32(float 0.0, "
                f"{_VECTOR} %sum.{i}.next)",
                *_splat(f"total.all.{i}", "float", f"%total.{i}"),
            )
        ),
        "br label %values.16",
    ]


def _weighted_values(g: range) -> Iterable[str]:
    """Sums values with weights, and divides by the weights' sum."""
    return [
        "values.16:",
        "%d = phi i64 [ 0, %total ], [ %d.next, %stored ]",
        "br label %slot",
        "slot:",
        "%t = phi i64 [ %first.64, %values.16 ], [ %t.next, %slot ]",
        *(
            f"%out.{i} = phi {_VECTOR} [ {_all(0)}, %values.16 ], [ %out.{i}.next, %slot ]"
            for i in g
        ),
        "%t.offset = mul i64 %t, %H",
        "%v.offset = add i64 %t.offset, %d",
        "%v.at = getelementptr bfloat, ptr %values, i64 %v.offset",
        f"%v.short = load <{WIDTH} x bfloat>, ptr %v.at, align 2",
        f"%v = fpext <{WIDTH} x bfloat> %v.short to {_VECTOR}",
        *(
            line
            for i in g
            for line in (
                f"%p.at.{i} = getelementptr float, ptr %s.row.{i}, i64 %t",
                f"%p.one.{i} = load float, ptr %p.at.{i}",
                *_splat(f"p.all.{i}", "float", f"%p.one.{i}"),
                f"%out.{i}.next = call {_VECTOR} @llvm.fma.v16f32({_VECTOR} %p.all.{i}, "
                f"{_VECTOR} %v, {_VECTOR} %out.{i})",
            )
        ),
        "%t.next = add i64 %t, 1",
        "%t.more = icmp ule i64 %t.next, %last.64",
        "br i1 %t.more, label %slot, label %stored",
        "stored:",
        *(
            line
            for i in g
            for line in (
                f"%out.mean.{i} = fdiv {_VECTOR} %out.{i}.next, %total.all.{i}",
                f"%out.at.{i} = getelementptr float, ptr %y.row.{i}, i64 %d",
                f"store {_VECTOR} %out.mean.{i}, ptr %out.at.{i}, align 4",
            )
        ),
        f"%d.next = add i64 %d, {WIDTH}",
        "%d.more = icmp ult i64 %d.next, %H",
        "br i1 %d.more, label %values.16, label %end",
        "end:",
        "ret void",
    ]


def _seen(name: str, slot: str) -> list[str]:
    """Which of 16 slots from `slot` on are between the first and the last that are seen."""
    numbers = ", ".join(f"i32 {i}" for i in range(WIDTH))
    return [
        f"%{name}.32 = trunc i64 {slot} to i32",
        *_splat(f"{name}.from", "i32", f"%{name}.32"),
        f"%{name}.slots = add <16 x i32> %{name}.from, <{numbers}>",
        f"%{name}.after = icmp sge <16 x i32> %{name}.slots, %first",
        f"%{name}.before = icmp sle <16 x i32> %{name}.slots, %last",
        f"%{name} = and <16 x i1> %{name}.after, %{name}.before",
    ]


def _splat(name: str, kind: str, value: str) -> list[str]:
    """A vector of 16 equal numbers."""
    vector = f"<{WIDTH} x {kind}>"
    return [
        f"%{name}.one = insertelement {vector} poison, {kind} {value}, i32 0",
        f"%{name} = shufflevector {vector} %{name}.one, {vector} poison, "
        f"<{WIDTH} x i32> zeroinitializer",
    ]


def _all(value: float) -> str:
    """A constant vector; LLVM writes a float32 as the bits of the equal float64."""
    (single,) = struct.unpack("<f", struct.pack("<f", value))
    (bits,) = struct.unpack("<Q", struct.pack("<d", single))
    return "<" + ", ".join([f"float 0x{bits:016X}"] * WIDTH) + ">"


def _exp() -> str:
    fma = f"call {_VECTOR} @llvm.fma.v16f32"
    steps = [
        f"%p.{n} = {fma}({_VECTOR} %p.{n - 1}, {_VECTOR} %r, {_VECTOR} {_all(c)})"
        for n, c in enumerate(_POLYNOMIAL[1:], start=1)
    ]
    return "\n".join(
        [
            "; e^x for x up to 0, and NaN for NaN.",
            f"define internal {_VECTOR} @exp_16({_VECTOR} %x.any) alwaysinline {{",
            f"%small = fcmp olt {_VECTOR} %x.any, {_all(_SMALLEST_EXPONENT)}",
            f"%x = select <{WIDTH} x i1> %small, {_VECTOR} {_all(_SMALLEST_EXPONENT)}, "
            f"{_VECTOR} %x.any",
            f"%scaled = fmul {_VECTOR} %x, {_all(_LOG2_E)}",
            f"%n = call {_VECTOR} @llvm.rint.v16f32({_VECTOR} %scaled)",
            f"%r.0 = {fma}({_VECTOR} %n, {_VECTOR} {_all(-_LN2_HIGH)}, {_VECTOR} %x)",
            f"%r = {fma}({_VECTOR} %n, {_VECTOR} {_all(-_LN2_LOW)}, {_VECTOR} %r.0)",
            f"%p.0 = fadd {_VECTOR} {_all(_POLYNOMIAL[0])}, {_all(0)}",
            *steps,
            f"%square = fmul {_VECTOR} %r, %r",
            f"%near = {fma}({_VECTOR} %p.{len(_POLYNOMIAL) - 1}, {_VECTOR} %square, {_VECTOR} %r)",
            f"%e.r = fadd {_VECTOR} %near, {_all(1)}",
            f"%n.int = call <{WIDTH} x i32> @llvm.fptosi.sat.v16i32.v16f32({_VECTOR} %n)",
            f"%exponent = shl <{WIDTH} x i32> %n.int, <{', '.join(['i32 23'] * WIDTH)}>",
            f"%e.bits = bitcast {_VECTOR} %e.r to <{WIDTH} x i32>",
            f"%y.bits = add <{WIDTH} x i32> %e.bits, %exponent",
            f"%y = bitcast <{WIDTH} x i32> %y.bits to {_VECTOR}",
            f"ret {_VECTOR} %y",
            "}",
        ]
    )


_EXP = _exp()
