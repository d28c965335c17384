# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back: Qwen2's byte-level BPE, from a checkpoint folder or GGUF metadata."""

import codecs
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers.decoders import ByteLevel

from meshwen.arguments import brief, token_ids, whole_number
from meshwen.chat_template import ChatTemplate, Message
from meshwen.checkpoints.base import Checkpoint
from meshwen.errors import MeshwenError
from meshwen.paths import user_path
from meshwen.tokenizer_files import TokenizerParts, read_folder, read_gguf


def byte_alphabet() -> dict[str, int]:
    """Return the 256 characters that stand for bytes in byte-level BPE (GPT-2's table).

    Printable Latin-1 characters stand for themselves; the others, in order, for U+0100 onwards.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(rest)}


BYTE_ALPHABET = byte_alphabet()
_MOST_IDS = 1 << 32  # What the library can look up; there are none beyond.


class Tokenizer:
    """Qwen2's byte-level BPE tokenizer, with its checkpoint's special tokens and chat template.

    Make one with `from_folder` or `from_gguf`. Token ids are plain ints.
    """

    def __init__(self, parts: TokenizerParts):
        """Take what a checkpoint says about its tokenizer.

        Raises:
            MeshwenError: the tokenizer does not decode as byte-level BPE does.
        """
        if not isinstance(parts.backend.decoder, ByteLevel):
            raise MeshwenError(
                f"the tokenizer's decoder is {type(parts.backend.decoder).__name__}, not ByteLevel "
                "as Qwen2's is"
            )
        self._backend = parts.backend
        self._special_tokens = parts.special_tokens
        self._special_ids = frozenset(
            index
            for index, token in parts.backend.get_added_tokens_decoder().items()
            if token.special
        )
        eos = self._special_id("eos_token")
        own_eos = () if eos is None else (eos,)
        self._eos_token_ids = tuple(dict.fromkeys(own_eos + parts.more_eos_token_ids))
        self._chat_template = ChatTemplate(parts.templates, parts.special_tokens)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read a checkpoint folder: tokenizer.json, or else vocab.json with merges.txt.

        tokenizer_config.json, where there is one, gives the special tokens, further added tokens
        and the chat template. Whether `encode` adds `bos_token` or `eos_token` is up to
        tokenizer.json's post-processor; without that file, up to `add_bos_token` and
        `add_eos_token`.

        Raises:
            MeshwenError: there is no tokenizer in the folder, or one of its files is broken.
        """
        path = user_path(folder)
        try:
            return cls(read_folder(path))
        except OSError as error:  # Such as a folder that may not be entered.
            raise MeshwenError(f"cannot read {folder}: {error.strerror}") from None

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> "Tokenizer":
        """Build the tokenizer that a GGUF file describes.

        `eos_token_ids` also holds `tokenizer.ggml.eot_token_id` and `<|endoftext|>`: GGUF has no
        generation_config.json, where Qwen's chat checkpoints say that both end a text.

        Args:
            metadata: `tokenizer.*` keys to plain values (lists of str and int for arrays).

        Raises:
            MeshwenError: it is not Qwen2's kind of tokenizer, or a key is missing or broken.
        """
        return cls(read_gguf(metadata))

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> "Tokenizer | None":
        """Build an open checkpoint's tokenizer; None where there are no files for one.

        Raises:
            MeshwenError: as `from_folder` and `from_gguf`.
        """
        files = checkpoint.tokenizer_files
        if files is None:
            return None
        return cls.from_folder(files) if isinstance(files, Path) else cls.from_gguf(files)

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included; a checkpoint may pad its rows beyond it."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a text, as far as the tokenizer's own files say."""
        return self._eos_token_ids

    @property
    def eos_token(self) -> str | None:
        """The first of `eos_token_ids` as text: what lm-evaluation-harness ends answers at."""
        return self.id_to_token(self._eos_token_ids[0]) if self._eos_token_ids else None

    @property
    def pad_token_id(self) -> int | None:
        """The padding token's id, where the checkpoint names one."""
        return self._special_id("pad_token")

    def id_to_token(self, token_id: int) -> str | None:
        """Return a token as the vocabulary spells it; None for an id beyond the vocabulary."""
        token_id = whole_number("a token id", token_id)
        return self._backend.id_to_token(token_id) if 0 <= token_id < _MOST_IDS else None

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
        if not isinstance(text, str):
            raise MeshwenError(f"only text can be encoded, not {brief(text)}")
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
        whole = [one for one in token_ids("the ids to decode", ids) if 0 <= one < _MOST_IDS]
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
        token_id = whole_number("a token id", token_id)
        token = None if token_id in self._special_ids else self.id_to_token(token_id)
        if token is None:
            return b""
        try:
            return bytes([BYTE_ALPHABET[character] for character in token])
        except KeyError:  # an added token outside the byte alphabet stands for itself
            return token.encode()

    def special_text(self, token_id: int) -> str:
        """Return a special token as it is written, which `decode` leaves out; "" for others."""
        special = self._backend.id_to_token(token_id) if token_id in self._special_ids else None
        return special or ""

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
        return self._utf8.decode(self._token_bytes(token_id))

    def finish(self) -> str:
        """End the text: return U+FFFD for bytes that still wait for the rest of a character."""
        return self._utf8.decode(b"", final=True)
