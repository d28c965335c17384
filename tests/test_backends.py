# SPDX-License-Identifier: Apache-2.0
"""Back ends: what is particular to one no other inherits, and none changes what is computed."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_model import MeshModel, random_tokens, relative_error
from meshwen.common.choices import QUANTIZATIONS
from meshwen.errors import MeshwenError
from meshwen.ops.backend import Backend
from meshwen.ops.backends import backend_of
from meshwen.ops.cache_layout import CacheLayout
from meshwen.ops.cpu import kernels
from meshwen.ops.cpu.backend import CpuKernels
from meshwen.ops.cpu.kernels.shared_library import NONE, VARIABLE, InstructionSet
from meshwen.ops.cpu.xla import XlaOnCpu
from meshwen.parallel.mesh import make_mesh
from needs_kernels import needs_kernels
from tiny_model import ONE_LAYER

LENGTH = 9
TIED = replace(ONE_LAYER, tie_word_embeddings=True)


@pytest.mark.parametrize("mesh", ["1", "2x4"])
def test_cpus_have_a_back_end_of_their_own(mesh, monkeypatch):
    assert isinstance(backend_of(make_mesh(mesh)), XlaOnCpu)
    assert not isinstance(backend_of(make_mesh(mesh), with_kernels=False), CpuKernels)
    monkeypatch.setattr("meshwen.ops.cpu.kernels.instruction_set", lambda: None)
    assert not isinstance(backend_of(make_mesh(mesh)), CpuKernels)


@needs_kernels
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_ordered_products_have_one_name_whatever_the_instructions(quantization, monkeypatch):
    kept = (jnp.dtype(jnp.bfloat16), quantization)
    for one in kernels.supported():
        monkeypatch.setenv(VARIABLE, one.name)
        assert CpuKernels().matmul_name(*kept) == one.name
        assert CpuKernels().matmul_name(*kept, ordered=True) == "kernels"
    monkeypatch.setenv(VARIABLE, NONE)
    assert CpuKernels().matmul_name(*kept, ordered=True) == "xla"


@needs_kernels
@pytest.mark.parametrize("ordered", [True, False])
def test_only_products_in_any_order_are_of_pairs(ordered, monkeypatch):
    """Where the processor has an instruction for pairs of bfloat16, which adds in its own order."""
    of = InstructionSet("of pairs", has_bf16_dot=True)
    monkeypatch.setattr(kernels, "instruction_set", lambda: of)
    leaf = CpuKernels().format(None).pack(jnp.ones((32, 8), jnp.bfloat16), jnp.bfloat16)
    product = partial(CpuKernels().matmul, ordered=ordered)
    program = jax.make_jaxpr(product)(jnp.ones((3, 8), jnp.bfloat16), leaf)
    (call,) = (one for one in program.eqns if one.primitive.name == "ffi_call")
    assert call.invars[0].aval.dtype == (jnp.float32 if ordered else jnp.bfloat16)


def test_other_devices_inherit_nothing_from_cpus():
    backend = Backend()
    assert backend.cache_layout.keys == backend.cache_layout.values == "BSKH"
    assert backend.compiler_options(ordered=True) is None
    x, weight = jnp.ones((1, 4), jnp.bfloat16), jnp.ones((4, 3), jnp.bfloat16)
    for ordered in (False, True):
        for of, rows in ((backend, 1), (XlaOnCpu(), 8)):
            shapes = str(jax.make_jaxpr(partial(of.matmul, ordered=ordered))(x, weight))
            assert f"bf16[{rows},4]" in shapes
            assert (rows == 8) == ("pad" in shapes)


@pytest.mark.parametrize(
    ("config", "mesh", "dtype", "numerics", "quantization"),
    [
        (ONE_LAYER, "1", np.float32, "fast", None),
        (TIED, "data=2,model=4", jnp.bfloat16, "fast", None),
        (TIED, "1x8", np.float32, "exact", "int8"),
        (TIED, "2x4", jnp.bfloat16, "exact", None),
    ],
)
def test_a_model_computes_the_same_without_what_cpus_need(
    monkeypatch, config, mesh, dtype, numerics, quantization
):
    token_ids = random_tokens(config, 2, LENGTH)
    found = {}
    for backend in (Backend(), XlaOnCpu()):
        monkeypatch.setattr(
            "meshwen.models.parallel_model.backend_of", lambda *_, one=backend, **__: one
        )
        model = MeshModel(config, mesh, dtype, numerics=numerics, quantization=quantization)
        assert model.runner.cache_axes.split().index("heads") == (1 if backend != Backend() else 2)
        found[backend] = model.logits(token_ids), model.cached_logits(token_ids)
    bound = 1e-5 if dtype == np.float32 else 0.02
    expected, _ = found[XlaOnCpu()]
    for whole, cached in found.values():
        assert relative_error(whole, expected) < bound
        assert relative_error(cached, expected) < bound
    if numerics == "exact":  # CPU libraries have one order only in the shapes of their back end.
        whole, cached = found[XlaOnCpu()]
        np.testing.assert_array_equal(whole.view(np.int32), cached.view(np.int32))


def test_a_cache_whose_heads_cannot_be_split_alike_is_refused():
    with pytest.raises(ValueError, match="not at the same place in BKHS and BSKH"):
        CacheLayout(keys="BKHS", values="BSKH")
    with pytest.raises(ValueError, match="KBHS is no order"):
        CacheLayout(keys="KBHS")


@pytest.mark.parametrize("backend", [Backend(), XlaOnCpu()], ids=["plain", "cpu"])
def test_the_largest_is_the_first_of_equals(backend):
    rng = np.random.default_rng(0)
    for columns in (1, 7, 128, 384, 1000):
        x = rng.integers(0, 4, (5, columns)).astype(np.float32)
        values, places = backend.largest(jnp.asarray(x))
        np.testing.assert_array_equal(values[:, 0], x.max(axis=1))
        np.testing.assert_array_equal(places[:, 0], x.argmax(axis=1))


@pytest.mark.parametrize("backend", [Backend(), XlaOnCpu(), CpuKernels()], ids=repr)
def test_every_quantization_has_a_format_of_its_own(backend):
    for word in QUANTIZATIONS:
        assert backend.format(word).name.startswith(word)
        assert backend.format(word).bounds == Backend().format(word).bounds
        assert backend.format(word).rounds
    with pytest.raises(MeshwenError, match="quantization must be int8, not 'int4'"):
        backend.format("int4")
