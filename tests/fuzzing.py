# SPDX-License-Identifier: Apache-2.0
"""Every reader of the package, with valid files and ways to alter them.

Whatever a file holds, its reader returns or raises a MeshwenError of one line. `test_fuzz.py` tries
some files in each run of the tests, `scripts/fuzz.py` (`make fuzz`) as many as time allows.
"""

import importlib.util
import io
import json
import tempfile
import zipfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from jax.sharding import AbstractMesh

import speller
from checkpoint_writers import CONFIG, float_gguf_tensors, random_weights, write_folder, write_gguf
from meshwen.checkpoints import name_kind, open_checkpoint
from meshwen.cli.options import parse_meshes
from meshwen.cli.prompts import read_prompts
from meshwen.common.arguments import token_ids
from meshwen.common.contained import Contained
from meshwen.common.json_files import parse_json
from meshwen.common.paths import user_path
from meshwen.engine.options import EngineOptions
from meshwen.engine.prefix_file import Prefix, read_prefix, write_prefix
from meshwen.engine.sampling_params import SamplingParams
from meshwen.errors import MeshwenError
from meshwen.evals.problems import read_problems
from meshwen.evals.run_file import FORMAT, RunFile
from meshwen.evals.styles import STYLES
from meshwen.models.qwen2 import Qwen2Config
from meshwen.parallel.mesh import MeshSpec
from meshwen.tokenizer.tokenizer import Tokenizer
from meshwen.verify.activation_file import read_activations
from meshwen.verify.certificate_file import FORMAT as CERTIFICATE
from meshwen.verify.certificate_file import as_json, read_certificate, with_hash
from meshwen.verify.operations import modules
from meshwen.verify.reference import read_golden
from tiny_model import ONE_LAYER

FINDINGS = Path(__file__).parent / "data" / "fuzz"


@dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
        read: reads a file's bytes; may write to the folder, which is its own.
        valid: returns a file that it reads.
        altered: a strategy for the bytes.
        cost: how many times slower it is than most; it is tried so much less.
        needs: a module without which it cannot be tried.
    """

    read: Callable[[bytes, Path], object]
    valid: Callable[[], bytes]
    altered: st.SearchStrategy[bytes]
    cost: int = 1
    needs: str | None = None

    @property
    def missing(self) -> bool:
        """Whether it cannot be tried here."""
        return self.needs is not None and importlib.util.find_spec(self.needs) is None


def check(target: Target, data: bytes) -> None:
    """Fails where the reader neither returns nor raises a MeshwenError of one line."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            target.read(data, Path(folder))
        except MeshwenError as error:
            assert "\n" not in str(error), f"more than one line: {error}"  # noqa: PT017


# --- Ways to alter a file

VALUES = [
    *(None, True, False, 0, 1, -1, 2, 3.5, -0.0, 1e-40, 1e308, float("nan"), float("inf")),
    *(2**31 - 1, 2**31, 2**32, 2**53, 2**63, 2**64, 10**30, "", "a", "1023", "\x1b[31m\n", "\0"),
    *("\ud800", "é" * 300, [], [[]], {}, [{}], {"a": 1}, [1, "a"], ["a"], {"type": "Sequence"}),
]


@st.composite
def altered_value(draw: Any, value: Any) -> Any:
    """A JSON value with up to three of its parts replaced, left out, renamed or put elsewhere."""
    value = deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(value))
        if not places:
            return draw(st.sampled_from(VALUES))
        inside, key = draw(st.sampled_from(places))
        how = draw(st.sampled_from(["replace", "replace", "leave out", "rename", "copy"]))
        if how == "replace":
            inside[key] = deepcopy(draw(st.sampled_from(VALUES)))
        elif how == "copy":
            other, of = draw(st.sampled_from(places))
            inside[key] = deepcopy(other[of])
        elif how == "leave out" or isinstance(inside, list):
            del inside[key]
        else:
            inside[draw(st.sampled_from(["", "a", "1.5", "\x1b", str(key) + "x"]))] = inside.pop(
                key
            )
    return value


