# SPDX-License-Identifier: Apache-2.0
"""Mesh strings, and the devices behind them.

`8`, `1x8`, `2x4`: every axis is tensor-parallel. `data=2,model=4`: the batch is split over `data`,
the model over `model`. Devices are taken in row-major order, equally many of each process. On the
CPU a mesh larger than the machine's device count gets simulated devices; on any other back end that
is an error.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from numbers import Integral
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from meshwen.common.arguments import brief
from meshwen.errors import MeshwenError
from meshwen.parallel.distributed import process_count
from meshwen.runtime import jax_settings

AnyMesh = Mesh | AbstractMesh

DATA_AXIS = "data"
MODEL_AXIS = "model"
_EXPECTED = "such as 8, 1x8, 2x4 or data=2,model=4"
_MAX_DEVICES = 1 << 16
_MAX_LENGTH = 100  # Python refuses to read a number of thousands of digits.


@dataclass(frozen=True)
class MeshSpec:
    """A parsed mesh string: axis names and sizes, in order.

    Tensor-parallel axes are named `model`, or `model0`, `model1`, ... when there are several; those
    that split the batch `data` likewise.
    """

    axes: tuple[tuple[str, int], ...]

    @classmethod
    def parse(cls, text: str | int | Sequence[int]) -> MeshSpec:
        """Parses a mesh string; a number, or a tuple of numbers, stands for "8", or "2x4".

        Raises:
            MeshwenError: the string is not a mesh.
        """
        if not isinstance(text, str):
            text = _mesh_text(text)
        compact = text.strip().lower().replace(" ", "")
        if len(compact) > _MAX_LENGTH:
            raise MeshwenError(f"mesh must be {_EXPECTED}, not {len(compact)} characters")
        if re.fullmatch(r"\d+(x\d+)*", compact):
            sizes = [int(size) for size in compact.split("x")]
            kinds = [MODEL_AXIS] * len(sizes)
        elif re.fullmatch(r"[a-z]+\d*=\d+(,[a-z]+\d*=\d+)*", compact):
            names, values = zip(*(axis.split("=") for axis in compact.split(",")), strict=True)
            sizes = [int(size) for size in values]
            kinds = [name.rstrip("0123456789") for name in names]
            if unknown := set(kinds) - {DATA_AXIS, MODEL_AXIS}:
                raise MeshwenError(
                    f"mesh {text!r}: unknown axis {sorted(unknown)[0]!r}; "
                    "the axes are data and model"
                )
            if len(set(names)) < len(names):
                raise MeshwenError(f"mesh {text!r} names an axis twice")
            if MODEL_AXIS not in kinds:
                kinds, sizes = [*kinds, MODEL_AXIS], [*sizes, 1]
        else:
            raise MeshwenError(f"mesh must be {_EXPECTED}, not {text!r}")
        if min(sizes) < 1 or prod(sizes) > _MAX_DEVICES:
            raise MeshwenError(
                f"mesh {text!r}: axis sizes must be at least 1, at most {_MAX_DEVICES} in all"
            )
        return cls(tuple(zip(_own_names(kinds), sizes, strict=True)))

    @property
    def devices(self) -> int:
        """Number of devices."""
        return prod(size for _, size in self.axes)

    def abstract(self) -> AbstractMesh:
        """The mesh without devices: enough to tell a layout, and to lower a program."""
        names, sizes = zip(*self.axes, strict=True)
        return AbstractMesh(sizes, names)

    def __str__(self) -> str:
        if any(name.startswith(DATA_AXIS) for name, _ in self.axes):
            return ",".join(f"{name}={size}" for name, size in self.axes)
        return "x".join(str(size) for _, size in self.axes)


def make_mesh(
    spec: str | int | MeshSpec | Mesh = "1",
    *,
    model_axes: str | Sequence[str] | None = None,
    data_axes: str | Sequence[str] | None = None,
) -> Mesh:
    """The JAX mesh of a mesh string, on the default back end's devices in row-major order.

    Of a JAX mesh the devices are taken in their order, whatever the types of its axes are (Explicit
    or Auto). Axes `model` and `data` (or `model0`, `model1`, ...) split the model and the batch;
    where they have other names, `model_axes` and `data_axes` say which do, and those of the result
    get these names.

    On the CPU, simulated devices are made when there are too few; that works until JAX has started
    its back end, which the first array or the first `jax.devices()` does. Where there are several
    processes, all of them make the mesh, and each puts in equally many devices.

    Args:
        spec: the mesh, or a string or specification of one.
        model_axes: the axis, or axes, of a JAX mesh that split the model.
        data_axes: the axis, or axes, of a JAX mesh that split the batch.

    Raises:
        MeshwenError: the string does not parse, there are too few devices, they cannot be shared
            equally between the processes, an axis of a JAX mesh splits nothing or has no such name,
            or JAX cannot start its back end.
    """
    if isinstance(spec, Mesh):
        own = _with_own_names(spec, model_axes, data_axes)
        jax_settings.check(own.devices.flat[0])
        return own
    if model_axes is not None or data_axes is not None:
        raise MeshwenError(
            f"model_axes and data_axes name the axes of a JAX mesh; {str(spec)!r} names its own"
        )
    spec = spec if isinstance(spec, MeshSpec) else MeshSpec.parse(spec)
    processes = process_count()
    of_each, rest = divmod(spec.devices, processes)
    if rest:
        raise MeshwenError(
            f"mesh {spec}: {spec.devices} device{'s' * (spec.devices > 1)} cannot be shared "
            f"equally between {processes} processes; use a mesh whose size they divide"
        )
    _ask_for_cpu_devices(of_each)
    devices = _first_of_each_process(jax_settings.devices(), of_each)
    if len(devices) < spec.devices:
        raise MeshwenError(_too_few(spec, devices, processes))
    shape = tuple(size for _, size in spec.axes)
    names = tuple(name for name, _ in spec.axes)
    return Mesh(np.asarray(devices).reshape(shape), names)


def _mesh_text(given: Any) -> str:
    sizes = given if isinstance(given, tuple | list) and given else [given]
    if not all(isinstance(size, Integral) and not isinstance(size, bool) for size in sizes):
        raise MeshwenError(
            f"mesh must be text {_EXPECTED}, a number of devices or a jax.sharding.Mesh, "
            f"not {brief(given)}"
        )
    return "x".join(str(int(size)) for size in sizes)


def _first_of_each_process(devices: list[jax.Device], count: int) -> list[jax.Device]:
    """At most `count` devices of each process, in JAX's order."""
    taken: Counter[int] = Counter()
    chosen = []
    for device in devices:
        if taken[device.process_index] < count:
            taken[device.process_index] += 1
            chosen.append(device)
    return chosen


