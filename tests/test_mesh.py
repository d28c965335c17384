# SPDX-License-Identifier: Apache-2.0
"""Mesh strings, the devices they stand for, and the errors when there are too few."""

import os
import subprocess
import sys
from math import prod
from types import SimpleNamespace

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType

from meshwen.errors import MeshwenError
from meshwen.parallel.mesh import (
    MeshSpec,
    axes_size,
    data_axes,
    make_mesh,
    mesh_label,
    model_axes,
)

SIZES = st.integers(1, 16)


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("1", {"model": 1}),
        ("8", {"model": 8}),
        ("1x8", {"model0": 1, "model1": 8}),
        ("2x4", {"model0": 2, "model1": 4}),
        (" 2 X 2x2 ", {"model0": 2, "model1": 2, "model2": 2}),
        ("data=2,model=4", {"data": 2, "model": 4}),
        ("Model=4, Data=2", {"model": 4, "data": 2}),
        ("data=2", {"data": 2, "model": 1}),
        ("model=8", {"model": 8}),
    ],
)
def test_mesh_strings_parse(text, axes):
    spec = MeshSpec.parse(text)
    assert spec.axes == tuple(axes.items())
    assert spec.devices == prod(axes.values())


@given(sizes=st.lists(SIZES, min_size=1, max_size=3))
def test_unnamed_sizes_round_trip(sizes):
    text = "x".join(map(str, sizes))
    spec = MeshSpec.parse(text)
    assert str(spec) == text
    assert [size for _, size in spec.axes] == sizes
    assert len({name for name, _ in spec.axes}) == len(sizes)


@given(axes=st.permutations(["data", "model"]), sizes=st.tuples(SIZES, SIZES))
def test_named_sizes_round_trip(axes, sizes):
    text = ",".join(f"{name}={size}" for name, size in zip(axes, sizes, strict=True))
    spec = MeshSpec.parse(text)
    assert str(spec) == text
    assert MeshSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "mesh must be such as 8, 1x8"),
        ("x", "mesh must be such as 8, 1x8"),
        ("2x", "mesh must be such as 8, 1x8"),
        ("2*4", "mesh must be such as 8, 1x8"),
        ("-8", "mesh must be such as 8, 1x8"),
        ("1.5", "mesh must be such as 8, 1x8"),
        ("8,4", "mesh must be such as 8, 1x8"),
        ("data=", "mesh must be such as 8, 1x8"),
        ("data=2,", "mesh must be such as 8, 1x8"),
        ("data=2x4", "mesh must be such as 8, 1x8"),
        ("0", "at least 1"),
        ("2x0", "at least 1"),
        ("data=0,model=4", "at least 1"),
        ("100000", "at most 65536"),
        ("300x300", "at most 65536"),
        ("9" * 5000, "mesh must be such as 8, .*, not 5000 characters"),
        ("tensor=4", "unknown axis 'tensor'"),
        ("data=2,data=4", "names an axis twice"),
    ],
)
def test_what_is_no_mesh_is_refused_in_one_line(text, complaint):
    with pytest.raises(MeshwenError, match=complaint) as error:
        MeshSpec.parse(text)
    assert "\n" not in str(error.value)


@given(text=st.text(alphabet="0123456789x=,. datmoel²٣", max_size=20) | st.text(max_size=8))
def test_any_string_is_a_mesh_or_an_error(text):
    try:
        spec = MeshSpec.parse(text)
    except MeshwenError:
        return
    assert spec.devices >= 1
    assert MeshSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    "text", ["1", "3", "1x8", "2x4", "8x4", "data=2,model=4", "model=4,data=2"]
)
def test_a_mesh_takes_devices_in_row_major_order_and_is_labelled_as_it_was_asked_for(text):
    mesh = make_mesh(text)
    assert [d.id for d in mesh.devices.flat] == list(range(mesh.size))
    assert mesh_label(mesh) == text
    assert tuple(mesh.shape.items()) == MeshSpec.parse(text).axes
    assert set(mesh.axis_names) == {*data_axes(mesh), *model_axes(mesh)}
    assert axes_size(mesh, data_axes(mesh)) * axes_size(mesh, model_axes(mesh)) == mesh.size
    assert data_axes(mesh) == (("data",) if "data" in text else ())