def _places(value: Any) -> Any:
    keys = (
        range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ()
    )
    for key in list(keys)[:40]:  # Of a vocabulary, the beginning.
        yield value, key
        yield from _places(value[key])


@st.composite
def altered_bytes(draw: Any, data: bytes) -> bytes:
    """Bytes with up to three parts cut, doubled, swapped or written over."""
    found = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(found)))
        end = min(len(found), at + draw(st.sampled_from([0, 1, 4, 8, 100])))
        new = draw(
            st.sampled_from(
                [b"", b"\0", b"\xff", b"{", b'"', b"[" * 2000, b"\n", b"\xef\xbb\xbf", b"0" * 20]
                + [(size).to_bytes(8, "little") for size in (0, 1, 2**31, 2**63, 2**64 - 1)]
            )
            | st.binary(max_size=9)
        )
        found[at:end] = draw(st.sampled_from([new, bytes(found[at:end]) * 2]))
    return bytes(found)


def altered_json(content: Any) -> st.SearchStrategy[bytes]:
    """A JSON file, altered in its values, or in its bytes."""
    whole = json.dumps(content).encode()
    values = altered_value(content).map(lambda value: json.dumps(value).encode())
    return values | altered_bytes(whole)


def altered_lines(rows: list[Any]) -> st.SearchStrategy[bytes]:
    """A JSON lines file."""
    lines = altered_value(rows).map(
        lambda found: (
            b"".join(json.dumps(row).encode() + b"\n" for row in found)
            if isinstance(found, list)
            else json.dumps(found).encode()
        )
    )
    return lines | altered_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))


# --- Readers

MESSAGES = [{"role": "user", "content": "hi"}]


def _in_folder(name: str, data: bytes, folder: Path) -> Path:
    write_folder(folder)
    (folder / name).write_bytes(data)
    return folder


def _read_tensors(path: Path, load_format: str = "auto") -> None:
    with open_checkpoint(str(path), load_format=load_format) as checkpoint:
        for source in checkpoint.tensors.values():
            source.read()


def _read_config(data: bytes, folder: Path) -> None:
    Qwen2Config.from_json(_in_folder("config.json", data, folder)).to_dict()


