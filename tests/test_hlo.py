# SPDX-License-Identifier: Apache-2.0
"""The collectives of a program are seen, however XLA prints them."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from meshwen.parallel.mesh import make_mesh
from meshwen.verify.hlo import Collective, collectives, fingerprint, summary

REGION = """%region_1.2 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b), metadata={op_name="psum"}
}

"""
GROUPS = {
    "lists": "{{0,1,2,3},{4,5,6,7}}",
    "iota": "[2,4]<=[8]",
    "transposed iota": "[2,4]<=[4,2]T(1,0)",
    "mesh axes": "mesh['data'=2,'model0'=2,'model1'=2] {'model0','model1'}",
}


def only(line: str) -> Collective:
    (found,) = collectives(f"{REGION}ENTRY %main () -> f32[] {{\n  {line}\n}}\n")
    return found


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_an_all_reduce_has_its_type_bytes_group_and_reducer(groups):
    found = only(
        f"%psum.4 = f32[2,1,224]{{2,1,0}} all-reduce(%x), channel_id=1, replica_groups={groups}, "
        'use_global_device_ids=true, to_apply=%region_1.2, metadata={op_name="jit(f)/psum"}'
    )
    assert found == Collective("all-reduce", "f32", 4, 2 * 224 * 4, "add")
    assert found.adds_floats
    assert found.sent_bytes == pytest.approx(2 * 3 / 4 * 2 * 224 * 4)


def test_a_combined_all_reduce_is_one_with_the_bytes_of_all_its_arrays():
    found = only(
        "%c = (f32[4]{0}, bf16[8,2]{1,0}, /*index=2*/f32[]) all-reduce(%a, %b, %c), "
        "replica_groups={{0,1}}, to_apply=%region_1.2"
    )
    assert (found.kind, found.dtype, found.nbytes) == ("all-reduce", "f32+bf16", 16 + 32 + 4)
    assert found.adds_floats


@pytest.mark.parametrize(
    ("line", "kind", "nbytes"),
    [
        ("%s = f32[4]{0} all-reduce-start(%a), replica_groups={{0,1}}", "all-reduce", 16),
        (
            "%s = (f32[4]{0}, f32[2]{0}) all-reduce-start(%a, %b), replica_groups={{0,1}}",
            "all-reduce",
            24,
        ),
        (
            "%s = (f32[4]{0}, f32[8]{0}) all-gather-start(f32[4]{0} %a), replica_groups={{0,1}}",
            "all-gather",
            32,
        ),
        (
            "%s = ((f32[4]{0}, s8[4]{0}), (f32[8]{0}, s8[8]{0})) all-gather-start(%a, %b), "
            "replica_groups={{0,1}}",
            "all-gather",
            40,
        ),
        (
            "%s = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%a), "
            "source_target_pairs={{0,1}}",
            "collective-permute",
            16,
        ),
    ],
)
def test_an_asynchronous_collective_counts_its_result_once(line, kind, nbytes):
    found = only(line)
    assert (found.kind, found.nbytes) == (kind, nbytes)


def test_the_end_of_an_asynchronous_collective_is_no_collective():
    assert collectives("  %d = f32[4]{0} all-reduce-done(%s)\n") == []


def test_a_reduce_scatter_has_the_bytes_that_go_into_it():
    found = only(
        "%r = f32[4]{0} reduce-scatter(%a), replica_groups=[1,8]<=[8], to_apply=%region_1.2"
    )
    assert found.nbytes == 8 * 16
    assert found.adds_floats


@pytest.mark.parametrize("dtype", ["s32", "u32", "pred", "s8"])
def test_a_sum_of_integers_adds_no_floats(dtype):
    line = f"%p = {dtype}[4]{{0}} all-reduce(%x), replica_groups={{{{0,1}}}}, to_apply=%region_1.2"
    assert not only(line).adds_floats


@pytest.mark.parametrize("dtype", ["bf16", "f8e4m3fn", "f16"])
def test_a_sum_of_short_floats_adds_floats(dtype):
    line = f"%p = {dtype}[4]{{0}} all-reduce(%x), replica_groups={{{{0,1}}}}, to_apply=%region_1.2"
    assert only(line).adds_floats


def test_a_reducer_that_is_not_found_is_taken_for_a_sum():
    assert only("%p = f32[4]{0} all-reduce(%x), replica_groups={}, to_apply=%lost").adds_floats


def test_a_layers_collectives_are_told_from_others():
    line = '%p = f32[4]{0} all-gather(%x), replica_groups=[1,2]<=[2], metadata={op_name="jit(f)/'
    assert only(line + 'jit(decoder_layer)/g"}').in_layer
    assert not only(line + 'g"}').in_layer


def test_alike_collectives_are_counted_together_in_order():
    one, two = Collective("all-reduce", "f32", 2, 8), Collective("all-gather", "f32", 2, 8)
    assert summary([two, one, two]) == [(two, 2), (one, 1)]


def test_a_fingerprint_is_that_of_instructions_not_of_where_they_stand_in_the_source():
    line = '  %a = f32[] add(%b, %c), metadata={op_name="add" stack_frame_id=%d}\n'
    assert fingerprint(line.replace("%d", "1")) == fingerprint(line.replace("%d", "2"))
    assert fingerprint(line) != fingerprint(line.replace("add(", "multiply("))


SAMPLES = {
    "all-reduce": lambda x: jax.lax.psum(x, ("model0", "model1")),
    "all-gather": lambda x: jax.lax.all_gather(x, ("model0", "model1"), axis=0, tiled=True),
    "all-to-all": lambda x: jax.lax.all_to_all(x, ("model0", "model1"), 1, 0, tiled=True),
    "collective-permute": lambda x: jax.lax.ppermute(x, "model1", [(0, 1), (1, 2), (2, 3), (3, 0)]),
    "reduce-scatter": lambda x: jax.lax.psum_scatter(x, ("model0", "model1"), tiled=True),
}


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("kind", SAMPLES)
def test_the_collectives_of_a_program_are_seen(kind, times):
    def program(x):
        for _ in range(times):
            x = jnp.sin(SAMPLES[kind](jnp.resize(x, (8, 64))))
        return x

    hlo = compiled_text(program)
    found = collectives(hlo)
    assert [(c.kind, c.dtype) for c in found] == [(kind, "f32")] * times
    assert all(c.nbytes for c in found)
    assert {c.adds_floats for c in found} == {kind in ("all-reduce", "reduce-scatter")}
    if kind != "collective-permute":
        assert {c.group_size for c in found} == {8}


def test_a_sum_over_two_axes_one_after_the_other_is_seen_as_two():
    program = partial(jax.lax.psum, axis_name="model0"), partial(jax.lax.psum, axis_name="model1")
    hlo = compiled_text(lambda x: program[1](jnp.sin(program[0](x))))
    assert [c.group_size for c in collectives(hlo)] == [2, 4]


def compiled_text(program) -> str:
    mesh, spec = make_mesh("2x4"), PartitionSpec(("model0", "model1"))
    mapped = jax.shard_map(program, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return jax.jit(mapped).lower(jnp.ones((64, 64))).compile().as_text()
