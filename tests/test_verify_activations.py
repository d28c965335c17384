# SPDX-License-Identifier: Apache-2.0
"""What is wrong in another stack's activations is named: the operation that made the error."""

from dataclasses import replace

import numpy as np
import pytest

from foreign_run import foreign_run
from meshwen.verify.activation_file import Activations
from meshwen.verify.activations import (
    compare_activations,
    first_outside,
    made_errors,
    missing_inputs,
)
from meshwen.verify.activations_report import verdict
from meshwen.verify.operations import EMBEDDING, FINAL_NORM, LOGITS, Operation, modules
from tiny_model import TINY, weights
from verify_model import mesh_run

pytestmark = pytest.mark.usefixtures("unoptimised")
ATTENTION = [Operation(layer, "attention output") for layer in range(2)]
MLP = [Operation(layer, "MLP output") for layer in range(2)]
OUTPUT = [Operation(layer, "layer output") for layer in range(2)]
NORMS = [
    Operation(layer, name)
    for layer in range(2)
    for name in ("input_layernorm", "post_attention_layernorm")
]
SUMS = {EMBEDDING, *ATTENTION, *MLP}


def activations(arrays, keep=None):
    """What a file with these arrays holds, or with those of some operations alone."""
    named = modules(mesh_run("1").runner.model.weights)
    values = {operation: arrays[name] for name, operation in named.items()}
    kept = {operation: x for operation, x in values.items() if keep is None or operation in keep}
    return Activations(arrays["input_ids"].astype(np.int32), kept)


def compared(arrays, keep=None, mesh="1", numerics="fast", tolerance=None):
    runner = mesh_run(mesh, numerics).runner
    return compare_activations(runner, activations(arrays, keep), tolerance, 0.99)


def wrong_run(config=TINY, **changed):
    """A run with other weights, by the end of their name, or with another config."""
    given = weights()
    for end, change in changed.items():
        (name,) = (name for name in given if name.endswith(end.replace("__", ".")))
        given = given | {name: change(given[name])}
    return foreign_run(config, given)