def _read_generation_config(data: bytes, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(_safetensors())
    path = _in_folder("generation_config.json", data, folder)
    with open_checkpoint(str(path)) as checkpoint:
        SamplingParams.from_generation_config(checkpoint.generation_config)


def _read_weights(name: str, data: bytes, folder: Path) -> None:
    (folder / "shard.safetensors").write_bytes(_safetensors())
    _read_tensors(_in_folder(name, data, folder))


def _read_gguf(data: bytes, folder: Path) -> None:
    (folder / "a.gguf").write_bytes(data)
    with open_checkpoint(str(folder / "a.gguf")) as checkpoint:
        for source in checkpoint.tensors.values():
            source.read()
        SamplingParams.from_generation_config(checkpoint.generation_config)
        Tokenizer.from_checkpoint(checkpoint)


def _read_tokenizer(name: str, data: bytes, folder: Path) -> None:
    for other, content in _tokenizer_files().items():
        (folder / other).write_bytes(content)
    if name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer.json").unlink()
        (folder / "added_tokens.json").write_text('{"<|im_end|>": 258}')
    (folder / name).write_bytes(data)
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer.decode(tokenizer.encode("hi <|im_end|> é\n"))


def _render(data: bytes, folder: Path) -> None:
    variables = {"messages": MESSAGES, "tools": None, "add_generation_prompt": True}
    source = data.decode(errors="replace")
    _templates().ask({"template": source, "variables": variables, "max_characters": 10_000})


@cache
def _templates() -> Contained:
    return Contained("meshwen.tokenizer.chat_template_worker", "the chat template")


def _read_file(reader: Callable[[Path], object], data: bytes, folder: Path) -> None:
    (folder / "file").write_bytes(data)
    reader(folder / "file")


def _read_prompts(path: Path) -> None:
    for prompt in read_prompts(None, str(path)):
        prompt.title()


def _read_answer(text: str) -> None:
    for style in STYLES.values():
        for extract in style.extract.values():
            style.equal(extract(text), "18")


def _read_text(reader: Callable[[str], object], data: bytes, folder: Path) -> None:
    reader(data.decode(errors="surrogateescape"))


def _read_ids(data: bytes, folder: Path) -> None:
    token_ids("the ids", parse_json(data, "the ids"))


# --- Valid files


@cache
def _written(write: Callable[[Path], object]) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _read_activations(path: Path) -> None:
    model = EngineOptions().parallel_model(Qwen2Config.from_dict(CONFIG), AbstractMesh((), ()))
    read_activations(path, model.config, modules(model.weights))


def _activations() -> bytes:
    ids, values = np.array([[1, 2, 3]]), np.ones((1, 3, CONFIG["hidden_size"]), np.float32)
    arrays = {"input_ids": ids, "model.embed_tokens": values, "model.layers.0.mlp": values}
    return _written(lambda folder: np.savez(folder / "a.npz", **arrays))["a.npz"]


@st.composite
def _altered_arrays(draw: Any) -> bytes:
    """An archive that is whole, with one of its arrays altered."""
    with zipfile.ZipFile(io.BytesIO(_activations())) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    changed = draw(st.sampled_from(sorted(members)))
    members[changed] = draw(altered_bytes(members[changed][:200])) + members[changed][200:]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


PREFIX_OF = {"numerics": "fast", "dtype": "float32"}


def _read_prefix(path: Path) -> None:
    read_prefix(path, ONE_LAYER, np.dtype(np.float32), PREFIX_OF, most_tokens=64)


def _prefix() -> bytes:
    ids, (dtype, shape) = np.arange(32, dtype=np.int32), (np.float32, (1, 32, 2, 8))
    prefix = Prefix(ids, np.ones(shape, dtype), np.ones(shape, dtype))
    return _written(lambda folder: write_prefix(folder / "a", prefix, PREFIX_OF))["a"]


def _safetensors() -> bytes:
    return _written(lambda folder: write_folder(folder, random_weights()))["model.safetensors"]


def _altered_safetensors(whole: bytes) -> st.SearchStrategy[bytes]:
    """Altered in its header's values, in its header's bytes, or anywhere."""
    end = 8 + int.from_bytes(whole[:8], "little")
    header, rest = whole[8:end], whole[end:]

    def joined(header: bytes) -> bytes:
        return len(header).to_bytes(8, "little") + header + rest

    return (
        altered_json(json.loads(header)).map(joined)
        | altered_bytes(header).map(joined)
        | altered_bytes(whole)
    )


def _gguf() -> bytes:
    def write(folder: Path) -> None:
        alphabet = [chr(code) for code in range(0x100, 0x110)]

        def tokenizer(writer: Any) -> None:
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre("qwen2")
            writer.add_token_list([*alphabet, "<|im_end|>", alphabet[0] + alphabet[1]])
            writer.add_token_types([1] * len(alphabet) + [3, 1])
            writer.add_token_merges([f"{alphabet[0]} {alphabet[1]}"])
            writer.add_eos_token_id(len(alphabet))
            writer.add_chat_template("{{ messages }}")

        write_gguf(folder / "a.gguf", float_gguf_tensors(), extra=tokenizer)

    return _written(write)["a.gguf"]


def _altered_gguf() -> st.SearchStrategy[bytes]:
    whole = _gguf()
    head = 3000  # All of its metadata and tensor descriptions, and a little more.
    return altered_bytes(whole[:head]).map(lambda found: found + whole[head:]) | altered_bytes(
        whole
    )


def _torch() -> bytes:
    import torch

    def write(folder: Path) -> None:
        tensors = {
            name: torch.from_numpy(array) for name, array in random_weights(dtype="float32").items()
        }
        torch.save(tensors, folder / "pytorch_model.bin")

    return _written(write)["pytorch_model.bin"]


@cache
def _tokenizer_files() -> dict[str, bytes]:
    files = _written(speller.write_tokenizer)
    model = json.loads(files["tokenizer.json"])["model"]
    vocab = model["vocab"] | {"ab": 256, "abc": 257}
    return files | {
        "vocab.json": json.dumps(vocab).encode(),
        "merges.txt": MERGES,
    }


INDEX = {
    "metadata": {"total_size": 1},
    "weight_map": {"lm_head.weight": "shard.safetensors", "model.norm.weight": "shard.safetensors"},
}
GENERATION = {
    **{"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "max_new_tokens": 5},
    **{"repetition_penalty": 1.05, "eos_token_id": [1, 2], "stop_strings": ["a"]},
}
NEW_TOKEN = {"content": "<new>", "lstrip": True, "special": True}
TOKENIZER_CONFIG = {
    **{"bos_token": None, "eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}},
    **{"additional_special_tokens": ["<|im_start|>"], "added_tokens_decoder": {"259": NEW_TOKEN}},
    "chat_template": [{"name": "default", "template": "{{ messages }}"}],
}
CERTIFICATE_CONTENT = with_hash(
    {
        **{"format": CERTIFICATE, "ok": True, "broken": [], "weights_sha256": "a"},
        **{"dtype": "float32", "numerics": ["fast"], "meshes": ["1"]},
        **{"prompts": [[1]], "tokens": [[2]], "generated": {"fast": [[2]]}},
        "rows": [
            {
                **{"mesh": "1", "numerics": "fast", "hlo_sha256": "b"},
                "logits_sha256": {"whole": ["c"], "cached": ["d"]},
            }
        ],
        "environment": {"jax": "1"},
    }
)
SETTINGS = {"model": "m", "mesh": "1", "prompt_style": "qwen", "seed": 0}
ANSWER = {
    **{"id": 0, "sample": 0, "question": "?", "prompt_sha256": "a", "tokens": [1], "text": "7"},
    **{"extracted": "7", "gold": "7", "correct": True, "finish_reason": "stop", "elapsed": 1.5},
}
ANSWERS = (
    r"\boxed{\text{共}-\$1{,}234.5\text{元}}",
    "答案是1 234/2 1\u00bd million",
    r"1.5\times10^{3} = \frac{-1}{2} 12,34,567 1.234,5e3 \u201318^\circ",
    "The answer is: USD 18. #### 18",
)
PROMPTS = [
    {"prompt": "a", "x": 1},
    {"messages": MESSAGES, "tools": [{"type": "function"}]},
    {"prompt_tokens": [1, 2]},
]


def _rehashed() -> st.SearchStrategy[bytes]:
    """Certificates whose hash is that of the altered content."""
    content = {key: value for key, value in CERTIFICATE_CONTENT.items() if key != "content_sha256"}
    return altered_value(content).map(
        lambda found: as_json(with_hash(found) if isinstance(found, dict) else found).encode()
    )


def _json(read: Callable[[bytes, Path], object], content: Any) -> Target:
    return Target(read, lambda: json.dumps(content).encode(), altered_json(content))


def _lines(read: Callable[[bytes, Path], object], rows: list[Any]) -> Target:
    valid = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    return Target(read, lambda: valid, altered_lines(rows))


def _bytes(read: Callable[[bytes, Path], object], valid: bytes) -> Target:
    return Target(read, lambda: valid, altered_bytes(valid))


def _text(read: Callable[[str], object], *valid: str) -> Target:
    texts = st.sampled_from([text.encode() for text in valid]).flatmap(altered_bytes)
    any_text = st.text(max_size=40).map(lambda text: text.encode(errors="surrogatepass"))
    return Target(partial(_read_text, read), valid[0].encode, texts | any_text)


def _tokenizer_targets() -> dict[str, Target]:
    whole = json.loads(_tokenizer_files()["tokenizer.json"])
    contents = {
        "tokenizer.json": whole,
        "tokenizer_config.json": TOKENIZER_CONFIG,
        "special_tokens_map.json": {"eos_token": "<|im_end|>", "unk_token": None},
        "added_tokens.json": {"<|im_end|>": 258, "<new>": 259},
        "vocab.json": json.loads(_tokenizer_files()["vocab.json"]),
    }
    files = {"merges.txt": MERGES, "chat_template.jinja": speller.TEMPLATE.encode()}
    found = {name: _json(partial(_read_tokenizer, name), one) for name, one in contents.items()}
    found |= {name: _bytes(partial(_read_tokenizer, name), one) for name, one in files.items()}
    # One with other steps than the usual starts a process.
    return found | {"tokenizer.json": replace(found["tokenizer.json"], cost=4)}


def targets() -> dict[str, Target]:
    """Every reader by name."""
    certificate = _json(partial(_read_file, read_certificate), CERTIFICATE_CONTENT)
    safetensors = partial(_read_weights, "model.safetensors")
    torch = partial(_read_weights, "pytorch_model.bin")
    altered_torch = st.deferred(lambda: altered_bytes(_torch()))
    return {
        "config.json": _json(_read_config, CONFIG | {"rope_scaling": YARN}),
        "generation_config.json": _json(_read_generation_config, GENERATION),
        "model.safetensors": Target(
            safetensors, _safetensors, _altered_safetensors(_safetensors())
        ),
        "model.safetensors.index.json": _json(
            partial(_read_weights, "model.safetensors.index.json"), INDEX
        ),
        "a.gguf": Target(_read_gguf, _gguf, st.deferred(_altered_gguf), cost=2, needs="gguf"),
        "pytorch_model.bin": Target(torch, _torch, altered_torch, needs="torch"),
        **_tokenizer_targets(),
        "template": _bytes(_render, speller.TEMPLATE.encode() + b"{{ messages | tojson }}"),
        "certificate": replace(certificate, altered=certificate.altered | _rehashed()),
        "reference-outputs": _json(
            partial(_read_file, read_golden),
            {"cases": [{"input_ids": [1], "greedy": [2], "margins": [0.5]}]},
        ),
        "activations": Target(
            partial(_read_file, _read_activations),
            _activations,
            altered_bytes(_activations()) | _altered_arrays(),
        ),
        "prefix": Target(
            partial(_read_file, _read_prefix), _prefix, _altered_safetensors(_prefix())
        ),
        "run-file": _lines(
            partial(_read_file, RunFile.read),
            [{"format": FORMAT, "settings": SETTINGS}, ANSWER, ANSWER | {"id": 1}],
        ),
        "problems": _lines(
            partial(_read_file, read_problems), [{"question": "?", "answer": "#### 7"}] * 2
        ),
        "prompts": _lines(partial(_read_file, _read_prompts), PROMPTS),
        "mesh": _text(MeshSpec.parse, "2x4", "data=2,model=4"),
        "meshes": _text(parse_meshes, "1,2x4;data=2,model=4"),
        "model-name": _text(name_kind, "demo", "a/b", "~/a"),
        "path": _text(user_path, "/c/d.gguf", "~/b", "~a"),
        "token-ids": _json(_read_ids, [1, 2, 3]),
        "answer": _text(_read_answer, *ANSWERS),
    }


MERGES = b"#version: 0.2\na b\nab c\r\n"
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 1.0}


def findings() -> list[Path]:
    """Files that were once misread: `data/fuzz/TARGET/NAME`."""
    return sorted(path for path in FINDINGS.glob("*/*") if path.is_file())
