# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint says about its tokenizer: read from a folder's files or from GGUF metadata."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, cast

from typing_extensions import TypedDict

from meshwen.common.arguments import brief
from meshwen.common.json_files import TokenId, check_shape, read_json, read_text
from meshwen.common.paths import exists
from meshwen.errors import MeshwenError
from meshwen.tokenizer.backend import (
    QWEN2_SPLIT,
    Content,
    Decoder,
    Encoder,
    Token,
    TokenWithId,
    encoder,
)
from meshwen.tokenizer.chat_template import templates_in_folder

# Names of Qwen2's split; "default", and none, are what files have that older programs wrote.
GGUF_PRE_TOKENIZERS = ("qwen2", "deepseek-r1-qwen", "default", None)
GGUF_NORMAL, GGUF_CONTROL, GGUF_USER_DEFINED, GGUF_UNUSED = 1, 3, 4, 5
END_OF_TEXT = "<|endoftext|>"
_NAMES = [f"{name}_token" for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask")]
_HINT = "it is damaged, or no byte-level BPE as Qwen2's is"
_LIMIT_BYTES = 64 << 20  # tokenizer.json: 7 to 12 MB for 150,000 tokens.

_Named = str | Token | None


class _SpecialTokens(TypedDict):
    """What special_tokens_map.json and tokenizer_config.json call special."""

    bos_token: NotRequired[_Named]
    eos_token: NotRequired[_Named]
    pad_token: NotRequired[_Named]
    unk_token: NotRequired[_Named]
    sep_token: NotRequired[_Named]
    cls_token: NotRequired[_Named]
    mask_token: NotRequired[_Named]
    additional_special_tokens: NotRequired[list[str | Token] | None]
    extra_special_tokens: NotRequired[list[str | Token] | dict[str, str | Token] | None]


class _Config(_SpecialTokens):
    """The keys of tokenizer_config.json that are used."""

    added_tokens_decoder: NotRequired[dict[str, Token] | None]
    add_bos_token: NotRequired[bool | None]
    add_eos_token: NotRequired[bool | None]
    add_prefix_space: NotRequired[bool | None]
    split_special_tokens: NotRequired[bool | None]


@dataclass(frozen=True)
class TokenizerParts:
    """What a `Tokenizer` is made of.

    Attributes:
        encoder: the byte-level BPE, complete with added tokens and post-processor.
        vocab: every token's id, added ones included.
        special_ids: the tokens that `decode` leaves out.
        special_tokens: the text of `eos_token`, `pad_token`, `bos_token`, ..., where there is one.
        templates: chat templates by name.
        more_eos_token_ids: ids that end a text besides `eos_token`.
        splits_special_tokens: whether special tokens in a text are text.
    """

    encoder: Encoder
    vocab: Mapping[str, int]
    special_ids: frozenset[int]
    special_tokens: Mapping[str, str]
    templates: Mapping[str, str]
    more_eos_token_ids: tuple[int, ...] = ()
    splits_special_tokens: bool = False


def read_folder(folder: Path) -> TokenizerParts:
    """Read a checkpoint folder; see `Tokenizer.from_folder`."""
    config = _read_optional(folder / "tokenizer_config.json", _Config)
    older = _read_optional(folder / "special_tokens_map.json", _SpecialTokens)
    named = {**older, **config}
    special_tokens = {name: _text(named[name]) for name in _NAMES if named.get(name)}
    own = folder / "tokenizer.json"
    if has_own := _is_file(own):
        content = read_json(own, Content, hint=_HINT, limit_bytes=_LIMIT_BYTES)
        where = str(own)
    elif _is_file(folder / "vocab.json") and _is_file(folder / "merges.txt"):
        vocab = read_json(folder / "vocab.json", dict[str, TokenId])
        content = qwen2_content(vocab, _read_merges(folder / "merges.txt"))
        where = str(folder)
    else:
        raise MeshwenError(
            f"{folder}: no tokenizer here, neither tokenizer.json nor vocab.json with merges.txt"
        )
    added = _AddedTokens(content, where, keep_ids=not has_own)
    for token, index in _read_optional(folder / "added_tokens.json", dict[str, TokenId]).items():
        added.add(index, {"content": token}, folder / "added_tokens.json")
    _add_decoder(added, config.get("added_tokens_decoder") or {}, folder)
    added.mark_special(_extra_tokens(named), new=True)
    added.mark_special(special_tokens.values(), new=False)
    content = added.content()
    if not has_own:  # its post-processor decides, as in transformers
        flags = config.get("add_bos_token"), config.get("add_eos_token")
        content["post_processor"] = _affixes(content, special_tokens, *flags)
    content["split_special_tokens"] = bool(config.get("split_special_tokens"))
    if config.get("add_prefix_space"):
        _set_prefix_space(content)
    return _parts(content, where, special_tokens, templates_in_folder(folder, config))


def read_gguf(metadata: Mapping[str, Any]) -> TokenizerParts:
    """Read GGUF metadata; see `Tokenizer.from_gguf`."""
    where = "the GGUF file"
    model, pre = (metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if model != "gpt2" or pre not in GGUF_PRE_TOKENIZERS:
        raise MeshwenError(
            f"the GGUF tokenizer is model {model!r} with pre-tokenizer {pre!r}; meshwen reads "
            "model 'gpt2' with pre-tokenizer "
            f"{' or '.join(repr(name) for name in GGUF_PRE_TOKENIZERS if name)}"
        )
    found = check_shape(dict(metadata), _Gguf, where)
    tokens, merges = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.merges"]
    kinds = found.get("tokenizer.ggml.token_type") or _kinds(tokens, merges)
    if len(kinds) != len(tokens):
        raise MeshwenError(
            f"{where}: tokenizer.ggml.token_type has {len(kinds)} entries for {len(tokens)} tokens"
        )
    used = {index: token for index, token in enumerate(tokens) if kinds[index] != GGUF_UNUSED}
    vocab = {token: index for index, token in used.items()}
    if len(vocab) < len(used):
        raise MeshwenError(f"{where}'s tokenizer lists a token twice")
    added = _AddedTokens(qwen2_content(vocab, merges), where, keep_ids=True)
    for index, token in used.items():
        if kinds[index] in (GGUF_CONTROL, GGUF_USER_DEFINED):
            special = kinds[index] == GGUF_CONTROL
            added.add(index, {"content": token, "special": special, "normalized": False}, where)
    named = {
        "bos_token": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token": (eos := found.get("tokenizer.ggml.eos_token_id")),
        "pad_token": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    special_tokens = {
        name: used[index]
        for name, index in named.items()
        if isinstance(index, int) and index in used  # Nothing needs one to pad with.
    }
    bos = named["bos_token"] if metadata.get("tokenizer.ggml.add_bos_token") else None
    for name, needed in (("eos", eos), ("bos", bos)):
        if needed is not None and needed not in used:
            raise MeshwenError(
                f"{where}: tokenizer.ggml.{name}_token_id is {brief(needed)}, which is no token's"
            )
    added.mark_special(special_tokens.values(), new=False)
    content = added.content()
    flags = (metadata.get(f"tokenizer.ggml.add_{name}_token") for name in ("bos", "eos"))
    content["post_processor"] = _affixes(content, special_tokens, *flags)
    ends = (metadata.get("tokenizer.ggml.eot_token_id"), vocab.get(END_OF_TEXT))
    more = tuple(end for end in ends if end in used)
    return _parts(content, where, special_tokens, _gguf_templates(metadata), more)


_Gguf = TypedDict(
    "_Gguf",
    {
        "tokenizer.ggml.tokens": list[str],
        "tokenizer.ggml.merges": list[str],
        "tokenizer.ggml.token_type": NotRequired[list[int] | None],
        "tokenizer.ggml.eos_token_id": NotRequired[TokenId | None],
        "tokenizer.ggml.eot_token_id": NotRequired[TokenId | None],
        "tokenizer.ggml.add_bos_token": NotRequired[bool | None],
        "tokenizer.ggml.add_eos_token": NotRequired[bool | None],
        "tokenizer.chat_template": NotRequired[str],
    },
)


def _kinds(tokens: list[str], merges: list[str]) -> list[int]:
    """What a GGUF file's tokens are where it does not say: those that no merge makes are added."""
    made = {rule.replace(" ", "", 1) for rule in merges}
    return [
        GGUF_NORMAL
        if len(token) == 1 or token in made
        else GGUF_UNUSED
        if re.fullmatch(r"\[PAD\d+\]", token)
        else GGUF_CONTROL
        if re.fullmatch(r"<\|.+\|>", token)
        else GGUF_USER_DEFINED
        for token in tokens
    ]


def qwen2_content(vocab: Mapping[str, int], merges: list[str]) -> Content:
    """Qwen2's tokenizer.json around a vocabulary."""
    split = {"type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated"}
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "model": {"type": "BPE", "vocab": dict(vocab), "merges": merges},
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split | {"invert": False}, as_bytes | {"use_regex": False}],
        },
        "decoder": cast(Decoder, as_bytes),
    }