def without_a_part(weight):
    """A matrix [out, in] as if one of two devices had added nothing to the sum."""
    return np.where(np.arange(weight.shape[1]) < weight.shape[1] // 2, weight, 0)


def operations(found):
    return [one.operation for one in found]


@pytest.mark.parametrize(
    ("mesh", "numerics"), [("1", "fast"), ("4", "fast"), ("data=2,model=2", "exact")]
)
def test_a_right_run_is_within_the_tolerance_on_every_mesh(mesh, numerics):
    found = compared(foreign_run(TINY, weights()), mesh=mesh, numerics=numerics)
    assert len(found) == 13
    assert max(one.from_tokens.relative for one in found) < 1e-5
    assert max(one.from_inputs.relative for one in found) < 1e-5
    assert min(one.from_tokens.pcc for one in found) > 1 - 1e-9
    assert verdict(found) == ["every activation is within the tolerance"]


@pytest.mark.parametrize(
    ("wrong", "made"),
    [
        ({"embed_tokens__weight": lambda w: w * 1.01}, [EMBEDDING]),
        ({"0__self_attn__o_proj__weight": without_a_part}, [ATTENTION[0]]),
        ({"1__self_attn__k_proj__bias": np.zeros_like}, [ATTENTION[1]]),
        ({"0__mlp__gate_proj__weight": lambda w: w.reshape(32, 48).T}, [MLP[0]]),
        ({"1__mlp__down_proj__weight": without_a_part}, [MLP[1]]),
        ({"model__norm__weight": np.ones_like}, [FINAL_NORM]),
        ({"lm_head__weight": lambda w: np.roll(w, 1, axis=0)}, [LOGITS]),
        ({"config": replace(TINY, rope_theta=20000.0)}, ATTENTION),
        ({"config": replace(TINY, sliding_window=5)}, [ATTENTION[1]]),
        ({"config": replace(TINY, rms_norm_eps=0.1)}, [*NORMS, FINAL_NORM]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_operation_that_made_an_error_is_named(wrong, made):
    found = compared(wrong_run(**wrong))
    assert operations(made_errors(found)) == made
    assert first_outside(found).operation == made[0]
    assert not any(one.missing for one in found)


def test_an_error_that_is_inherited_is_told_from_one_that_is_made():
    arrays = wrong_run(
        **{"0__mlp__down_proj__weight": without_a_part, "1__self_attn__o_proj__weight": np.negative}
    )
    found = compared(arrays)
    assert operations(made_errors(found)) == [MLP[0], ATTENTION[1]]
    after = found[operations(found).index(MLP[0]) :]
    assert all(one.outside for one in after)
    assert verdict(found)[1] == "made by: layer 0, MLP output; layer 1, attention output"


def test_embedding_attention_and_mlp_alone_place_an_error():
    found = compared(wrong_run(**{"0__mlp__down_proj__weight": without_a_part}), keep=SUMS)
    assert operations(made_errors(found)) == [MLP[0]]
    assert not any(one.missing for one in found)


def test_layer_outputs_alone_place_an_error_in_its_layer():
    arrays = wrong_run(**{"0__mlp__down_proj__weight": without_a_part})
    found = compared(arrays, keep={EMBEDDING, *OUTPUT})
    (one,) = made_errors(found)
    assert one.operation == OUTPUT[0]
    assert one.missing == (ATTENTION[0], MLP[0])
    assert [one.outside for one in found] == [False, True, True]
    assert verdict(found)[1] == (
        "made by layer 0, layer output, or by what the file lacks: layer 0, attention output or "
        "layer 0, MLP output"
    )


def test_where_the_file_lacks_operations_only_the_first_error_after_them_is_blamed():
    found = compared(wrong_run(**{"0__self_attn__o_proj__weight": np.negative}), keep=set(MLP))
    assert [one.wrong_alone for one in found] == [True, True]
    (one,) = made_errors(found)
    assert one.operation == MLP[0]
    assert one.missing == (EMBEDDING, ATTENTION[0])


def test_logits_alone_can_be_compared():
    found = compared(wrong_run(**{"lm_head__weight": np.negative}), keep={LOGITS})
    assert operations(made_errors(found)) == [LOGITS]
    assert found[0].from_tokens.pcc < -0.99
    assert verdict(found)[1].startswith("made by logits, or by what the file lacks: embedding, att")


def test_differences_that_add_up_are_no_operations_error():
    right = foreign_run(TINY, weights())
    rounded = {n: x if n == "input_ids" else x.astype(np.float16) for n, x in right.items()}
    noisy = wrong_run(**{"embed_tokens__weight": lambda w: w * (1 + 1e-4)})
    arrays = rounded | {"model.norm": noisy["model.norm"], "lm_head": noisy["lm_head"]}
    found = compared(arrays, tolerance=1.0)
    assert not any(one.outside or one.wrong_alone for one in found)
    largest = max(one.from_inputs.relative for one in found)
    alone = [replace(one, tolerance=largest) for one in found]
    alone[-1] = replace(alone[-1], from_tokens=replace(alone[-1].from_tokens, relative=2 * largest))
    assert not made_errors(alone)
    assert verdict(alone)[1].startswith("no operation makes an error beyond the tolerance")


def test_the_tolerance_is_that_of_the_coarser_dtype():
    right = foreign_run(TINY, weights())
    half = {n: x if n == "input_ids" else x.astype(np.float16) for n, x in right.items()}
    assert {one.tolerance for one in compared(half)} == {5e-2}
    assert not made_errors(compared(half))
    assert made_errors(compared(half, tolerance=1e-6))


def test_an_error_at_one_position_is_not_hidden_by_large_values_at_another():
    right = foreign_run(TINY, weights())
    large = right["model.layers.1.mlp"].copy()
    large[0, 3] *= 1.05
    found = compared(right | {"model.layers.1.mlp": large}, keep={*SUMS, FINAL_NORM})
    one = first_outside(found)
    assert one.operation == MLP[1]
    assert one.from_tokens.pcc > 0.999
    assert one.from_tokens.at[:2] == (0, 3)


def test_several_layers_are_said_together():
    found = compared(wrong_run(config=replace(TINY, rope_theta=20000.0)))
    assert verdict(found)[1] == "made by: attention output of layers 0-1"


@pytest.mark.parametrize(
    ("has", "operation", "missing"),
    [
        (SUMS, LOGITS, ()),
        (SUMS - {ATTENTION[0]}, MLP[0], (ATTENTION[0],)),
        (SUMS - {ATTENTION[0]}, ATTENTION[1], (ATTENTION[0],)),
        ((SUMS - {ATTENTION[0]}) | {OUTPUT[0]}, ATTENTION[1], ()),
        ({NORMS[1]}, MLP[0], ()),
        ({NORMS[1]}, NORMS[1], (EMBEDDING, ATTENTION[0])),
        ({NORMS[1]}, ATTENTION[1], (EMBEDDING, ATTENTION[0], MLP[0])),
        ({FINAL_NORM}, LOGITS, ()),
    ],
)
def test_what_the_inputs_of_an_operation_lack(has, operation, missing):
    table = mesh_run("1").runner.model.weights
    assert missing_inputs(table, dict.fromkeys(has))[operation] == missing