def _with_own_names(
    mesh: Mesh, model: str | Sequence[str] | None, data: str | Sequence[str] | None
) -> Mesh:
    """A JAX mesh as the package needs it: axes by its names, none that JAX types explicitly."""
    if not mesh.size:
        raise MeshwenError("the mesh has no devices")
    sizes = {str(n): size for n, size in zip(mesh.axis_names, mesh.devices.shape, strict=True)}
    names = list(sizes)
    if model is None and data is None:
        model = [name for name in names if re.fullmatch(rf"{MODEL_AXIS}\d*", name)]
        data = [name for name in names if re.fullmatch(rf"{DATA_AXIS}\d*", name)]
    kinds = {MODEL_AXIS: _names(model), DATA_AXIS: _names(data)}
    given = [name for kind in kinds.values() for name in kind]
    if absent := [name for name in given if name not in names]:
        raise MeshwenError(f"the mesh has no axis {absent[0]!r}; its axes are {', '.join(names)}")
    if len(set(given)) < len(given):
        raise MeshwenError("an axis of the mesh is named twice among model_axes and data_axes")
    for name in names:
        if name not in given and sizes[name] > 1:
            raise MeshwenError(
                f"the axis {name!r} of the mesh splits neither the model nor the batch: name it in "
                f"model_axes or data_axes, or name the mesh's axes {MODEL_AXIS} and {DATA_AXIS}"
            )
    kept = [name for name in names if name in given]
    shape = [sizes[name] for name in kept]
    own = [MODEL_AXIS if name in kinds[MODEL_AXIS] else DATA_AXIS for name in kept]
    if MODEL_AXIS not in own:
        shape, own = [*shape, 1], [*own, MODEL_AXIS]
    return Mesh(mesh.devices.reshape(shape), _own_names(own))


def _own_names(kinds: Sequence[str]) -> tuple[str, ...]:
    """Names of axes that split the model or the batch, numbered where several do."""
    return tuple(
        f"{kind}{kinds[:place].count(kind)}" if kinds.count(kind) > 1 else kind
        for place, kind in enumerate(kinds)
    )


def _names(given: str | Sequence[str] | None) -> list[str]:
    return [given] if isinstance(given, str) else list(given or ())


def data_axes(mesh: AnyMesh) -> tuple[str, ...]:
    """The mesh axes that split the batch, in row-major order."""
    return tuple(name for name in mesh.axis_names if str(name).startswith(DATA_AXIS))


def model_axes(mesh: AnyMesh, data: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """The mesh axes that split the model, in row-major order: all but those that split the batch.

    Args:
        mesh: the mesh.
        data: the axes that split the batch; None: `data_axes`.
    """
    data = data_axes(mesh) if data is None else data
    return tuple(name for name in mesh.axis_names if name not in data)


def on_cpu(mesh: AnyMesh) -> bool:
    """Whether the mesh has devices, and they are CPUs, simulated or not."""
    return isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "cpu"


def axes_size(mesh: AnyMesh, names: tuple[str, ...]) -> int:
    """Number of devices along the named axes together."""
    return prod(mesh.shape[name] for name in names)


def mesh_label(mesh: AnyMesh) -> str:
    """The mesh string that makes this mesh."""
    return str(MeshSpec(tuple((str(name), mesh.shape[name]) for name in mesh.axis_names)))


def _ask_for_cpu_devices(count: int) -> None:
    """Raises the CPU back end's device count to at least `count`, if none has started yet."""
    asked: int = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
    if count <= max(1, asked):
        return
    # RuntimeError: a back end runs already; its device count stands, and make_mesh checks it.
    with suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)


def _too_few(spec: MeshSpec, devices: list[jax.Device], processes: int) -> str:
    platform = devices[0].platform
    have = f"mesh {spec} needs {spec.devices} devices, but JAX has {len(devices)} ({platform})"
    if processes > 1:
        have += f", {spec.devices // processes} of each of {processes} processes"
    if platform != "cpu":
        return f"{have}; use a smaller mesh, or JAX_PLATFORMS=cpu for simulated devices"
    return (
        f"{have}: its CPU back end has already started; make the largest mesh first, "
        f"or start Python with JAX_NUM_CPU_DEVICES={spec.devices // processes}"
    )
