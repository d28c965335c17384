# SPDX-License-Identifier: Apache-2.0
"""Options are declared once: Python, the commands and their help say the same of each."""

import re
from dataclasses import fields

import pytest
import typer

from meshwen import AutoModelForCausalLM, Qwen2ForCausalLM
from meshwen.cli import main
from meshwen.cli.app import app
from meshwen.cli.option_groups import group, with_groups
from meshwen.cli.options import engine_options
from meshwen.common.option_fields import options_of
from meshwen.engine.options import EngineKeywords, EngineOptions
from meshwen.engine.sampling_params import SamplingParams
from meshwen.errors import MeshwenError
from meshwen.server.options import ServerOptions

LOADING = {"mesh", "dtype", "numerics", "quantization", "load_format", "revision"}
SAMPLING = {
    *("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "seed", "stop"),
}
MEMORY = {"max_model_len", "kv_cache_memory", "prefix_caching"}
PROCESSES = {"coordinator", "num_processes", "process_id", "coordinator_timeout"}
ASKED_SERVER = {"url", "api_key", "timeout"}
ASKING = {
    *(LOADING - {"mesh"}),
    *MEMORY,
    *("model", "data", "train", "prompt_style", "limit", "offset"),
    *("max_num_seqs", "max_num_batched_tokens"),
    *("max_new_tokens", "temperature", "samples", "seed", "out", "resume", "html", "json"),
}
# Every option of every command.
COMMANDS = {
    "generate": LOADING
    | SAMPLING
    | MEMORY
    | PROCESSES
    | {"prompt", "model", "max_num_seqs", "max_num_batched_tokens", "prompt_lookup_num_tokens"}
    | {"system", "chat_template_kwargs", "raw", "prompts_file", "logprobs", "json", "no_stream"}
    | {"top_logprobs", "stop_token_ids", "ignore_eos", "load_prefix"},
    "chat": LOADING
    | SAMPLING
    | MEMORY
    | PROCESSES
    | {"model", "prompt_lookup_num_tokens", "system", "load"}
    | {"chat_template_kwargs", "load_prefix"}
    | ASKED_SERVER,
    "bench": LOADING
    | PROCESSES
    | {"model", "batch", "prompt_len", "gen_len", "runs", "html", "json"}
    | {"kv_cache_memory", "max_num_batched_tokens"},
    "serve": LOADING
    | MEMORY
    | PROCESSES
    | {"model", "max_num_seqs", "max_num_batched_tokens", "prompt_lookup_num_tokens"}
    | {"load_prefix"}
    | set(options_of(ServerOptions)),
    "inspect": LOADING | {"filter", "stats", "json"},
    "verify": (LOADING - {"mesh"})
    | PROCESSES
    | {"model", "meshes", "prompts", "max_new_tokens", "golden", "reference", "json", "html"}
    | {"against", "self_test", "activations", "tolerance", "pcc"},
    "eval gsm8k": ASKING | PROCESSES | ASKED_SERVER | {"mesh", "concurrency"},
    "eval meshes": ASKING | PROCESSES | {"meshes", "require"},
    "eval compare": {"require", "html", "json"},
}
# What a command says otherwise, and why it is not the same option.
ANOTHER_DEFAULT = {
    ("serve", "max_num_seqs"): 32,
    ("eval gsm8k", "max_num_seqs"): 32,
    ("eval meshes", "max_num_seqs"): 32,
    ("eval meshes", "numerics"): "exact",
    ("verify", "numerics"): None,  # Both.
    ("verify", "dtype"): None,  # The certificate's.
}
ANOTHER_HELP = {
    *(("verify", name) for name in ("numerics", "dtype", "max_new_tokens")),
    *((f"eval {one}", name) for one in ("gsm8k", "meshes") for name in SAMPLING),
}


def parameters(command):
    found = typer.main.get_command(app)
    for name in command.split():
        found = found.commands[name]
    return {
        max(one.opts, key=len).removeprefix("--").replace("-", "_"): one
        for one in found.params
        if one.opts[0].startswith("-")
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_its_options_and_no_others(command):
    found = parameters(command)
    assert set(found) == COMMANDS[command] | {"debug"}
    for name, flags in (
        ("max_num_seqs", {"--max-num-seqs", "--batch-size"}),
        ("max_new_tokens", {"--max-new-tokens", "--max-tokens", "-n"}),
        ("temperature", {"--temperature", "--temp"}),
        ("model", {"--model", "-m"}),
    ):
        if name in found:
            assert set(found[name].opts) == flags


@pytest.mark.parametrize("command", COMMANDS)
def test_an_option_of_a_command_is_the_one_of_python(command):
    defaults = {f.name: f.default for f in fields(EngineOptions)}
    found = parameters(command)
    for kind in (EngineOptions, SamplingParams, ServerOptions):
        if kind is ServerOptions and command != "serve":
            continue
        for name, option in options_of(kind).items():
            if name not in found:
                continue
            if (command, name) not in ANOTHER_HELP:
                assert found[name].help.startswith(option.help)
            for word in option.choices:
                assert word in found[name].metavar
            if kind is EngineOptions:
                default = ANOTHER_DEFAULT.get((command, name), defaults[name])
                assert found[name].default == default
            elif kind is ServerOptions:
                own = {f.name: f.default for f in fields(ServerOptions)}[name]
                assert found[name].default == (own or None if option.many else own)
            elif (command, name) not in ANOTHER_HELP:  # As the checkpoint says.
                assert not found[name].default


BAD = [
    ("dtype", "float16", "dtype must be float32 or bfloat16, not 'float16'"),
    ("numerics", "loose", "numerics must be fast or exact, not 'loose'"),
    ("quantization", "int4", "quantization must be int8, not 'int4'"),
    ("load_format", "zip", "must be auto, safetensors, torch, gguf or dummy, not 'zip'"),
    ("max_num_seqs", 0, "max_num_seqs must be at least 1, not 0"),
    ("max_model_len", 1, "max_model_len must be at least 2, not 1"),
    ("max_num_batched_tokens", 15, "max_num_batched_tokens must be at least 16, not 15"),
    ("kv_cache_memory", "5TB", 'kv_cache_memory must be bytes, such as "4GB", or a share of the '),
    ("prompt_lookup_num_tokens", 16, "prompt_lookup_num_tokens must be from 0 to 15, not 16"),
    ("mesh", "2y4", "mesh must be such as 8, 1x8, 2x4 or data=2,model=4, not '2y4'"),
    ("max_new_tokens", 0, "max_new_tokens must be at least 1, not 0"),
    ("temperature", -1.0, "temperature must be 0 (greedy) or more, not -1.0"),
    ("top_p", 1.5, "top_p must be above 0 and at most 1, not 1.5"),
    ("seed", -1, "seed must be from 0 to 4294967295, not -1"),
    ("presence_penalty", 2.5, "presence_penalty must be from -2 to 2, not 2.5"),
    ("frequency_penalty", -3.0, "frequency_penalty must be from -2 to 2, not -3.0"),
    ("top_logprobs", 21, "top_logprobs must be from 0 to 20, not 21"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD, ids=[name for name, *_ in BAD])
def test_an_impossible_value_is_refused_in_the_same_words_everywhere(capsys, name, value, message):
    python = EngineOptions if name in options_of(EngineOptions) else SamplingParams
    with pytest.raises(MeshwenError, match=re.escape(message)):
        python(**{name: value}) if name != "mesh" else EngineOptions(mesh=value).make_mesh()
    flag = f"--{name.replace('_', '-')}"
    assert main(["generate", "hi", flag, str(value)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message.replace(f"{name} must", f"{flag} must") in line


def test_a_step_has_room_for_a_token_of_each_sequence():
    EngineOptions(max_num_seqs=64, max_num_batched_tokens=64)
    for options in ({"max_num_seqs": 64, "max_num_batched_tokens": 63}, {"max_num_seqs": 513}):
        with pytest.raises(MeshwenError, match=r"tokens must be at least max_num_seqs, \d+, not"):
            EngineOptions(**options)


def test_what_is_given_is_kept_as_plain_values():
    import jax.numpy as jnp
    import numpy as np

    given = EngineOptions(dtype=jnp.bfloat16, max_num_seqs=np.int64(3), model_axes=["a", "b"])
    assert (given.dtype, given.max_num_seqs, given.model_axes) == ("bfloat16", 3, ("a", "b"))
    assert type(given.max_num_seqs) is int
    assert hash(given) == hash(EngineOptions(max_num_seqs=3, model_axes=("a", "b")))
    with pytest.raises(MeshwenError, match="revision must be text, not 5"):
        EngineOptions(revision=5)
    with pytest.raises(MeshwenError, match="prefix_caching must be true or false, not 'no'"):
        EngineOptions(prefix_caching="no")
    assert EngineOptions(prefix_caching=np.False_).prefix_caching is False
    found = [EngineOptions(kv_cache_memory=g).kv_cache_memory for g in ("2GiB", "50%", ".5", 7)]
    assert found == [2**31, 0.5, 0.5, 7]


@pytest.mark.parametrize("flags", [(), ("--prefix-caching",), ("--no-prefix-caching",)])
def test_what_is_on_by_default_has_a_flag_for_each(flags):
    program, found = typer.Typer(), []

    @program.command()
    @with_groups(engine=engine_options("prefix_caching"))
    def command(*, engine: EngineOptions):
        found.append(engine.prefix_caching)

    typer.main.get_command(program)(flags, standalone_mode=False)
    assert found == [flags != ("--no-prefix-caching",)]


def test_processes_compare_what_decides_a_result_and_not_where_files_are():
    compared = EngineOptions(revision="main", mesh="1x8", numerics="exact").compared()
    assert compared == {
        "dtype": "bfloat16",
        "numerics": "exact",
        "quantization": None,
        "max_num_seqs": 8,
        "max_model_len": None,
        "kv_cache_memory": None,
        "prefix_caching": True,
        "max_num_batched_tokens": 512,
        "prompt_lookup_num_tokens": 0,
    }


def test_keyword_arguments_are_those_of_the_dataclass():
    declared = {f.name: f.type for f in fields(EngineOptions)}
    keywords = {n: t.__forward_arg__ for n, t in EngineKeywords.__annotations__.items()}
    assert keywords == declared


@pytest.mark.parametrize(
    ("documented", "kind"),
    [
        (EngineOptions, EngineOptions),
        (AutoModelForCausalLM.from_pretrained, EngineOptions),
        (SamplingParams, SamplingParams),
        (ServerOptions, ServerOptions),
        (Qwen2ForCausalLM.generate, SamplingParams),
    ],
)
def test_help_in_python_shows_the_texts_of_the_command_line(documented, kind):
    text = " ".join(documented.__doc__.split())
    for name, option in options_of(kind).items():
        assert re.search(rf"\b{name} \(.*?\): {re.escape(option.help)}", text)


def test_a_group_stands_in_the_place_of_its_parameter():
    pair = group(lambda left, right: (left, right), {"left": (int, 1), "right": (int, 2)})

    @with_groups(both=pair)
    def command(first: str = "a", *, both: tuple[int, int], last: str = "z"):
        """What it does."""
        return first, both, last

    program = typer.Typer()
    program.command()(command)
    (found,) = [typer.main.get_command(program)]
    assert [one.name for one in found.params][:4] == ["first", "left", "right", "last"]
    assert found.help == "What it does."
    assert found(["--right", "5"], standalone_mode=False) == ("a", (1, 5), "z")
