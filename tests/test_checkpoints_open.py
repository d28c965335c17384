# SPDX-License-Identifier: Apache-2.0
"""What `open_checkpoint` takes a string for, and what it says when there is nothing to open."""

import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import save_file

from checkpoint_writers import (
    CONFIG,
    float_gguf_tensors,
    random_weights,
    same_bits,
    write_folder,
    write_gguf,
    write_json,
)
from meshwen.checkpoints import open_checkpoint
from meshwen.checkpoints.hub import looks_like_hub_id
from meshwen.errors import MeshwenError
from meshwen.models.presets import preset


def error_of(path: object, **options: str) -> str:
    with pytest.raises(MeshwenError) as caught:
        open_checkpoint(str(path), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def no_hub(monkeypatch):
    def fail(*_: object, **__: object) -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)


@pytest.mark.parametrize("text", ["Qwen/Qwen2.5-0.5B-Instruct", "a/b", "org/name.v1_2"])
def test_organisation_slash_name_is_a_hub_id(text):
    assert looks_like_hub_id(text)


@pytest.mark.parametrize(
    "text",
    ["/a/b", "./a", "../a", "~/a", "a", "a/b/c", "a//b", "a/", "", "a/b.gguf", "a/b.safetensors"],
)
def test_anything_else_is_a_path_and_never_asks_the_hub(text, no_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert not looks_like_hub_id(text)
    message = error_of(text or "nothing-here")
    assert "does not exist" in message
    assert text in message


def test_a_relative_folder_goes_before_a_hub_id(no_hub, tmp_path, monkeypatch):
    write_folder(tmp_path / "org" / "name", random_weights())
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("org/name").name == "name"


def test_home_is_expanded(no_hub, tmp_path, monkeypatch):
    write_folder(tmp_path / "model", random_weights())
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_checkpoint("~/model").path == tmp_path / "model"


def test_folder_without_config_is_an_error(tmp_path):
    save_file(random_weights(), tmp_path / "model.safetensors")
    message = error_of(tmp_path)
    assert "config.json" in message
    assert str(tmp_path) in message


def test_another_architecture_is_an_error_before_any_weight_is_opened(tmp_path):
    write_json(tmp_path / "config.json", {"architectures": ["LlamaForCausalLM"]})
    (tmp_path / "model.safetensors").write_bytes(b"not opened")
    assert "LlamaForCausalLM" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("load_format", "expected"),
    [("auto", "safetensors, torch .bin or GGUF"), ("torch", "torch"), ("gguf", "gguf")],
)
def test_folder_without_weights_is_an_error(tmp_path, load_format, expected):
    write_folder(tmp_path)
    assert f"holds no {expected} weights" in error_of(tmp_path, load_format=load_format)


def test_asking_for_another_format_never_falls_back(tmp_path):
    write_folder(tmp_path, random_weights())
    assert "no gguf weights" in error_of(tmp_path, load_format="gguf")
    file = tmp_path / "model.safetensors"
    assert "with load format torch" in error_of(file, load_format="torch")


def test_unknown_load_format_lists_the_known_ones(tmp_path):
    assert "auto, safetensors, torch, gguf" in error_of(tmp_path, load_format="onnx")


def test_a_file_of_another_kind_is_an_error(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"x")
    assert "cannot open the file" in error_of(tmp_path / "model.onnx")


def test_an_empty_file_is_an_error(tmp_path):
    (tmp_path / "x.gguf").touch()
    assert "is empty" in error_of(tmp_path / "x.gguf")


def test_revision_of_a_path_is_an_error(tmp_path):
    write_folder(tmp_path, random_weights())
    assert "'v2'" in error_of(tmp_path, revision="v2")


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_malformed_generation_config_is_an_error(tmp_path, content):
    write_folder(tmp_path, random_weights())
    (tmp_path / "generation_config.json").write_text(content)
    assert "generation_config.json" in error_of(tmp_path)


@pytest.mark.parametrize("name", ["tiny.GGUF", "tiny.Gguf", "tiny", "tiny.bin"])
def test_a_gguf_file_may_have_any_name(tmp_path, name):
    path = write_gguf(tmp_path / name, float_gguf_tensors())
    for load_format in ("auto", "gguf"):
        checkpoint = open_checkpoint(str(path), load_format=load_format)
        assert (checkpoint.format, checkpoint.name) == ("gguf", "tiny")


def test_a_folder_is_searched_for_gguf_files_of_any_case_but_not_hidden_ones(tmp_path):
    write_gguf(tmp_path / "a.GGUF", float_gguf_tensors())
    (tmp_path / "._a.GGUF").write_bytes(b"what another system keeps beside a file")
    assert open_checkpoint(str(tmp_path)).path == tmp_path / "a.GGUF"


