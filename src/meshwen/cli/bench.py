# SPDX-License-Identifier: Apache-2.0
"""`meshwen bench`: how fast a model runs here, beside what the machine could do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meshwen.cli import options
from meshwen.cli.console import note, output_console, say, write
from meshwen.cli.files import check_writable, write_text
from meshwen.cli.load import load_model, opened
from meshwen.cli.option_groups import with_groups
from meshwen.cli.tables import PlainTable
from meshwen.common.json_files import to_json
from meshwen.common.option_fields import Option
from meshwen.common.units import bytes_text
from meshwen.engine.options import EngineOptions
from meshwen.errors import MeshwenError

if TYPE_CHECKING:
    from meshwen.bench.report import Machine, Row


@with_groups(
    engine=options.engine_options(*options.LOADING, "kv_cache_memory", "max_num_batched_tokens")
)
def bench(
    model: options.Model = "demo",
    *,
    engine: EngineOptions,
    batch: Annotated[
        str, typer.Option("--batch", help="Batch sizes, with commas between.")
    ] = "1,8",
    prompt_len: Annotated[
        str, typer.Option("--prompt-len", help="Lengths of prompts in tokens, with commas between.")
    ] = "128,512",
    gen_len: Annotated[
        int, options.declared(Option("Decode steps to time.", int, least=1), "--gen-len")
    ] = 16,
    runs: Annotated[int, options.declared(Option("Prefills to time.", int, least=1), "--runs")] = 5,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE",
            help="Write a report with the roofline plot, one HTML file.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: options.Debug = False,
) -> None:
    """Measure prefill and decode, beside the machine's own limits.

    The limits are measured first: bytes read a second, and operations a second in matmuls.
    Programs are compiled before they are timed; medians are shown. Let nothing else run meanwhile.
    """
    import jax.numpy as jnp

    from meshwen.bench.report import Machine, as_dict, measure
    from meshwen.parallel.distributed import process_index, shared
    from meshwen.parallel.mesh import DATA_AXIS
    from meshwen.tokenizer.tokenizer import Tokenizer

    batches, prompts = _sizes("--batch", batch), _sizes("--prompt-len", prompt_len)
    shared("report", lambda: check_writable(html))
    devices = engine.make_mesh()
    parts = devices.shape.get(DATA_AXIS, 1)
    if wrong := [size for size in batches if size % parts]:
        raise MeshwenError(
            f"--batch must be multiples of {parts}, the size of the mesh's data axes, "
            f"not {wrong[0]}"
        )
    with opened(model, engine) as checkpoint:
        context = checkpoint.config.context_length
        if max(prompts) + gen_len > context:
            raise MeshwenError(
                f"--prompt-len {max(prompts)} and --gen-len {gen_len} are more than the model's "
                f"context of {context} tokens: give less"
            )
        note("measuring what the machine can do")
        machine = Machine.of(devices, jnp.dtype(engine.dtype), engine.quantization)
        loaded = load_model(
            checkpoint,
            Tokenizer.from_checkpoint(checkpoint),
            replace(engine, max_num_seqs=max(batches)),
        )
    rows = measure(loaded, machine, batches, prompts, gen_len, runs, note)
    settings = {
        "model": loaded.config.name,
        "dtype": engine.dtype,
        "numerics": engine.numerics,
        "quantization": engine.quantization,
    }
    found = as_dict(loaded, machine, rows, settings)
    if as_json:
        write(to_json(found))
    else:
        _print(found, machine, rows)
    if html is not None and process_index() == 0:
        from meshwen.bench.report_html import html_report

        write_text(html, html_report(found))
        note(f"the report is in {html}")


def _sizes(option: str, text: str) -> list[int]:
    if not re.fullmatch(r"\s*[1-9]\d{0,8}\s*(,\s*[1-9]\d{0,8}\s*)*", text):
        raise MeshwenError(
            f"{option} must be whole numbers from 1 with commas between, such as 1,8,32, "
            f"not {text!r}"
        )
    return [int(size) for size in text.split(",")]


def _print(found: dict[str, Any], machine: Machine, rows: Sequence[Row]) -> None:
    from meshwen.ops.backend import XLA

    console = output_console()
    by = f", compiled by {found['compiler']}" if found["compiler"] else ""
    say(
        console,
        f"{found['model']}, {_weights(found)}, {found['numerics']}, mesh {found['mesh']}, "
        f"jax {found['jax']} on {found['device']}; peak memory {bytes_text(found['peak_bytes'])}\n"
        f"matmuls by {found['products']}{by}\n"
        f"the machine: reads {bytes_text(machine.bandwidth)}/s, multiplies "
        f"{machine.rate / 1e9:.0f} GFLOP/s in "
        f"{found['dtype'] if found['products'] == XLA else _weights(found)}",
    )
    for phase, title in (("prefill", "time to the first token"), ("decode", "a decode step")):
        table = PlainTable(
            title,
            *(">batch", ">tokens before", ">ms", ">least", ">most", ">tokens/s"),
            *(">read a second", ">GFLOP/s", ">of the limit"),
        )
        for row in rows:
            if row.phase == phase:
                table.add_row(*_cells(row))
        table.print(console)


def _weights(found: dict[str, Any]) -> str:
    """What the weights are kept in."""
    return found["quantization"] or found["dtype"]


def _cells(row: Row) -> list[str]:
    times = (row.seconds.median, row.seconds.least, row.seconds.most)
    return [
        str(row.batch),
        str(row.length),
        *(f"{seconds * 1e3:.1f}" for seconds in times),
        f"{row.tokens_per_second:,.1f}",
        bytes_text(row.bytes_per_second),
        f"{row.flops_per_second / 1e9:,.1f}",
        f"{row.share:.0%}",
    ]
