# SPDX-License-Identifier: Apache-2.0
"""Which back end a mesh's devices have."""

from __future__ import annotations

import os

import jax

from meshwen.ops.backend import Backend
from meshwen.ops.cpu import kernels
from meshwen.ops.cpu.backend import CpuKernels
from meshwen.ops.cpu.xla import XlaOnCpu
from meshwen.parallel.mesh import AnyMesh, on_cpu


def backend_of(mesh: AnyMesh, *, with_kernels: bool = True) -> Backend:
    """The back end of a mesh's devices; of an abstract mesh, which has none, XLA as it is.

    On CPUs this loads the kernels, once, where there are any.

    Args:
        mesh: the devices.
        with_kernels: whether to use kernels where there are any; without, XLA computes everything.
    """
    if not on_cpu(mesh):
        return Backend()
    if not with_kernels or kernels.instruction_set() is None:
        return XlaOnCpu()
    return CpuKernels(alone=_fills_cores(mesh))


def _fills_cores(mesh: AnyMesh) -> bool:
    """Whether this process has as many of the mesh's devices as it may use cores."""
    here = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    affinity = getattr(os, "sched_getaffinity", None)  # Not on macOS.
    return len(here) >= (len(affinity(0)) if affinity else os.cpu_count() or 1)