def test_a_link_has_its_own_name_and_not_that_of_what_it_leads_to(tmp_path):
    blobs = tmp_path / "blobs"
    write_folder(blobs / "0123abcd", random_weights())
    write_gguf(blobs / "4567ef", float_gguf_tensors())
    (tmp_path / "my-model").symlink_to(blobs / "0123abcd")
    (tmp_path / "tiny-q4.gguf").symlink_to(blobs / "4567ef")
    for path, name in (("my-model", "my-model"), ("tiny-q4.gguf", "tiny-q4")):
        checkpoint = open_checkpoint(str(tmp_path / path))
        assert checkpoint.name == checkpoint.config.name == name
        assert checkpoint.path == tmp_path / path


def test_a_base_model_saved_alone_has_the_names_of_the_whole(tmp_path):
    weights = random_weights()
    alone = {name.removeprefix("model."): array for name, array in weights.items()}
    checkpoint = open_checkpoint(str(write_folder(tmp_path, alone)))
    assert checkpoint.tensors.keys() == weights.keys()
    assert all(source.name == name for name, source in checkpoint.tensors.items())
    assert all(same_bits(checkpoint.tensors[name].read(), weights[name]) for name in weights)


def test_a_quantization_config_beside_whole_weights_is_said_and_ignored(tmp_path):
    folder = write_folder(tmp_path, random_weights())
    for declared, noted in (({}, 0), ({"quant_method": "gptq", "bits": 4}, 1)):
        write_json(folder / "config.json", CONFIG | {"quantization_config": declared})
        for load_format in ("auto", "dummy"):
            checkpoint = open_checkpoint(str(folder), load_format=load_format)
            assert len(checkpoint.notes) == noted
    assert 'quantization_config ("gptq") is ignored' in checkpoint.notes[0]


# What a config.json declares that its files do not hold, and what the refusal says.
TOO_LARGE = {
    "num_hidden_layers": (2**12, "num_hidden_layers is 4096, but the checkpoint holds 15 tensors"),
    "vocab_size": (2**24, "more than the checkpoint's"),
    "intermediate_size": (2**20, "more than the checkpoint's"),
}


@pytest.mark.parametrize("key", TOO_LARGE)
def test_dimensions_beyond_what_the_files_hold_are_refused_at_once(tmp_path, key):
    folder = write_folder(tmp_path, random_weights())
    value, said = TOO_LARGE[key]
    write_json(folder / "config.json", CONFIG | {key: value})
    message = error_of(folder)
    assert said in message
    assert str(folder / "config.json") in message
    write_json(folder / "config.json", CONFIG | {key: 2**31 - 1})
    assert f"{key} must be from 1 to" in error_of(folder)


SMALL_FILES = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
}
OTHER_FILES = {
    "model.safetensors",
    "pytorch_model.bin",
    "model-q4_k_m.gguf",
    "README.md",
    "onnx/config.json",
    "onnx/model.safetensors",
    "original/merges.txt",
    "original/pytorch_model.bin",
}


def downloaded(options: dict[str, object]) -> set[str]:
    """What of a repository's files the hub's library takes, given `snapshot_download`'s options."""
    patterns = {name: options[name] for name in ("allow_patterns", "ignore_patterns")}
    return set(filter_repo_objects(sorted(SMALL_FILES | OTHER_FILES), **patterns))


def test_hub_snapshot_is_opened_under_its_id(tmp_path, monkeypatch):
    asked = []
    write_folder(tmp_path / "snapshot", random_weights())

    def snapshot_download(repo_id: str, **options: object) -> str:
        asked.append((repo_id, options))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    checkpoint = open_checkpoint("org/name", revision="v1")
    assert checkpoint.name == checkpoint.config.name == "org/name"
    ((repo_id, options),) = asked
    assert (repo_id, options["revision"]) == ("org/name", "v1")
    assert downloaded(options) == {*SMALL_FILES, "model.safetensors"}


@pytest.mark.parametrize(("load_format", "rounds"), [("auto", 2), ("torch", 1), ("safetensors", 1)])
def test_torch_files_are_fetched_only_for_want_of_safetensors(
    tmp_path, monkeypatch, load_format, rounds
):
    asked = []
    write_folder(tmp_path)

    def snapshot_download(repo_id: str, **options: object) -> str:
        asked.append(options["allow_patterns"])
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert "weights" in error_of("org/name", load_format=load_format)
    assert len(asked) == rounds
    assert ("pytorch_model*.bin" in asked[-1]) == (load_format != "safetensors")


def test_dummy_weights_need_a_config_alone(tmp_path):
    write_folder(tmp_path / "tiny")
    for path in (tmp_path / "tiny", write_gguf(tmp_path / "x.gguf", float_gguf_tensors())):
        checkpoint = open_checkpoint(str(path), load_format="dummy")
        assert checkpoint.config.hidden_size == CONFIG["hidden_size"]
        assert (checkpoint.format, checkpoint.tensors) == (None, {})