class _AddedTokens:
    """The added tokens of all files, with what each file says of them."""

    def __init__(self, content: Content, where: str, *, keep_ids: bool):
        """Begin with tokenizer.json's.

        Args:
            content: the tokenizer's.
            where: its file.
            keep_ids: put the tokens into the vocabulary, so that they keep the ids they are given
                though these leave gaps.
        """
        self._content, self._where, self._keep_ids = content, where, keep_ids
        self._ids = dict(content["model"]["vocab"])
        self._tokens: dict[int, Token] = {}
        for token in content.get("added_tokens", []):
            self.add(token["id"], token, where)

    def add(self, index: int, token: Token, source: Path | str) -> None:
        """Add a token, or take what another file says of one that is there.

        Flags that the other file leaves out stay as they are.

        Raises:
            MeshwenError: the id is another token's, or the token has another id.
        """
        text = token["content"]
        if not text:
            raise MeshwenError(f"{source}: the added token {index} is empty")
        here = self._tokens.get(index)
        known = self._ids.setdefault(text, index)
        if known != index or (here is not None and here["content"] != text):
            other = f"{text!r} {known}" if known != index else f"{here['content']!r} that id"  # type: ignore[index]
            raise MeshwenError(f"{source} gives {text!r} the id {index}, {self._where} {other}")
        self._tokens[index] = {**here, **token} if here else token

    def mark_special(self, tokens: Iterable[str], *, new: bool) -> None:
        """Make tokens special, which resets their other flags as in transformers.

        Args:
            tokens: as text.
            new: add those that are in no vocabulary.
        """
        for text in tokens:
            index = self._ids.get(text)
            if index is None and new:
                index = self._ids[text] = max(self._ids.values(), default=-1) + 1
            if index is not None:
                self._tokens[index] = {"content": text, "special": True}

    def content(self) -> Content:
        """The tokenizer's content with these tokens."""
        added = [cast(TokenWithId, {**self._tokens[at], "id": at}) for at in sorted(self._tokens)]
        model = self._content["model"]
        if self._keep_ids:
            model = {**model, "vocab": {**model["vocab"], **{t["content"]: t["id"] for t in added}}}
        return {**self._content, "model": model, "added_tokens": added}


