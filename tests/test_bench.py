# SPDX-License-Identifier: Apache-2.0
"""`meshwen bench`: what a step costs at least, what was measured, and how it is shown."""

import json
from math import prod

import jax.numpy as jnp
import numpy as np
import pytest

from mesh_model import shared_model
from meshwen.bench.costs import decode_cost, prefill_cost
from meshwen.bench.measure import Seconds, decode, first_token
from meshwen.bench.report_html import html_report
from meshwen.cache.budget import KVCachePlan
from meshwen.cli import main
from meshwen.engine.engine import Engine
from meshwen.models.parallel_model import ParallelModel
from meshwen.models.presets import preset
from meshwen.parallel.mesh import make_mesh
from tiny_model import ONE_LAYER

pytestmark = pytest.mark.usefixtures("unoptimised")
BFLOAT16, FLOAT32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)


def model(name: str, dtype=BFLOAT16, mesh: str = "1", quantization=None) -> ParallelModel:
    return ParallelModel(preset(name), make_mesh(mesh), dtype, "fast", quantization)


@pytest.mark.parametrize(
    ("name", "parameters", "embedding"),
    # As published: parameters, and those of an embedding table that a step does not read whole.
    [
        ("qwen2.5-7b", 7_615_616_512, 152_064 * 3_584),
        ("qwen2.5-0.5b", 494_032_768, 0),
        ("qwen3-8b", 8_190_735_360, 151_936 * 4_096),
    ],
)
def test_a_step_reads_every_weight_but_an_untied_embedding_table(name, parameters, embedding):
    found = decode_cost(model(name), batch=1, length=0)
    config = preset(name)
    assert found.bytes == 2 * (parameters - embedding + config.hidden_size)
    vectors = found.bytes // 2 - found.flops // 2  # Norms and biases are not multiplied.
    assert 0 < vectors < 0.001 * parameters


def test_a_longer_cache_and_a_larger_batch_cost_what_they_add():
    half = model("qwen2.5-0.5b")
    none, some = (decode_cost(half, 1, n) for n in (0, 100))
    # Qwen2.5-0.5B: 24 layers, 2 key/value heads and 14 query heads of 64, in bfloat16.
    assert some.bytes - none.bytes == 100 * 24 * 2 * 64 * (2 + 2)
    assert some.flops - none.flops == 100 * 24 * 14 * 64 * 4
    both = decode_cost(half, 2, 100)
    assert both.flops == 2 * some.flops
    assert both.bytes - some.bytes == some.bytes - none.bytes + 2 * 896


def test_a_prompt_costs_its_tokens_and_the_logits_of_the_last():
    half = model("qwen2.5-0.5b", FLOAT32)
    one, step = prefill_cost(half, 1), decode_cost(half, 1, 1)
    assert one.flops == step.flops
    many = prefill_cost(half, 512)
    body = 357_898_112  # Multiplied weights without the table: 0.36 B, as published.
    assert many.flops == pytest.approx(512 * 2 * body, rel=0.1)
    assert many.bytes < 1.01 * one.bytes
    # Of the last layer the others need keys and values alone.
    last = 2 * 896 * 896 + 3 * 896 * 4864 + 2 * 896  # A bias and a norm count too.
    more = prefill_cost(half, 3).flops - prefill_cost(half, 2).flops
    assert more == 2 * (body - last) + (23 * 3 + 1) * 14 * 64 * 4


def test_int8_weights_take_a_byte_and_their_share_of_a_scale_each():
    whole = model("qwen2.5-0.5b")
    found, before = (
        decode_cost(one, 1, 0) for one in (model("qwen2.5-0.5b", quantization="int8"), whole)
    )
    assert found.flops == before.flops
    # The table is the head too.
    shapes = [one.shape(whole.config.sizes) for one in whole.weights.declarations]
    matrices = sum(prod(shape) for shape in shapes if len(shape) == 2)
    assert before.bytes - found.bytes == 2 * matrices - matrices * 34 // 32


def test_the_mesh_has_no_part_in_the_cost():
    meshes = ("1", "1x8", "8x4")
    costs = {decode_cost(model("qwen2.5-7b", mesh=mesh), 8, 64) for mesh in meshes}
    assert len(costs) == 1


def test_the_roof_is_memory_below_the_ridge_and_matmuls_above():
    cost = decode_cost(model("qwen2.5-0.5b"), 1, 0)
    assert cost.least_seconds(bandwidth=1e9, rate=1e30) == cost.bytes / 1e9
    assert cost.least_seconds(bandwidth=1e30, rate=1e9) == cost.flops / 1e9


def test_seconds_are_the_median_and_the_spread():
    assert Seconds.of([3.0, 1.0, 2.0, 9.0]) == Seconds(median=2.5, least=1.0, most=9.0)