def test_dummy_weights_take_the_tokenizer_that_is_there(tmp_path):
    folder = write_folder(tmp_path)
    assert open_checkpoint(str(folder), load_format="dummy").tokenizer_files is None
    (folder / "tokenizer.json").touch()
    assert open_checkpoint(str(folder), load_format="dummy").tokenizer_files == folder


def test_dummy_weights_of_a_hub_id_download_no_weights(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repo_id: str, **options: object) -> str:
        asked.append(downloaded(options))
        return str(write_folder(tmp_path))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    checkpoint = open_checkpoint("org/name", load_format="dummy")
    assert checkpoint.name == checkpoint.config.name == "org/name"
    assert asked == [SMALL_FILES]


def test_a_preset_is_a_config_without_weights(no_hub):
    checkpoint = open_checkpoint("Qwen2.5-7B", load_format="dummy")
    assert checkpoint.config == preset("qwen2.5-7b")
    assert (checkpoint.format, checkpoint.tensors, checkpoint.tokenizer_files) == (None, {}, None)
    assert "without weights" in error_of("qwen2.5-7b")
    assert "is for a hub id, and" in error_of("qwen2.5-7b", load_format="dummy", revision="v1")


def test_an_existing_folder_goes_before_a_preset_of_its_name(tmp_path, monkeypatch):
    write_folder(tmp_path / "qwen2.5-7b", random_weights())
    monkeypatch.chdir(tmp_path)
    for load_format in ("auto", "dummy"):
        checkpoint = open_checkpoint("qwen2.5-7b", load_format=load_format)
        assert checkpoint.config.hidden_size == CONFIG["hidden_size"]


def test_demo_is_the_embedded_checkpoint(tmp_path, monkeypatch):
    write_folder(tmp_path, random_weights())
    monkeypatch.setattr("meshwen.demo.path", lambda: tmp_path)
    assert open_checkpoint("demo").path == tmp_path


def test_gguf_from_the_hub_asks_for_a_path(no_hub):
    assert "hf download org/name" in error_of("org/name", load_format="gguf")


def test_an_unforeseen_download_failure_is_one_line(monkeypatch):
    def fail(*_: object, **__: object) -> str:
        raise OSError("disk full\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert "cannot download org/name from the hub: OSError: disk full" in error_of("org/name")


def test_offline_and_not_cached_says_both(monkeypatch, tmp_path):
    def fail(*_: object, **__: object) -> str:
        raise errors.LocalEntryNotFoundError("not there")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = error_of("org/name")
    assert "HF_HUB_OFFLINE is set" in message
    assert constants.HF_HUB_CACHE in message


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub that fails every request in the way that the repository's name asks for."""

    def do_GET(self) -> None:
        status, code = {
            "gated": (403, "GatedRepo"),
            "revision": (404, "RevisionNotFound"),
            "broken": (500, ""),
        }.get(self.path.split("/")[4], (404, "RepoNotFound"))
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub_address():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


_OPEN = """
import sys
from meshwen.checkpoints import open_checkpoint
from meshwen.errors import MeshwenError
try:
    open_checkpoint(sys.argv[1], revision=sys.argv[2] or None)
except MeshwenError as error:
    print(error)
"""


def open_in_subprocess(repo_id: str, home: Path, revision: str = "", **environment: str) -> str:
    """What a fresh process says; huggingface_hub reads its environment only once, at import."""
    inherited = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    result = subprocess.run(
        [sys.executable, "-c", _OPEN, repo_id, revision],
        env=inherited | {"HF_HOME": str(home)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    return line


@pytest.mark.parametrize(
    ("repo_id", "expected"),
    [
        ("org/gated", "org/gated is gated on the hub: accept its licence"),
        ("org/absent", "org/absent is neither a path here nor a repository on the hub"),
        ("org/revision", "org/revision has no revision 'v9' on the hub"),
        ("org/broken", "org/broken (revision v9) is not (wholly) in the hub cache"),
    ],
)
def test_each_hub_failure_has_its_line(hub_address, tmp_path, repo_id, expected):
    said = open_in_subprocess(repo_id, tmp_path, "v9", HF_ENDPOINT=hub_address, HF_HUB_OFFLINE="0")
    assert said.startswith(expected)


def test_no_network_is_one_line(tmp_path):
    said = open_in_subprocess(
        "org/name", tmp_path, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0"
    )
    assert "the hub cannot be reached" in said


def test_offline_mode_never_connects(tmp_path):
    said = open_in_subprocess("org/name", tmp_path, HF_HUB_OFFLINE="1")
    assert said.startswith("org/name is not (wholly) in the hub cache")
    assert "HF_HUB_OFFLINE is set" in said


def test_offline_mode_opens_what_is_cached(tmp_path):
    commit = "0" * 40
    repo = tmp_path / "hub" / "models--org--name"
    write_folder(repo / "snapshots" / commit, random_weights())
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    code = "from meshwen.checkpoints import open_checkpoint as o; print(o('org/name').name)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=dict(os.environ) | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert result.stdout == "org/name\n"
