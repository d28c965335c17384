# SPDX-License-Identifier: Apache-2.0
"""Kernels of instructions that this CPU may lack: LLVM makes others of all of them but one."""

import re

from meshwen import kernels

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


def emulated(assembly: str) -> str:
    """The assembly of kernels without AVX512-BF16's instruction."""
    without = re.sub(r"(?m)^declare .*dpbf16ps.*$", _PAIRS, assembly)
    return without.replace("@llvm.x86.avx512bf16.dpbf16ps.512", "@pairs")


def compile_anywhere(of: kernels.InstructionSet, monkeypatch) -> None:
    """Compiles the kernels of an instruction set for whatever CPU this is."""
    if of not in kernels.supported():
        assembly = kernels._assembly
        monkeypatch.setattr(kernels, "_assembly", lambda of: emulated(assembly(of)))
    kernels.compiled(of)