@pytest.fixture(scope="module")
def small_probes():
    """Probes that take no time: what the machine can do is not what is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("meshwen.bench.probes._READ_BYTES", 1 << 20)
        patch.setattr("meshwen.bench.probes._MATRIX", 64)
        yield


def test_every_length_and_batch_is_measured(small_probes, tmp_path, capsys):
    page, mesh = tmp_path / "bench.html", "data=2,model=2"
    sizes = ("--batch", "2,4", "--prompt-len", "5,20", "--gen-len", "2", "--runs", "1")
    assert main(["bench", "--mesh", mesh, *sizes, "--json", "--html", str(page)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["model"], found["mesh"]) == ("meshwen-bench-1", "demo", mesh)
    rows = [(row["phase"], row["batch"], row["length"]) for row in found["rows"]]
    assert rows == [
        *(("prefill", 1, length) for length in (5, 20)),
        *(("decode", batch, length) for batch in (2, 4) for length in (5, 20)),
    ]
    assert min(found["machine"].values()) > 0
    assert found["peak_bytes"] > 0
    for row in found["rows"]:
        assert 0 < row["seconds"]["least"] <= row["seconds"]["median"] <= row["seconds"]["most"]
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"]["median"])
        assert row["share"] > 0
    text = page.read_text(encoding="utf-8")
    assert text.count("<circle") == len(rows)
    assert "demo in bfloat16" in text


def test_a_prompt_that_is_timed_is_computed_from_its_beginning(monkeypatch):
    computed, plan = [], KVCachePlan(40, 32, 1, 1, max_num_seqs=1, max_model_len=120)
    engine = Engine(shared_model(ONE_LAYER).runner, None, (), plan)

    def run(requests):
        for event in Engine.run(engine, requests):
            computed.append(len(requests[0].prompt_tokens) - event.completion.cached_tokens)
            yield event

    monkeypatch.setattr(engine, "run", run)
    for length in (40, 100, 100):
        first_token(engine, length, runs=2)
    assert computed == [40] * 4 + [100] * 8


class Watched:
    """A runner that looks at what each step's attention reads."""

    def __init__(self, runner):
        self._runner, self.blocks_read = runner, 0

    def __getattr__(self, name):
        return getattr(self._runner, name)

    def step(self, cache, inputs, *how):
        parts = self.plan.data_devices
        for layer in cache:
            for array in layer:
                array = np.asarray(jnp.copy(array)).reshape(parts, -1, *array.shape[1:])
                held = np.isfinite(array) & (array != 0)
                for row, (table, length) in enumerate(
                    zip(inputs.tables, inputs.lengths, strict=True)
                ):
                    full = table[: length // self.model.backend.block_size]
                    assert held[row * parts // len(inputs.tables), full].any(axis=(1, 2, 3)).all()
                    self.blocks_read += len(full)
        return self._runner.step(cache, inputs, *how)


@pytest.mark.parametrize("mesh", ["1", "data=2"])
def test_a_step_that_is_timed_reads_keys_and_values_of_tokens(mesh):
    watched = Watched(shared_model(ONE_LAYER, mesh).runner)
    decode(watched, 4, 70, steps=1)
    assert watched.blocks_read == 3 * 2 * 4 * 2  # Steps, arrays, sequences, blocks.


def test_int8_is_measured_with_int8(small_probes, capsys):
    options = "--quantization int8 --batch 1 --prompt-len 8 --gen-len 1 --runs 1"
    assert main(["bench", *options.split()]) == 0
    output = capsys.readouterr().out
    assert "demo, int8, fast" in output
    assert "GFLOP/s in int8" in output


def test_a_terminal_gets_tables(small_probes, capsys):
    assert (
        main(["bench", "--batch", "1", "--prompt-len", "8", "--gen-len", "1", "--runs", "1"]) == 0
    )
    output = capsys.readouterr().out
    assert "the machine: reads" in output
    assert "time to the first token" in output
    assert "a decode step" in output


def test_a_page_escapes_what_it_shows():
    seconds, cost = {"median": 1.0, "least": 1.0, "most": 1.0}, {"bytes": 10, "flops": 20}
    row = {"phase": "decode", "batch": 1, "length": 1, "seconds": seconds, "cost": cost}
    rates = {"tokens_per_second": 1.0, "bytes_per_second": 10.0, "flops_per_second": 20.0}
    page = html_report(
        {
            **{"model": "<b>", "dtype": "float32", "mesh": "1", "numerics": "fast", "jax": "1"},
            **{"quantization": None, "products": "avx2", "compiler": "gcc 12.2.0"},
            **{
                "meshwen": "1",
                "device": "cpu",
                "peak_bytes": 1,
                "rows": [row | rates | {"share": 1}],
            },
            "machine": {"bandwidth": 1e9, "rate": 1e10},
        }
    )
    assert "<b>" not in page


@pytest.mark.parametrize(
    ("options", "output"),
    [
        ("--batch 0", "--batch must be whole numbers from 1 with commas between, such as"),
        ("--batch 1,x", "with commas between, such as 1,8,32, not '1,x'"),
        ("--prompt-len 100000", "are more than the model's context"),
        ("--html no/such/folder/b.html", "cannot write no/such/folder/b.html"),
        ("--mesh 1x", "mesh"),
        (
            "--batch 3 --mesh data=2",
            "--batch must be multiples of 2, the size of the mesh's data axes, not 3",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(options, output, capsys):
    assert main(["bench", *options.split()]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert output in error