def _parts(
    content: Content,
    where: str,
    special_tokens: Mapping[str, str],
    templates: Mapping[str, str],
    more_eos_token_ids: tuple[int, ...] = (),
) -> TokenizerParts:
    """Hold the vocabulary and the named tokens against each other, and make the encoder."""
    added = content.get("added_tokens", [])
    vocab = content["model"]["vocab"] | {token["content"]: token["id"] for token in added}
    if len(set(vocab.values())) < len(vocab):
        raise MeshwenError(f"{where}: the tokenizer's vocabulary gives an id twice")
    eos = special_tokens.get("eos_token")
    if eos is not None and eos not in vocab:
        raise MeshwenError(f"{where}: the eos_token {eos!r} is not in the vocabulary")
    return TokenizerParts(
        encoder(content, where),
        vocab,
        frozenset(token["id"] for token in added if token.get("special")),
        special_tokens,
        templates,
        more_eos_token_ids,
        content.get("split_special_tokens", False),
    )


def _affixes(
    content: Content, special_tokens: Mapping[str, str], bos: Any, eos: Any
) -> dict[str, Any]:
    """The post-processor that puts these tokens, where there are any, around a text."""
    ids = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    before, after = (
        [special_tokens[name]] if asked and special_tokens.get(name) in ids else []
        for name, asked in (("bos_token", bos), ("eos_token", eos))
    )
    text = {"Sequence": {"id": "A", "type_id": 0}}
    ends = [[{"SpecialToken": {"id": t, "type_id": 0}} for t in side] for side in (before, after)]
    return {
        "type": "TemplateProcessing",
        "single": [*ends[0], text, *ends[1]],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in before + after
        },
    }


def _set_prefix_space(content: Content) -> None:
    """Put a space before each text, as tokenizer_config.json's `add_prefix_space` asks."""
    steps = content.get("pre_tokenizer") or {}
    for step in (steps, *(steps.get("pretokenizers") or [])):
        if isinstance(step, dict) and step.get("type") == "ByteLevel":
            step["add_prefix_space"] = True


def _read_optional(path: Path, shape: type[Any]) -> dict[str, Any]:
    """Return the object in a JSON file, empty where there is no such file."""
    return dict(read_json(path, shape)) if _is_file(path) else {}


def _is_file(path: Path) -> bool:
    return exists(path) and path.is_file()


def _read_merges(path: Path) -> list[str]:
    lines = read_text(path).split("\n")
    if lines[0].startswith("#version"):
        lines = lines[1:]
    return [line.rstrip("\r") for line in lines if line.strip()]


def _text(token: str | Token) -> str:
    return token if isinstance(token, str) else token["content"]


def _extra_tokens(named: Mapping[str, Any]) -> list[str]:
    """Special tokens that have no name of their own."""
    extra = named.get("extra_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    return [_text(token) for token in [*(named.get("additional_special_tokens") or []), *extra]]


def _add_decoder(added: _AddedTokens, decoder: Mapping[str, Token], folder: Path) -> None:
    """Take tokenizer_config.json's added tokens, whose flags go before tokenizer.json's."""
    source = folder / "tokenizer_config.json"
    for index, token in sorted(decoder.items(), key=lambda item: (len(item[0]), item[0])):
        if not (index.isascii() and index.isdecimal() and len(index) < 10):
            raise MeshwenError(f"{source}: added_tokens_decoder has {index!r} for a token id")
        added.add(int(index), token, source)


def _gguf_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return a GGUF file's chat templates; the named ones stand after a dot."""
    prefix = "tokenizer.chat_template"
    named = {
        key.removeprefix(f"{prefix}."): value
        for key, value in metadata.items()
        if key.startswith(f"{prefix}.")
    }
    named |= {"default": metadata[prefix]} if prefix in metadata else {}
    return check_shape(named, dict[str, str], "the chat templates of the GGUF file")
