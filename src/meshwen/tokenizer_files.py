# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint says about its tokenizer: read from a folder's files or from GGUF metadata."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from meshwen.chat_template import templates_in_folder
from meshwen.errors import MeshwenError

# Qwen2's words, as its published tokenizer.json splits them: every digit stands alone.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GGUF_PRE_TOKENIZERS = ("qwen2", "deepseek-r1-qwen")  # two names of the same split
GGUF_CONTROL, GGUF_USER_DEFINED, GGUF_UNUSED = 3, 4, 5
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class TokenizerParts:
    """What a `Tokenizer` is made of.

    Attributes:
        backend: the byte-level BPE, complete with added tokens and post-processor.
        special_tokens: the text of `eos_token`, `pad_token`, `bos_token`, ..., where there is one.
        templates: chat templates by name.
        more_eos_token_ids: ids that end a text besides `eos_token`.
    """

    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, str]
    templates: Mapping[str, str]
    more_eos_token_ids: tuple[int, ...] = ()


def read_folder(folder: Path) -> TokenizerParts:
    """Read a checkpoint folder; see `Tokenizer.from_folder`."""
    config = _read_json_object(folder / "tokenizer_config.json")
    older = _read_json_object(folder / "special_tokens_map.json")
    special_tokens = _special_tokens(older | config, folder)
    added = _added_tokens(folder, config, special_tokens)
    has_tokenizer_json = (folder / "tokenizer.json").is_file()
    if has_tokenizer_json:
        backend = _load_tokenizer_json(folder / "tokenizer.json")
        _add_missing(backend, added, folder)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocab = _read_json_object(folder / "vocab.json")
        merges = _read_merges(folder / "merges.txt")
        backend = _build_backend(vocab, merges, added, where=str(folder))
    else:
        raise MeshwenError(
            f"{folder}: no tokenizer here, neither tokenizer.json nor vocab.json with merges.txt"
        )
    _mark_special(backend, special_tokens, where=str(folder))
    if not has_tokenizer_json:  # its post-processor decides, as in transformers
        _set_affixes(
            backend, special_tokens, config.get("add_bos_token"), config.get("add_eos_token")
        )
    return TokenizerParts(backend, special_tokens, templates_in_folder(folder, config))


