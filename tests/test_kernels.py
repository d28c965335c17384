# SPDX-License-Identifier: Apache-2.0
"""The kernels: right, and with the same bits whatever is computed beside."""

import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import one_block
import reference
from emulated import every_instruction_set
from mesh_model import SMALL_7B, MeshModel, random_tokens
from meshwen.engine.engine import Engine
from meshwen.engine.options import EngineOptions
from meshwen.engine.request import Request
from meshwen.engine.sampling_params import SamplingParams
from meshwen.errors import MeshwenError
from meshwen.ops.cpu import kernels
from meshwen.ops.cpu.kernels import shared_library
from meshwen.ops.cpu.panels import PANELS
from needs_kernels import needs_kernels

pytestmark = needs_kernels


def test_kernels_are_there_wherever_their_needs_are_met():
    assert kernels.instruction_set() is kernels.supported()[0]
    assert kernels.supported()[-1].name == "portable"
    assert kernels.name("float32") == kernels.name("int8") == kernels.supported()[0].name
    assert kernels.name("float16") is None


# Every tile, of 1 to 12 rows; one block of rows and several.
ROWS = [*range(1, 14), 25, 49, 130]
# Contracted, columns: whole panels, parts of one, fewer columns than a tile, an odd sum, sums of
# several chunks.
SHAPES = [(2, 32), (64, 33), (896, 152), (152, 896), (77, 70), (64, 8), (1, 1), (1288, 1152)]
every_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@pytest.fixture(params=every_instruction_set(int8=False))
def instructions(request, monkeypatch):
    """Makes each set of instructions the one to be used, emulated where the CPU lacks it."""
    request.param.use(monkeypatch)
    return request.param


NATIVE = [] if needs_kernels.args[0] else [one.name for one in kernels.supported()]


@pytest.fixture
def native(request, monkeypatch):
    """Makes a set of instructions that the CPU has the one to be used."""
    found = next(one for one in kernels.supported() if one.name == request.param)
    monkeypatch.setattr(kernels, "instruction_set", lambda: found)


def multiply(a, b, alone=False):
    """a @ b by the kernel, whatever dtype they share."""
    return kernels.matmul(a, PANELS.pack(b.T, b.dtype), alone)


# A new object each time, so that jax traces it anew for each set of instructions.
@pytest.fixture
def product(instructions):
    return jax.jit(partial(multiply))


@pytest.fixture
def attention(instructions):
    return jax.jit(partial(one_block.attention))


@pytest.fixture
def products(instructions):
    """Many matmuls in one program: compiled one by one they take 20 times as long."""
    return jax.jit(lambda pairs: [multiply(a, b) for a, b in pairs])


