# SPDX-License-Identifier: Apache-2.0
"""Kernels of instructions that this CPU may lack: LLVM makes others of all of them but two."""

import re

from meshwen.ops.cpu import kernels

# Adds up the two products of a pair, as `vdpbf16ps` does; it may round otherwise.
_PAIRS = """
define internal <16 x float> @pairs(<16 x float> %y, <32 x bfloat> %a, <32 x bfloat> %b) {
  %a.bits = bitcast <32 x bfloat> %a to <16 x i32>
  %b.bits = bitcast <32 x bfloat> %b to <16 x i32>
  %a.low.bits = shl <16 x i32> %a.bits, splat (i32 16)
  %b.low.bits = shl <16 x i32> %b.bits, splat (i32 16)
  %a.high.bits = and <16 x i32> %a.bits, splat (i32 -65536)
  %b.high.bits = and <16 x i32> %b.bits, splat (i32 -65536)
  %a.low = bitcast <16 x i32> %a.low.bits to <16 x float>
  %b.low = bitcast <16 x i32> %b.low.bits to <16 x float>
  %a.high = bitcast <16 x i32> %a.high.bits to <16 x float>
  %b.high = bitcast <16 x i32> %b.high.bits to <16 x float>
  %high = call <16 x float> @llvm.fma.v16f32(<16 x float> %a.high, <16 x float> %b.high,
                                             <16 x float> %y)
  %sum = call <16 x float> @llvm.fma.v16f32(<16 x float> %a.low, <16 x float> %b.low,
                                            <16 x float> %high)
  ret <16 x float> %sum
}
"""

# Adds up 4 products of unsigned and signed bytes, as `vpdpbusd` does.
_DOTS = """
define internal <{lanes} x i32> @dots.{bits}(<{lanes} x i32> %y, <{lanes} x i32> %a,
                                             <{lanes} x i32> %b) {{
{products}
  ret <{lanes} x i32> %y.4
}}
"""
_DOT = """
  %a.up.{i} = shl <{lanes} x i32> %a, splat (i32 {left})
  %b.up.{i} = shl <{lanes} x i32> %b, splat (i32 {left})
  %a.{i} = lshr <{lanes} x i32> %a.up.{i}, splat (i32 24)
  %b.{i} = ashr <{lanes} x i32> %b.up.{i}, splat (i32 24)
  %ab.{i} = mul <{lanes} x i32> %a.{i}, %b.{i}
  %y.{next} = add <{lanes} x i32> %y{before}, %ab.{i}"""


def _dots(bits: int) -> str:
    lanes = bits // 32
    products = [
        _DOT.format(lanes=lanes, i=i, left=24 - 8 * i, next=i + 1, before=f".{i}" if i else "")
        for i in range(4)
    ]
    return _DOTS.format(lanes=lanes, bits=bits, products="".join(products))


def emulated(assembly: str) -> str:
    """The assembly of kernels without the instructions of AVX512-BF16 and VNNI."""
    assembly = re.sub(r"(?m)^declare .*dpbf16ps.*$", _PAIRS, assembly)
    for bits in (256, 512):
        assembly = re.sub(rf"(?m)^declare .*vpdpbusd.{bits}.*$", _dots(bits), assembly)
        assembly = assembly.replace(f"@llvm.x86.avx512.vpdpbusd.{bits}", f"@dots.{bits}")
    return assembly.replace("@llvm.x86.avx512bf16.dpbf16ps.512", "@pairs")


def compile_anywhere(of: kernels.InstructionSet, monkeypatch) -> None:
    """Compiles the kernels of an instruction set for whatever CPU this is."""
    if of.name not in {one.name for one in kernels.supported()}:
        assembly = kernels._assembly
        monkeypatch.setattr(kernels, "_assembly", lambda of: emulated(assembly(of)))
    kernels.compiled(of)