def test_a_mesh_larger_than_a_running_cpu_back_end_names_the_way_out():
    assert len(jax.devices()) == 32
    with pytest.raises(
        MeshwenError, match=r"mesh 5x9 needs 45 devices, but JAX has 32 .*start"
    ) as e:
        make_mesh("5x9")
    assert "JAX_NUM_CPU_DEVICES=45" in str(e.value)


def test_a_mesh_larger_than_a_real_back_end_is_refused(monkeypatch):
    monkeypatch.setattr(
        jax, "devices", lambda: [SimpleNamespace(platform="tpu", id=0, process_index=0)] * 4
    )
    with pytest.raises(
        MeshwenError, match=r"mesh 2x4 needs 8 .* has 4 \(tpu\); use a smaller mesh"
    ):
        make_mesh("2x4")


def run_python(program: str, **environment: str) -> str:
    """What a fresh Python prints that runs `program` on the CPU, with no device count set."""
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    environment = kept | {"JAX_PLATFORMS": "cpu"} | environment
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_starts_no_back_end_so_that_a_mesh_can_simulate_its_devices():
    program = """
import meshwen, meshwen.weights.loading, meshwen.models.qwen2, meshwen.weights.declaration
from jax._src import xla_bridge
print(xla_bridge.backends_are_initialized())
from meshwen.parallel.mesh import make_mesh
print(make_mesh("3x4").devices.shape)
"""
    assert run_python(program).split("\n")[:2] == ["False", "(3, 4)"]


def test_a_device_count_that_the_user_set_is_kept():
    program = """
import jax
from meshwen.parallel.mesh import make_mesh
print(make_mesh("2").size, len(jax.devices()))
"""
    assert run_python(program, JAX_NUM_CPU_DEVICES="6").split() == ["2", "6"]


def test_a_jax_mesh_is_taken_whatever_its_axis_types_are():
    explicit = jax.make_mesh((2, 4), ("data", "model"))
    assert mesh_label(make_mesh(explicit)) == "data=2,model=4"
    assert set(make_mesh(explicit).axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("shape", "names", "given", "label"),
    [
        ((8,), ("X",), {"model_axes": "X"}, "8"),
        ((8,), ("X",), {"data_axes": "X"}, "data=8,model=1"),
        ((2, 4), ("dp", "tp"), {"model_axes": "tp", "data_axes": "dp"}, "data=2,model=4"),
        ((2, 4), ("tp", "dp"), {"model_axes": ("tp",), "data_axes": ["dp"]}, "model=2,data=4"),
        ((2, 4), ("a", "b"), {"model_axes": ("b", "a")}, "2x4"),
        ((2, 2, 2), ("a", "b", "c"), {"model_axes": ("a", "c"), "data_axes": "b"}, None),
        ((2, 1, 4), ("dp", "pp", "tp"), {"model_axes": "tp", "data_axes": "dp"}, "data=2,model=4"),
        ((1, 1), ("dp", "tp"), {}, "1"),
        # Names of ours that mean something else here.
        ((2, 4), ("model", "data"), {"model_axes": "data", "data_axes": "model"}, "data=2,model=4"),
    ],
)
def test_a_jax_mesh_may_have_other_axes(shape, names, given, label):
    theirs = jax.make_mesh(shape, names, axis_types=(AxisType.Explicit,) * len(shape))
    mesh = make_mesh(theirs, **given)
    label = label or "model0=2,data=2,model1=2"
    assert mesh_label(mesh) == label
    assert MeshSpec.parse(label).axes == tuple(mesh.shape.items())
    assert list(mesh.devices.flat) == list(theirs.devices.flat)
    assert make_mesh(mesh) == mesh


@pytest.mark.parametrize(
    ("names", "given", "complaint"),
    [
        (("dp", "model"), {}, "axis 'dp' .* name it in model_axes or data_axes"),
        (("dp", "tp"), {"model_axes": "tp"}, "axis 'dp' of the mesh splits neither"),
        (("dp", "tp"), {"model_axes": "X"}, "no axis 'X'; its axes are dp, tp"),
        (("dp", "tp"), {"model_axes": ("dp", "tp"), "data_axes": "dp"}, "named twice"),
    ],
)
def test_a_jax_mesh_with_an_axis_that_splits_nothing_is_refused(names, given, complaint):
    with pytest.raises(MeshwenError, match=complaint):
        make_mesh(jax.make_mesh((2, 4), names), **given)


def test_a_mesh_string_names_its_own_axes():
    with pytest.raises(MeshwenError, match="'2x4' names its own"):
        make_mesh("2x4", model_axes="tp")