def read_gguf(metadata: Mapping[str, Any]) -> TokenizerParts:
    """Read GGUF metadata; see `Tokenizer.from_gguf`."""
    model, pre = (metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if model != "gpt2" or pre not in GGUF_PRE_TOKENIZERS:
        raise MeshwenError(
            f"the GGUF tokenizer is model {model!r} with pre-tokenizer {pre!r}; meshwen reads "
            f"model 'gpt2' with pre-tokenizer {' or '.join(map(repr, GGUF_PRE_TOKENIZERS))}"
        )
    try:
        tokens = metadata["tokenizer.ggml.tokens"]
        kinds = metadata["tokenizer.ggml.token_type"]
        used = [
            (index, token, int(kind))
            for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind != GGUF_UNUSED
        ]
        merges = [_merge(rule) for rule in metadata["tokenizer.ggml.merges"]]
        special_tokens = {
            f"{name}_token": tokens[int(metadata[key])]
            for name, key in (
                ("bos", "tokenizer.ggml.bos_token_id"),
                ("eos", "tokenizer.ggml.eos_token_id"),
                ("pad", "tokenizer.ggml.padding_token_id"),
            )
            if metadata.get(key) is not None
        }
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise MeshwenError(f"the GGUF file's tokenizer metadata is broken: {error!r}") from error
    added = {
        index: AddedToken(token, special=kind == GGUF_CONTROL, normalized=False)
        for index, token, kind in used
        if kind in (GGUF_CONTROL, GGUF_USER_DEFINED)
    }
    vocab = {token: index for index, token, _ in used}
    if len(vocab) < len(used):
        raise MeshwenError("the GGUF file's tokenizer lists a token twice")
    backend = _build_backend(vocab, merges, added, where="the GGUF file")
    _mark_special(backend, special_tokens, where="the GGUF file")
    flags = [metadata.get(f"tokenizer.ggml.add_{name}_token") for name in ("bos", "eos")]
    _set_affixes(backend, special_tokens, *flags)
    ends = (metadata.get("tokenizer.ggml.eot_token_id"), backend.token_to_id(END_OF_TEXT))
    return TokenizerParts(
        backend,
        special_tokens,
        _gguf_templates(metadata),
        tuple(int(end) for end in ends if end is not None),
    )


def _build_backend(
    vocab: Mapping[str, int],
    merges: list[tuple[str, str]],
    added: Mapping[int, AddedToken],
    where: str,
) -> tokenizers.Tokenizer:
    """Assemble Qwen2's tokenizer from its parts."""
    # Added tokens are put into the vocabulary first, so that they keep the ids they were given.
    whole = {**vocab, **{token.content: index for index, token in added.items()}}
    try:
        backend = tokenizers.Tokenizer(BPE(vocab=whole, merges=merges))
    except Exception as error:  # the library raises nothing narrower
        raise MeshwenError(f"{where}: the tokenizer's vocabulary is broken: {error}") from error
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([added[index] for index in sorted(added)])
    return backend


def _mark_special(
    backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str], where: str
) -> None:
    """Make sure that the named special tokens exist, and that encoding and decoding know them."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for name, token in special_tokens.items():
        if backend.token_to_id(token) is None:
            raise MeshwenError(f"{where}: the {name} {token!r} is not in the vocabulary")
        if token not in known:
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])


def _set_affixes(
    backend: tokenizers.Tokenizer,
    special_tokens: Mapping[str, str],
    bos: bool | None,
    eos: bool | None,
) -> None:
    """Make `encode` put these tokens, where there are any, and no others around a text."""
    before = [special_tokens["bos_token"]] if bos and "bos_token" in special_tokens else []
    after = [special_tokens["eos_token"]] if eos and "eos_token" in special_tokens else []
    ids = {token: backend.token_to_id(token) for token in before + after}
    backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after], special_tokens=list(ids.items())
    )


def _load_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    try:
        # Not `from_file`, which takes no path that is not UTF-8.
        backend = tokenizers.Tokenizer.from_buffer(path.read_bytes())
    except Exception as error:  # the library raises nothing narrower
        raise MeshwenError(f"{path}: not a tokenizer: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MeshwenError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise MeshwenError(f"{path}: holds no JSON object")
    return content


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise MeshwenError(f"{path}: not readable: {error}") from error
    if lines[0].startswith("#version"):
        lines = lines[1:]
    return [_merge(line.rstrip("\r")) for line in lines if line.strip()]


def _merge(rule: str) -> tuple[str, str]:
    left, separator, right = rule.partition(" ")
    if not (left and separator and right) or " " in right:
        raise MeshwenError(f"the tokenizer's merge {rule!r} is not two tokens")
    return left, right


def _special_tokens(config: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Return the named special tokens (`eos_token` and so on), each text or an object in JSON."""
    names = [f"{name}_token" for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask")]
    tokens = {name: _text(config[name]) for name in names if config.get(name)}
    for name, token in tokens.items():
        if not isinstance(token, str):
            raise MeshwenError(f"{folder / 'tokenizer_config.json'}: {name} is not text: {token!r}")
    return tokens


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _added_tokens(
    folder: Path, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> dict[int, AddedToken]:
    """Return the added tokens by id, from tokenizer_config.json and the older added_tokens.json."""
    special = {*special_tokens.values(), *map(_text, config.get("additional_special_tokens") or ())}
    older = _read_json_object(folder / "added_tokens.json")
    newer = config.get("added_tokens_decoder") or {}
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    try:
        added = {
            int(index): AddedToken(token, special=token in special, normalized=False)
            for token, index in older.items()
        }
        for index, token in newer.items():
            chosen = {flag: bool(token[flag]) for flag in flags if flag in token}
            added[int(index)] = AddedToken(token["content"], **chosen)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise MeshwenError(
            f"{folder}: the added tokens in its tokenizer files are broken: {error!r}"
        ) from error
    return added


def _add_missing(
    backend: tokenizers.Tokenizer, added: Mapping[int, AddedToken], folder: Path
) -> None:
    """Add the tokens that tokenizer_config.json has and tokenizer.json has not."""
    for index in sorted(added):
        token = added[index]
        if backend.token_to_id(token.content) is None:
            backend.add_tokens([token])
        if backend.token_to_id(token.content) != index:
            raise MeshwenError(
                f"{folder}: tokenizer_config.json gives {token.content!r} the id {index}, "
                f"tokenizer.json {backend.token_to_id(token.content)}"
            )


def _gguf_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return a GGUF file's chat templates; the named ones stand after a dot."""
    prefix = "tokenizer.chat_template"
    named = {
        key.removeprefix(f"{prefix}."): value
        for key, value in metadata.items()
        if key.startswith(f"{prefix}.")
    }
    return named | ({"default": metadata[prefix]} if prefix in metadata else {})
