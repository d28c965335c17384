# SPDX-License-Identifier: Apache-2.0
"""Of compiled programs those used last are kept, and dropping one frees what it took."""

import gc
import sys
import weakref
from typing import NamedTuple

import jax
import numpy as np
import pytest

from mesh_model import MeshModel
from meshwen.engine.engine import Engine
from meshwen.engine.options import EngineOptions
from meshwen.engine.request import Request
from meshwen.engine.sampling_params import SamplingParams
from meshwen.ops.cpu.xla import XlaOnCpu
from meshwen.runtime.jax_settings import Jitted
from meshwen.runtime.programs import ProgramTable, ShapedProgram
from tiny_model import ONE_LAYER

pytestmark = pytest.mark.usefixtures("unoptimised")


def test_the_program_that_was_used_longest_ago_is_dropped():
    table, made = ProgramTable(2), []

    def make(key):
        made.append(key)
        return Jitted(lambda x: x)

    for key in "abacaba":
        table.get(key, lambda key=key: make(key))
    assert made == ["a", "b", "c", "b"]
    assert len(table) == 2


def sorter(table):
    return ShapedProgram(
        table, lambda: Jitted(lambda x, *, axis: x.sort(axis), static_argnames="axis")
    )


def test_each_shape_and_static_value_has_a_program_of_its_own():
    table = ProgramTable(9)
    one, other = sorter(table), sorter(table)
    x = np.arange(6.0, dtype=np.float32)[::-1].reshape(2, 3)
    for axis in (0, 1):
        for _ in range(2):
            np.testing.assert_array_equal(one(x, axis=axis), np.sort(x, axis))
    assert len(table) == 2
    one(x[:1], axis=1)
    assert one.lower(x, axis=1).compile() is not None
    assert len(table) == 3
    other(x, axis=1)
    assert len(table) == 4


class Pair(NamedTuple):
    left: np.ndarray
    right: np.ndarray | None


def test_each_shape_of_a_named_tuples_fields_has_a_program_of_its_own():
    table = ProgramTable(9)
    first = ShapedProgram(table, lambda: Jitted(lambda pair: pair.left))
    x = np.ones(3, np.float32)
    for right in (None, x, x[:2], None):
        first(Pair(x, right))
    assert len(table) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_dropped_program_gives_back_its_memory_maps():
    def maps_after(limit):
        program = sorter(ProgramTable(limit))
        for rows in range(1, 13):
            program(np.ones((rows, 7), np.float32), axis=0)
        gc.collect()
        with open("/proc/self/maps") as maps:
            return sum(1 for _ in maps), program

    before = maps_after(1)[0]  # Also what JAX itself needs once.
    dropped = maps_after(2)[0] - before
    kept, _program = maps_after(12)
    assert kept - before - dropped > 5 * (dropped + 1)


def test_a_model_that_keeps_few_programs_answers_alike(monkeypatch):
    requests = [
        Request(tuple(range(1, length)), SamplingParams(max_new_tokens=2)) for length in (6, 28, 6)
    ]
    found = []
    for limit in (48, 3):
        monkeypatch.setattr(XlaOnCpu, "programs", limit)
        model = MeshModel(ONE_LAYER, "1").runner
        answers = []
        for request in requests:
            engine = Engine(model, None, (), EngineOptions(max_num_seqs=1).cache_plan(model.model))
            answers += [event.token for event in engine.run([request])]
        found.append(answers)
        assert 3 <= len(model._programs) <= limit
    assert found[0] == found[1]


def test_a_models_weights_and_programs_end_with_it():
    model = MeshModel(ONE_LAYER, "1").runner
    model.logits(np.zeros((1, 4), np.int32))
    weight, table = weakref.ref(jax.tree.leaves(model.params)[0]), weakref.ref(model._programs)
    del model
    assert weight() is None
    assert table() is None