def operands(dtype: str, rows: int, contracted: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(rows)
    a, b = rng.standard_normal((rows, contracted)), rng.standard_normal((contracted, columns))
    return a.astype(jnp.dtype(dtype)), b.astype(jnp.dtype(dtype))


def bits(array) -> np.ndarray:
    return np.asarray(array).view(np.int32)


@every_dtype
def test_the_product_is_that_of_float64(dtype, products):
    pairs = [operands(dtype, rows, *shape) for rows in ROWS for shape in SHAPES]
    for (a, b), found in zip(pairs, products(pairs), strict=True):
        a64, b64 = a.astype(np.float64), b.astype(np.float64)
        # Each addition rounds once; Higham's bound for a sum in one order.
        bound = len(b) * 2.0**-24 * (np.abs(a64) @ np.abs(b64))
        assert (np.abs(np.asarray(found, np.float64) - a64 @ b64) <= bound).all(), (
            a.shape,
            b.shape,
        )


@every_dtype
def test_an_element_has_the_same_bits_whatever_is_multiplied_beside_it(dtype, products):
    a, b = operands(dtype, 130, 1288, 608)
    places = [
        (rows, columns)
        for rows in (slice(0, 1), slice(3, 6), slice(7, 15), slice(100, 130))
        for columns in (slice(0, 32), slice(5, 70), slice(100, 252), slice(0, 608))
    ]
    whole, *parts = map(bits, products([(a, b), *((a[r], b[:, c]) for r, c in places)]))
    for place, part in zip(places, parts, strict=True):
        np.testing.assert_array_equal(part, whole[place])


@every_dtype
def test_a_thread_alone_gives_the_bits_of_several(dtype, instructions):
    pairs = [operands(dtype, *shape) for shape in ((1, 77, 700), (20, 300, 1100), (60, 96, 400))]
    arguments, _, _ = attended(dtype, *ATTENDED[4])

    def by(alone: bool) -> list[jax.Array]:
        attention = one_block.attention(*arguments, alone)
        return [*(multiply(a, b, alone) for a, b in pairs), attention]

    for shared, alone in zip(*(jax.jit(partial(by, x))() for x in (False, True)), strict=True):
        np.testing.assert_array_equal(bits(shared), bits(alone))


@every_dtype
def test_zeros_behind_a_sum_change_no_bit(dtype, products):
    a, b = operands(dtype, 9, 100, 64)
    longer = np.pad(a, ((0, 0), (0, 28))), np.pad(b, ((0, 28), (0, 0)))
    found, expected = products([longer, (a, b)])
    np.testing.assert_array_equal(bits(found), bits(expected))


@every_dtype
def test_nan_and_infinity_come_through(dtype, products):
    pairs = []
    for rows in (2, 30):
        a, b = np.ones((rows, 4), jnp.dtype(dtype)), np.ones((4, 32), jnp.dtype(dtype))
        a[0, 1], b[0, 3] = np.nan, np.inf
        pairs.append((a, b))
    for y in map(np.asarray, products(pairs)):
        assert np.isnan(y[0]).all()
        assert (y[1:, 3] == np.inf).all()
        assert (np.delete(y[1:], 3, axis=1) == 4).all()


@every_dtype
def test_devices_may_multiply_at_the_same_time(dtype, product):
    a, b = operands(dtype, 8, 256, 320)
    devices = jax.devices()[:4]
    expected = np.asarray(product(a, b))
    placed = [tuple(jax.device_put(x, device) for x in (a, b)) for device in devices]
    for _ in range(20):
        for found in [product(*pair) for pair in placed]:
            np.testing.assert_array_equal(np.asarray(found), expected)


# B, C, K, G, H, S, T, window, starts: decode steps and chunks of prompts, one pass over the slots
# and several, one block of rows and several.
ATTENDED = [
    (5, 5, 2, 7, 64, 96, 1, 0, [0, 95, 9, 94, 48]),
    (2, 3, 4, 7, 128, 32, 1, 5, [3, 20]),
    (2, 2, 1, 14, 32, 1056, 1, 100, [1000, 3]),
    (1, 1, 1, 3, 32, 64, 64, 0, [0]),
    (2, 2, 1, 2, 64, 1056, 40, 0, [500, 1000]),
    (1, 2, 1, 2, 32, 1088, 30, 600, [1040]),
    (1, 1, 2, 1, 128, 544, 25, 7, [500]),
    # Slots, or dimensions, that are no multiple of 32.
    (2, 2, 1, 2, 32, 24, 9, 0, [3, 15]),
    (1, 2, 2, 3, 8, 64, 20, 0, [30]),
]


def attended(dtype, B, C, K, G, H, S, T, window, starts) -> tuple[list, np.ndarray, np.ndarray]:
    """Arguments of `one_block.attention`, NaN where nothing is seen, and the result in float64."""
    rng = np.random.default_rng(0)
    q = (rng.standard_normal((B, K * G, T, H)) * H**-0.5).astype(np.float32)
    keys = rng.standard_normal((C, K, H, S)).astype(jnp.dtype(dtype)).astype(np.float32)
    values = rng.standard_normal((C, K, S, H)).astype(jnp.dtype(dtype)).astype(np.float32)
    rows, starts = np.arange(C - B, C, dtype=np.int32), np.array(starts, np.int32)
    window = window or S
    last = starts[:, None, None] + np.arange(T)[:, None]
    seen = (np.arange(S) <= last) & (np.arange(S) > last - window)  # [B, T, S]
    unseen = np.ones((C, S), bool)
    unseen[rows] = ~seen.any(axis=1)
    keys[np.broadcast_to(unseen[:, None, None], keys.shape)] = np.nan
    values = np.where(unseen[:, None, :, None], np.nan, values)
    scores = np.einsum("bkgth,bkhs->bkgts", q.reshape(B, K, G, T, H).astype(np.float64), keys[rows])
    scores = np.where(seen[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    finite = np.where(unseen[rows][:, None, :, None], 0, values[rows].astype(np.float64))
    expected = np.einsum("bkgts,bksh->bkgth", weights, finite).reshape(q.shape)
    kept = (a.astype(jnp.dtype(dtype)) for a in (keys, values))
    arguments = [q, *kept, rows, starts, np.int32(window)]
    return arguments, expected, q


@pytest.fixture
def attentions(instructions):
    """Many cases in one program: see `products`."""
    return jax.jit(lambda cases: [one_block.attention(*case) for case in cases])


@every_dtype
def test_attention_is_that_of_float64_over_the_slots_that_are_seen(dtype, attentions):
    cases = [attended(dtype, *case) for case in ATTENDED]
    found = attentions([arguments for arguments, _, _ in cases])
    for case, one, (_, expected, _) in zip(ATTENDED, found, cases, strict=True):
        np.testing.assert_allclose(one, expected, rtol=0, atol=2e-6, err_msg=str(case))


@every_dtype
def test_attention_of_a_token_has_the_same_bits_whatever_is_attended_to_beside_it(
    dtype, attentions
):
    cases, places = [attended(dtype, *case)[0] for case in ATTENDED], []
    for number, (q, keys, values, rows, starts, window) in enumerate(list(cases)):
        heads = q.shape[1] // keys.shape[1]
        for b, t in [(b, t) for b in range(len(q)) for t in range(0, q.shape[2], 8)]:
            alone = q[b : b + 1, :heads, t : t + 1]  # Of the first key/value head.
            row = keys[rows[b] :, :1][:1], values[rows[b] :, :1][:1]
            cases.append([alone, *row, np.zeros(1, np.int32), starts[b : b + 1] + t, window])
            places.append((number, b, slice(heads), slice(t, t + 1)))
    found = [bits(one) for one in attentions(cases)]
    for (number, *place), alone in zip(places, found[len(ATTENDED) :], strict=True):
        np.testing.assert_array_equal(alone[0], found[number][tuple(place)])


def test_attention_hides_no_number_that_is_not_finite(attention):
    for where in ("q", "keys", "values"):
        for bad in (np.nan, np.inf):
            _check_that_a_number_is_not_hidden(where, bad, attention)


def _check_that_a_number_is_not_hidden(where, bad, attention):
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((2, 2, 1, 32)), jnp.float32)
    keys = jnp.asarray(rng.standard_normal((2, 1, 32, 32)), jnp.bfloat16)
    values = jnp.asarray(rng.standard_normal((2, 1, 32, 32)), jnp.bfloat16)
    place = {"q": (0, 1, 0, 3), "keys": (0, 0, 3, 4), "values": (0, 0, 4, 3)}[where]
    arrays = {"q": q, "keys": keys, "values": values}
    arrays[where] = arrays[where].at[place].set(bad)
    if where == "keys":  # Where the query is not 0, and the score infinite in the right direction.
        arrays["q"] = arrays["q"].at[0, 1, 0, 3].set(1)
    rows, last = jnp.array([0, 1], jnp.int32), jnp.array([9, 9], jnp.int32)
    found = np.asarray(attention(*arrays.values(), rows, last, 32))
    assert not np.isfinite(found[0, 1]).all()
    assert np.isfinite(found[1]).all()


def test_attention_hides_no_nan_whose_lowest_bits_are_set(attention):
    # Added to an exponent, they would make a number of it; a single slot is divided by itself.
    nan = np.full((1, 1, 1, 32), 0x7FC001FF, np.uint32).view(np.float32)
    keys = values = jnp.ones((1, 1, 32, 32))
    first = jnp.zeros(1, jnp.int32)
    assert np.isnan(np.asarray(attention(nan, keys, values, first, first, 32))).all()


def test_factors_that_do_not_fit_are_refused():
    with pytest.raises(TypeError, match=r"\(2, 3\) cannot be multiplied with \(4, 40\)"):
        multiply(jnp.ones((2, 3)), jnp.ones((4, 40)))


def test_weights_of_other_dtypes_are_refused():
    with pytest.raises(
        TypeError, match="float32, bfloat16 or int8 are multiplied here, not float16"
    ):
        multiply(jnp.ones((2, 4), jnp.float16), jnp.ones((4, 40), jnp.float16))


def test_products_of_nothing_are_zeros(product):
    for rows, contracted, columns in ((3, 0, 40), (0, 8, 40), (3, 8, 0)):
        found = product(jnp.ones((rows, contracted)), jnp.ones((contracted, columns)))
        np.testing.assert_array_equal(np.asarray(found), np.zeros((rows, columns)))


def test_a_token_sees_itself_in_a_window_of_one(attention):
    q, keys, values = jnp.ones((1, 1, 1, 32)), jnp.ones((1, 1, 32, 32)), jnp.ones((1, 1, 32, 32))
    values = values * jnp.arange(32.0)[:, None]
    found = attention(q, keys, values, jnp.array([0]), jnp.array([9]), 1)
    np.testing.assert_array_equal(np.asarray(found), 9)


def test_threads_may_begin_at_the_same_time():
    # In a process of its own, where nothing is compiled yet.
    program = """
import concurrent.futures as f, jax.numpy as jnp
from meshwen.errors import MeshwenError
from meshwen.ops.cpu import kernels
from meshwen.ops.cpu.kernels import shared_library
from meshwen.ops.cpu.panels import PANELS
one = jnp.ones((4, 4), jnp.bfloat16)
weight = PANELS.pack(one, one.dtype)
with f.ThreadPoolExecutor(8) as pool:
    found = list(pool.map(lambda _: float(kernels.matmul(one, weight)[0, 0]), range(8)))
assert found == [4.0] * 8
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize("name", ["portable", "none", "sse9"])
def test_a_variable_chooses_a_lesser_instruction_set(name, monkeypatch):
    monkeypatch.setenv("MESHWEN_INSTRUCTION_SET", name)
    if name == "sse9":
        with pytest.raises(MeshwenError, match=r"SET=sse9: this processor has kernels for .*none"):
            kernels.instruction_set()
    else:
        assert kernels.label() == name


def test_a_package_without_kernels_says_so_once_and_goes_on(monkeypatch, caplog):
    with _loaded_anew(monkeypatch, "_NAME", "missing.so"):
        assert kernels.instruction_set() is kernels.instruction_set() is kernels.compiler() is None
        (said,) = caplog.messages
        assert "has no kernels for this processor, so XLA multiplies" in said
        assert "`make kernels`" in said


@contextmanager
def _loaded_anew(monkeypatch, name, value):
    """The library's module, with one of its names changed, before it has loaded anything."""
    caches = shared_library._loaded, shared_library.supported, shared_library._chosen
    with monkeypatch.context() as patched:
        patched.setattr(shared_library, name, value)
        for one in caches:
            one.cache_clear()
        try:
            yield
        finally:
            for one in caches:
                one.cache_clear()


def test_the_library_says_what_compiled_it():
    assert re.fullmatch(r"(clang|gcc) \d+\.\d+\.\d+( \(ziglang .+\))?", kernels.compiler())


def test_a_library_of_other_sources_is_refused_in_a_clone_alone(monkeypatch, tmp_path):
    changed = tmp_path / "csrc"
    shutil.copytree(shared_library._SOURCES, changed)
    (changed / "tile.h").write_text("// faster\n")
    with _loaded_anew(monkeypatch, "_SOURCES", changed):
        with pytest.raises(MeshwenError, match=r"compiled from other sources .* `make kernels` in"):
            kernels.instruction_set()
        monkeypatch.setattr(shared_library, "_in_clone", lambda: False)
        assert kernels.instruction_set()


def test_a_library_that_cannot_be_loaded_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "libkernels.so"
    path.write_bytes(b"a library for another platform")
    for one in (path, next(Path(np.__file__).parent.glob("random/*.so"))):
        with pytest.raises(MeshwenError, match=r"\.so cannot be loaded .*`make kernels`"):
            shared_library._registered(one)


def test_where_portable_c_alone_would_run_a_line_says_what_is_missing(monkeypatch, caplog):
    one = shared_library.InstructionSet("portable", False)
    with _loaded_anew(monkeypatch, "supported", lambda: (one,)):
        assert kernels.instruction_set() is kernels.instruction_set() is None
        (said,) = caplog.messages
        assert "lacks AVX2 and FMA" in said
        assert "so XLA multiplies" in said
        assert "MESHWEN_INSTRUCTION_SET=portable" in said
        monkeypatch.setenv("MESHWEN_INSTRUCTION_SET", "portable")
        assert kernels.instruction_set() == one
        assert len(caplog.messages) == 1


def test_attention_of_large_scores_neither_overflows_nor_loses_the_largest(attention):
    q = jnp.full((1, 1, 1, 32), 100.0)
    for ramp, likeliest in ((np.linspace(-10, 10, 1024), 1023), (np.linspace(10, -10, 1024), 0)):
        keys = jnp.asarray(ramp, jnp.float32) * jnp.ones((1, 1, 32, 1))
        values = jnp.arange(1024.0)[None, None, :, None] * jnp.ones(32)
        found = attention(q, keys, values, jnp.array([0]), jnp.array([1023]), 1024)
        np.testing.assert_allclose(np.asarray(found), likeliest, rtol=0, atol=1e-20)


SLIDING = replace(
    SMALL_7B,
    head_dim=32,
    sliding_window=5,
    layer_types=("full_attention", "sliding_attention"),
)


@pytest.mark.parametrize(
    ("native", "numerics", "dtype", "mesh"),
    [
        *((one, "fast", "bfloat16", "data=2,model=2") for one in NATIVE),
        # Slower instruction sets in one way only: their model is the same.
        *((one, "fast", "float32", "1") for one in NATIVE[:1]),
        *((one, "exact", "float32", "data=2,model=2") for one in NATIVE[:1]),
        *((one, "exact", "bfloat16", "1x8") for one in dict.fromkeys((*NATIVE[:1], *NATIVE[-1:]))),
    ],
    indirect=["native"],
)
def test_a_model_decodes_with_the_kernels_what_it_reads_at_once(mesh, numerics, dtype, native):
    model = MeshModel(SLIDING, mesh, jnp.dtype(dtype), numerics=numerics)
    token_ids = random_tokens(SLIDING, 2, 20, seed=3)
    expected = model.logits(token_ids)
    cache = model.cache(2, 32)
    _, cache = model.step(token_ids[:, :12], [0, 0], cache)
    found = []
    for position in range(12, 20):
        logits, cache = model.step(token_ids[:, position : position + 1], [position] * 2, cache)
        found.append(logits[:, 0])
    assert "meshwen_paged_attention" in model.compiled(2, 1, len(cache[0].keys)).as_text()
    found, expected = np.stack(found, axis=1), expected[:, 12:]
    if numerics == "exact":
        one = MeshModel(SLIDING, "1", jnp.dtype(dtype), numerics=numerics).logits(token_ids)
        vocabulary = slice(0, SLIDING.vocab_size)
        np.testing.assert_array_equal(bits(found), bits(expected))
        np.testing.assert_array_equal(
            bits(expected[..., vocabulary]), bits(one[:, 12:, vocabulary])
        )
    # XLA may fuse the steps otherwise, and another bit be rounded to another bfloat16.
    bound = 1e-5 if dtype == "float32" else 0.02
    assert np.abs(found - expected).max() < bound * np.abs(expected).max()


def test_the_engine_draws_what_is_likeliest_where_all_is_read_at_once():
    weights = reference.random_weights(SLIDING)
    rows = zip(random_tokens(SLIDING, 4, 20), (3, 20, 9, 14), strict=True)
    prompts = [row[:length].tolist() for row, length in rows]
    sampling = SamplingParams(max_new_tokens=12, temperature=0)  # With a prompt, 32 at most.
    requests = [Request(tuple(prompt), sampling) for prompt in prompts]
    model = MeshModel(SLIDING, "1", jnp.bfloat16, weights)
    runner = model.runner
    engine = Engine(
        runner, None, [], EngineOptions(max_num_seqs=3, max_model_len=32).cache_plan(runner.model)
    )
    answers = {e.request: e.completion.tokens for e in engine.run(requests) if e.completion}
    for number, prompt in enumerate(prompts):
        whole = np.array([[*prompt, *answers[number]]])
        logits = model.logits(np.pad(whole, ((0, 0), (0, 32 - whole.shape[1]))))[0]
        for place, token in enumerate(answers[number], start=len(prompt) - 1):
            shortfall = logits[place].max() - logits[place, token]
            assert shortfall <= 0.02 * np.abs(logits).max()
