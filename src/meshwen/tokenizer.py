# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back: Qwen2's byte-level BPE, from a checkpoint folder or GGUF metadata."""

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from meshwen.chat_template import ChatTemplate, Message, templates_in_folder
from meshwen.errors import MeshwenError

# Qwen2's words, as its published tokenizer.json splits them: every digit stands alone.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GGUF_PRE_TOKENIZERS = ("qwen2", "deepseek-r1-qwen")  # two names of the same split
GGUF_CONTROL, GGUF_USER_DEFINED, GGUF_UNUSED = 3, 4, 5
END_OF_TEXT = "<|endoftext|>"


def byte_alphabet() -> dict[str, int]:
    """Return the 256 characters that stand for bytes in byte-level BPE (GPT-2's table).

    Printable Latin-1 characters stand for themselves; the others, in order, for U+0100 onwards.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(rest)}


BYTE_ALPHABET = byte_alphabet()


class Tokenizer:
    """Qwen2's byte-level BPE tokenizer, with its checkpoint's special tokens and chat template.

    Make one with `from_folder` or `from_gguf`. Token ids are plain ints.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        templates: Mapping[str, str],
        more_eos_token_ids: Iterable[int] = (),
    ):
        """Wrap a `tokenizers` tokenizer.

        Args:
            backend: must decode byte-level BPE.
            special_tokens: the text of `eos_token`, `pad_token`, `bos_token`, ..., where there is one.
            templates: chat templates by name.
            more_eos_token_ids: ids that end a text besides `eos_token`.

        Raises:
            MeshwenError: `backend` decodes in another way, or lacks one of the special tokens.
        """
        if not isinstance(backend.decoder, decoders.ByteLevel):
            raise MeshwenError(
                f"the tokenizer decodes with {type(backend.decoder).__name__}, not with ByteLevel as "
                "Qwen2's does"
            )
        for name, token in special_tokens.items():
            if backend.token_to_id(token) is None:
                raise MeshwenError(f"the tokenizer has no token {token!r}, which is its {name}")
        self._backend = backend
        self._special_tokens = dict(special_tokens)
        self._special_ids = frozenset(
            index for index, token in backend.get_added_tokens_decoder().items() if token.special
        )
        eos = self._special_id("eos_token")
        own_eos = [] if eos is None else [eos]
        self._eos_token_ids = tuple(dict.fromkeys([*own_eos, *more_eos_token_ids]))
        self._chat_template = ChatTemplate(templates, special_tokens)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read a checkpoint folder: tokenizer.json, or else vocab.json with merges.txt.

        tokenizer_config.json, where there is one, gives the special tokens, further added tokens,
        whether to begin texts with `bos_token`, and the chat template.

        Raises:
            MeshwenError: there is no tokenizer in the folder, or one of its files is broken.
        """
        folder = Path(folder)
        config = _read_json_object(folder / "tokenizer_config.json")
        special_tokens = _special_tokens(
            _read_json_object(folder / "special_tokens_map.json") | config
        )
        added = _added_tokens(folder, config, special_tokens)
        if (folder / "tokenizer.json").is_file():
            backend = _load_tokenizer_json(folder / "tokenizer.json")
            _add_missing(backend, added, folder)
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            vocab = _read_json_object(folder / "vocab.json")
            merges = _read_merges(folder / "merges.txt")
            backend = _build_backend(vocab, merges, added, where=str(folder))
        else:
            raise MeshwenError(
                f"{folder}: no tokenizer here (neither tokenizer.json nor vocab.json with merges.txt)"
            )
        if config.get("add_bos_token") is not None or config.get("add_eos_token") is not None:
            _set_affixes(
                backend,
                special_tokens.get("bos_token") if config.get("add_bos_token") else None,
                special_tokens.get("eos_token") if config.get("add_eos_token") else None,
            )
        return cls(
            backend, special_tokens=special_tokens, templates=templates_in_folder(folder, config)
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> "Tokenizer":
        """Build the tokenizer that a GGUF file describes.

        `eos_token_ids` also holds `tokenizer.ggml.eot_token_id` and `<|endoftext|>`: GGUF has no
        generation_config.json, where Qwen's chat checkpoints say that both end a text.

        Args:
            metadata: `tokenizer.*` keys to plain values (lists of str and int for arrays).

        Raises:
            MeshwenError: it is not Qwen2's kind of tokenizer, or a key is missing.
        """
        model, pre = (metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
        if model != "gpt2" or pre not in GGUF_PRE_TOKENIZERS:
            raise MeshwenError(
                f"the GGUF tokenizer is model {model!r} with pre-tokenizer {pre!r}; meshwen reads "
                f"model 'gpt2' with pre-tokenizer {' or '.join(map(repr, GGUF_PRE_TOKENIZERS))}"
            )
        try:
            tokens: Sequence[str] = metadata["tokenizer.ggml.tokens"]
            kinds: Sequence[int] = metadata["tokenizer.ggml.token_type"]
            merges = [_merge(rule) for rule in metadata["tokenizer.ggml.merges"]]
        except KeyError as error:
            raise MeshwenError(f"the GGUF file lacks the metadata {error}") from error
        used = [
            (index, token, kind)
            for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind != GGUF_UNUSED
        ]
        added = {
            index: AddedToken(token, special=bool(kind == GGUF_CONTROL), normalized=False)
            for index, token, kind in used
            if kind in (GGUF_CONTROL, GGUF_USER_DEFINED)
        }
        vocab = {token: index for index, token, _ in used}
        backend = _build_backend(vocab, merges, added, where="the GGUF file")
        special_tokens = {
            f"{name}_token": tokens[int(metadata[key])]
            for name, key in (
                ("bos", "tokenizer.ggml.bos_token_id"),
                ("eos", "tokenizer.ggml.eos_token_id"),
                ("pad", "tokenizer.ggml.padding_token_id"),
            )
            if metadata.get(key) is not None
        }
        _set_affixes(
            backend,
            special_tokens.get("bos_token")
            if metadata.get("tokenizer.ggml.add_bos_token")
            else None,
            special_tokens.get("eos_token")
            if metadata.get("tokenizer.ggml.add_eos_token")
            else None,
        )
        ends = (metadata.get("tokenizer.ggml.eot_token_id"), backend.token_to_id(END_OF_TEXT))
        return cls(
            backend,
            special_tokens=special_tokens,
            templates=_gguf_templates(metadata),
            more_eos_token_ids=[int(end) for end in ends if end is not None],
        )

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included; a checkpoint may pad its rows beyond it."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a text, as far as the tokenizer's own files say."""
        return self._eos_token_ids

    @property
    def pad_token_id(self) -> int | None:
        """The padding token's id, where the checkpoint names one."""
        return self._special_id("pad_token")

    def id_to_token(self, token_id: int) -> str | None:
        """Return a token as the vocabulary spells it; None for an id beyond the vocabulary."""
        return self._backend.id_to_token(token_id)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return a text's token ids; special tokens spelled out in the text become their ids.

        Args:
            text: any text.
            add_special_tokens: also add what the checkpoint puts around a text (Qwen2: nothing;
                DeepSeek-R1-Distill-Qwen: its `bos_token`). Pass False for a rendered chat
                template, which has them already.

        Raises:
            MeshwenError: the text holds a lone surrogate, which UTF-8 cannot express.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise MeshwenError(f"the text is not valid Unicode: {error}") from error
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """Return the token ids of a conversation: `apply_chat_template`, then `encode`."""
        text = self.apply_chat_template(messages, tools, add_generation_prompt, **variables)
        return self.encode(text, add_special_tokens=False)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids; invalid UTF-8 becomes U+FFFD, unknown ids nothing."""
        whole = [int(token_id) for token_id in ids]
        return self._backend.decode(whole, skip_special_tokens=skip_special_tokens)

    def stream_decoder(self) -> "StreamDecoder":
        """Return a decoder for one text whose tokens come one by one."""
        return StreamDecoder(self)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Return the prompt for a conversation; see `ChatTemplate.render`.

        Encode it with `add_special_tokens=False`, or use `encode_chat`.
        """
        return self._chat_template.render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables
        )

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token adds to a text: none for special and unknown ids."""
        token = None if token_id in self._special_ids else self._backend.id_to_token(token_id)
        if token is None:
            return b""
        try:
            return bytes([BYTE_ALPHABET[character] for character in token])
        except KeyError:  # an added token outside the byte alphabet stands for itself
            return token.encode()

    def _special_id(self, name: str) -> int | None:
        token = self._special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)


class StreamDecoder:
    """Decodes tokens as they come, in whole characters; the pieces make `Tokenizer.decode`'s text.

    A character whose bytes are spread over tokens comes out with its last byte. Bytes that are no
    UTF-8 come out as U+FFFD, by the same rule as `decode`, once no further byte can complete them.
    """

    def __init__(self, tokenizer: Tokenizer):
        """Start a text."""
        self._token_bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Return the characters that this token completes, often one word, sometimes none."""
        return self._utf8.decode(self._token_bytes(int(token_id)))

    def finish(self) -> str:
        """End the text: return U+FFFD for bytes that still wait for the rest of a character."""
        return self._utf8.decode(b"", final=True)


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


