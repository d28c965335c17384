# SPDX-License-Identifier: Apache-2.0
"""`meshwen verify`: whether every mesh gives what one device gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meshwen.cli import options
from meshwen.cli.console import note, output_console, say, working, write
from meshwen.cli.files import check_writable, write_text
from meshwen.cli.load import opened
from meshwen.cli.option_groups import with_groups
from meshwen.cli.prompts import read_prompts
from meshwen.cli.verify_activations import compare_file, one_run
from meshwen.common.choices import NUMERICS
from meshwen.common.option_fields import Option
from meshwen.engine.options import EngineOptions
from meshwen.engine.sampling_params import SamplingParams
from meshwen.errors import MeshwenError

if TYPE_CHECKING:
    from meshwen.checkpoints import Checkpoint
    from meshwen.cli.prompts import Prompt
    from meshwen.tokenizer.tokenizer import Tokenizer
    from meshwen.verify.workload import Workload

_MESHES = "1x1,1x8,2x4,8x4,1x32"
_STEPS = 16
_BOTH = "both"  # What --numerics may be, besides one of them.
_TRANSFORMERS = "transformers"  # What else can generate, for --reference.


def _file(option: str, help_text: str) -> Any:
    return typer.Option(option, metavar="FILE", help=help_text, show_default=False)


@with_groups(
    loading=options.engine_options("quantization", "load_format", "revision"),
    numerics=options.one_option(
        EngineOptions, "numerics", default=None, choices=(*NUMERICS, _BOTH), help="Default: both."
    ),
    dtype=options.one_option(
        EngineOptions,
        "dtype",
        default=None,
        help="Dtype of weights, matmul inputs and KV cache. Default: float32, whose bounds are the "
        "tightest.",
    ),
    max_new_tokens=options.one_option(
        SamplingParams,
        "max_new_tokens",
        default=None,
        help="Tokens to generate after each prompt, also past an end of text. Default: as many as "
        f"--golden has, or {_STEPS}.",
    ),
)
def verify(
    model: options.Model = "demo",
    meshes: Annotated[
        str | None,
        typer.Option(
            "--meshes",
            help="Meshes, with , or ; between them. All are compared with the first. "
            f"Default: {_MESHES}.",
            show_default=False,
        ),
    ] = None,
    *,
    numerics: str | None,
    dtype: str | None,
    loading: EngineOptions,
    prompts: Annotated[
        str | None, _file("--prompts", "A prompt a line, as generate's --prompts-file takes them.")
    ] = None,
    max_new_tokens: int | None,
    golden: Annotated[
        Path | None,
        _file(
            "--golden",
            "Tokens that the first mesh must generate: JSON "
            '{"cases": [{"input_ids": [...], "greedy": [...]}]}.',
        ),
    ] = None,
    reference: Annotated[
        str | None,
        options.declared(
            Option(
                "Compare the first mesh's tokens with those that transformers (PyTorch, float32) "
                "generates from the same files.",
                choices=(_TRANSFORMERS,),
            ),
            "--reference",
            show_default=False,
        ),
    ] = None,
    activations: Annotated[
        Path | None,
        _file(
            "--activations",
            "Compare with activations that another stack wrote with numpy.savez, and name the "
            "operation that is wrong; on one mesh, by default one device. See docs/verify.md.",
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        options.declared(
            Option(
                "With --activations: the largest difference allowed at a position, of the largest "
                "value there. Default: by dtype; 0.001 in float32.",
                type=float,
                least=0,
            ),
            "--tolerance",
            show_default=False,
        ),
    ] = None,
    pcc: Annotated[
        float | None,
        options.declared(
            Option(
                "With --activations: the least Pearson correlation allowed. Default: 0.99.",
                type=float,
                least=-1,
                most=1,
            ),
            "--pcc",
            show_default=False,
        ),
    ] = None,
    json_file: Annotated[
        Path | None, _file("--json", "Write a certificate; with --activations a report.")
    ] = None,
    html_file: Annotated[Path | None, _file("--html", "Write a report, one HTML file.")] = None,
    against: Annotated[
        Path | None,
        _file("--against", "Run the tokens of a certificate again, and report what differs."),
    ] = None,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Inject faults, and check that each is found.")
    ] = False,
    debug: options.Debug = False,
) -> int:
    """Check that every mesh gives what one device gives.

    All meshes compute the logits of the same tokens, which are compared with the first mesh's. The
    collectives of the compiled step are counted. Exit status 1: a promise was broken, the outcome
    is not the certificate's, or an activation is outside of the tolerance.
    """
    from meshwen.checkpoints.digest import weights_sha256
    from meshwen.engine.agreement import check_model, same_weights
    from meshwen.parallel.distributed import process_count, process_index
    from meshwen.runtime.compilation_cache import enable_compilation_cache
    from meshwen.verify.certificate import certificate, golden_comparison
    from meshwen.verify.parity import verify as run_verify
    from meshwen.verify.reference import transformers_cases

    read = [Path(file) for file in (activations, prompts, golden) if file is not None]
    check_writable(json_file, read)
    check_writable(html_file, [*read, json_file] if json_file else read)
    if activations is not None:
        given = {
            "--prompts": prompts,
            "--golden": golden,
            "--reference": reference,
            "--against": against,
            "--self-test": self_test or None,
            "--max-new-tokens": max_new_tokens,
        }
        engine = one_run(given, loading, meshes, numerics, dtype)
        return compare_file(model, activations, engine, tolerance, pcc, json_file, html_file)
    if tolerance is not None or pcc is not None:
        raise MeshwenError("--tolerance and --pcc are for --activations: leave them out")
    _check_together(prompts, golden, reference, against, self_test, max_new_tokens)
    before, cases = _read_together(against, golden)
    if meshes is None:
        meshes = ";".join(before["meshes"] if before else [_MESHES])
    specs = options.parse_meshes(meshes)
    if len(specs) == 1 and against is None:
        note("only one mesh: nothing to compare it with, but whole sequences with the KV cache")
    kind = dtype or (before["dtype"] if before else "float32")
    if before and loading.quantization is None:
        loading = replace(loading, quantization=before.get("quantization"))
    quantization = loading.quantization
    chosen = _numerics(numerics, before)
    enable_compilation_cache()
    with opened(model, loading) as checkpoint:
        digest = None
        if process_count() > 1:
            settings = {"dtype": kind, "quantization": quantization}
            check_model(checkpoint, None, settings, exact="exact" in chosen)
            digest = same_weights(checkpoint)
        if before is not None:  # With others nothing is the same: no need to compute it.
            digest = digest or weights_sha256(checkpoint)
            if digest != before["weights_sha256"]:
                write("differs from the certificate: weights; nothing was computed")
                return 1
        workload = _workload(checkpoint, prompts, cases, before, max_new_tokens)
        if reference is not None:
            note("transformers generates")
            cases = transformers_cases(checkpoint, workload.prompts, workload.steps)
        with _progress([f"{n} numerics on {m}" for n in chosen for m in specs]) as done:
            outcome = run_verify(
                checkpoint,
                specs,
                chosen,
                kind,
                workload,
                quantization=quantization,
                test_self=self_test,
                note=done,
            )
        source = "transformers" if reference is not None else "the reference outputs"
        compared = [
            golden_comparison(source, cases, tokens, quantization or kind, name)
            for name, tokens in outcome.generated.items()
            if cases is not None
        ]
        if digest is None and (json_file or html_file):
            digest = weights_sha256(checkpoint)
        found = certificate(checkpoint, outcome, kind, compared, digest, quantization)
    if process_index() == 0:
        _write(found, json_file, html_file)
    return 0 if _print(found, before) else 1


@contextmanager
def _progress(runs: Sequence[str]) -> Iterator[Callable[[str], None]]:
    """Shows which run is on its way; yields what is to be called with a line about each."""
    finished: list[str] = []

    def current() -> str:
        if len(finished) == len(runs):
            return "finishing"
        return f"{len(finished) + 1} of {len(runs)}: {runs[len(finished)]}"

    def done(text: str) -> None:
        finished.append(text)
        note(text)

    with working(current):
        yield done


def _check_together(
    prompts: str | None,
    golden: Path | None,
    reference: str | None,
    against: Path | None,
    self_test: bool,
    max_new_tokens: int | None,
) -> None:
    """Refuses options that do not go together."""
    from meshwen.parallel.distributed import process_count

    if against is not None and (prompts is not None or golden is not None or max_new_tokens):
        raise MeshwenError(
            "--against has its own prompts and tokens: leave out --prompts, --golden and "
            "--max-new-tokens"
        )
    if reference is not None and (golden is not None or against is not None):
        raise MeshwenError("--reference makes reference outputs: leave out --golden and --against")
    if golden is not None and prompts is not None:
        raise MeshwenError("--golden has its own prompts: leave out --prompts")
    for option, given in (("--self-test", self_test), ("--reference", reference is not None)):
        if given and process_count() > 1:
            raise MeshwenError(f"{option} runs in one process: leave out --coordinator")


def _read_together(against: Path | None, golden: Path | None) -> tuple[Any, Any]:
    """A certificate and reference outputs, where given, as process 0 reads them."""
    from meshwen.parallel.distributed import shared
    from meshwen.verify.certificate_file import read_certificate
    from meshwen.verify.reference import read_golden

    before = shared("certificate", lambda: None if against is None else read_certificate(against))
    return before, shared("golden", lambda: None if golden is None else read_golden(golden))


def _write(found: dict[str, Any], json_file: Path | None, html_file: Path | None) -> None:
    from meshwen.verify.certificate_file import as_json
    from meshwen.verify.report_html import html_report

    files = (("certificate", json_file, as_json), ("report", html_file, html_report))
    for name, file, text in files:
        if file is not None:
            write_text(file, text(found))
            note(f"the {name} is in {file}")


def _numerics(given: str | None, before: dict[str, Any] | None) -> list[Any]:
    if given is None and before is not None:
        return list(before["numerics"])
    return [*NUMERICS] if given in (None, _BOTH) else [given]


def _workload(
    checkpoint: Checkpoint,
    prompts: str | None,
    golden: list[dict[str, Any]] | None,
    before: dict[str, Any] | None,
    steps: int | None,
) -> Workload:
    """What to run: a certificate's tokens, reference prompts, the user's, or the built-in ones."""
    import numpy as np

    from meshwen.engine.request import check_prompt
    from meshwen.verify.workload import Workload, check_length

    tokens = None
    if before is not None:
        ids, tokens = before["prompts"], np.array(before["tokens"], np.int32)
        steps = tokens.shape[1]
    elif golden is not None:
        ids = [case["input_ids"] for case in golden]
        steps = steps or max(len(case["greedy"]) for case in golden)
    else:
        ids, steps = _prompt_ids(checkpoint, prompts), steps or _STEPS
    for number, one in enumerate(ids):
        check_prompt(one, checkpoint.config, f"prompt {number}")
    for number, one in enumerate(before["tokens"] if before else ()):
        check_prompt(one, checkpoint.config, f"the certificate's answer {number}")
    check_length(ids, steps, checkpoint.config)
    return Workload(tuple(map(tuple, ids)), steps, continuations=tokens)


def _prompt_ids(checkpoint: Checkpoint, prompts: str | None) -> Sequence[Sequence[int]]:
    from meshwen.cli.prompts import Prompt, ignored_fields
    from meshwen.parallel.distributed import shared
    from meshwen.tokenizer.tokenizer import Tokenizer
    from meshwen.verify.workload import BUILT_IN_PROMPTS, dummy_prompts

    read = shared(
        "prompts",
        lambda: None if prompts is None else [asdict(p) for p in read_prompts(None, prompts)],
    )
    if read is not None:
        given = [Prompt(**fields) for fields in read]
        if ignored := ignored_fields(given, returned=False):
            note(ignored)
        needed = not all(prompt.is_token_ids for prompt in given)
        tokenizer = Tokenizer.from_checkpoint(checkpoint) if needed else None
        return _shared_ids(given, tokenizer)
    try:
        tokenizer = Tokenizer.from_checkpoint(checkpoint)
    except MeshwenError as error:
        note(f"{error}; so the prompts are dummy token ids")
        tokenizer = None
    if tokenizer is None:
        return dummy_prompts(checkpoint.config)
    built_in = [Prompt("a built-in prompt", text) for text in BUILT_IN_PROMPTS]
    return _shared_ids(built_in, tokenizer)


def _shared_ids(prompts: Sequence[Prompt], tokenizer: Tokenizer | None) -> list[list[int]]:
    """What process 0 makes of prompts: a template may give something else every time."""
    from meshwen.parallel.distributed import shared

    return shared(
        "token ids",
        lambda: [list(p.token_ids(tokenizer, raw=False, system=None)) for p in prompts],
    )


def _print(found: dict[str, Any], before: dict[str, Any] | None) -> bool:
    """Prints tables and verdicts; whether all is well."""
    from meshwen.cli.verify_tables import print_certificate
    from meshwen.verify.certificate import differences

    console = output_console()
    print_certificate(found, console)
    if before is None:
        return bool(found["ok"])
    changed = differences(before, found)
    for line in changed["environment"]:
        say(console, f"environment: {line}")
    for line in changed["outcome"]:
        say(console, f"differs from the certificate: {line}")
    if not changed["outcome"]:
        other = " though the environment is another" if changed["environment"] else ""
        say(console, f"the outcome is the certificate's, to the bit{other}")
    return bool(found["ok"]) and not changed["outcome"]