def _set_affixes(backend: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
    """Make `encode` put these tokens, and no others, before and after a text."""
    pattern = [token for token in (bos, "$A", eos) if token is not None]
    ids = [(token, backend.token_to_id(token)) for token in (bos, eos) if token is not None]
    missing = [token for token, index in ids if index is None]
    if missing:
        raise MeshwenError(f"the tokenizer has no token {missing[0]!r}, which it should add")
    backend.post_processor = processors.TemplateProcessing(
        single=pattern, special_tokens=list(dict.fromkeys(ids))
    )


def _load_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
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


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the named special tokens (`eos_token` and so on), each text or an object in JSON."""
    names = [f"{name}_token" for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask")]
    found = {name: config[name] for name in names if config.get(name)}
    return {
        name: token["content"] if isinstance(token, dict) else token
        for name, token in found.items()
    }


def _added_tokens(
    folder: Path, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> dict[int, AddedToken]:
    """Return the added tokens by id, from tokenizer_config.json and the older added_tokens.json."""
    special = {*special_tokens.values(), *_texts(config.get("additional_special_tokens"))}
    added = {
        index: AddedToken(token, special=token in special, normalized=False)
        for token, index in _read_json_object(folder / "added_tokens.json").items()
    }
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    try:
        for index, token in (config.get("added_tokens_decoder") or {}).items():
            chosen = {flag: bool(token[flag]) for flag in flags if flag in token}
            added[int(index)] = AddedToken(token["content"], **chosen)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise MeshwenError(
            f"{folder / 'tokenizer_config.json'}: added_tokens_decoder is broken: {error!r}"
        ) from error
    return added


def _texts(tokens: Sequence[Any] | None) -> list[str]:
    return [one["content"] if isinstance(one, dict) else one for one in tokens or ()]


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
    """Return a GGUF file's chat templates: `tokenizer.chat_template`, and named ones after a dot."""
    prefix = "tokenizer.chat_template"
    named = {
        key.removeprefix(f"{prefix}."): value
        for key, value in metadata.items()
        if key.startswith(f"{prefix}.")
    }
    return named | ({"default": metadata[prefix]} if prefix in metadata else {})
