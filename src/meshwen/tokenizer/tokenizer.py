# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back: Qwen2's byte-level BPE, from a checkpoint folder or GGUF metadata."""

import codecs
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

from meshwen.checkpoints.base import Checkpoint
from meshwen.common.arguments import brief, token_ids, whole_number
from meshwen.common.paths import user_path
from meshwen.errors import MeshwenError
from meshwen.tokenizer.chat_template import ChatTemplate, Message
from meshwen.tokenizer.files import TokenizerParts, read_folder, read_gguf
from meshwen.tokenizer.saving import tokenizer_files


def byte_alphabet() -> dict[str, int]:
    """Return the 256 characters that stand for bytes in byte-level BPE (GPT-2's table).

    Printable Latin-1 characters stand for themselves; the others, in order, for U+0100 onwards.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(rest)}


BYTE_ALPHABET = byte_alphabet()
# The library panics where a pattern takes ten million steps, as Qwen2's does on as many spaces.
_MOST_CHARACTERS = 1 << 23
# Options of transformers' apply_chat_template, which would else be taken for template variables.
_NOT_OFFERED = {
    *("padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
    *("return_assistant_tokens_mask", "sanitize_control_tokens", "chat_template"),
}

# Words, numbers and signs of several scripts, and whitespace: what tokenizers take apart otherwise.
_PROBE = (
    "The quick brown fox doesn't jump; 1234567890 dogs (3.14e-10) did!\n\n\t  def f(x): return {x}"
    " <|im_start|>user\r\n\u4eca\u5929\u5929\u6c14\u5f88\u597d\uff0c\u6211\u4eec\u53bb"
    " \u041f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627 e\u0301\u00e9"
    " \ud55c\uad6d\uc5b4 \U0001f468\u200d\U0001f469\u200d\U0001f467 internationalisation https://"
)


class Tokenizer:
    """Qwen2's byte-level BPE tokenizer, with its checkpoint's special tokens and chat template.

    Make one with `from_folder` or `from_gguf`. Token ids are plain ints.
    """

    def __init__(self, parts: TokenizerParts):
        """Take what a checkpoint says about its tokenizer."""
        self._parts, self._encoder = parts, parts.encoder
        self._ids = parts.vocab
        self._tokens = {index: token for token, index in parts.vocab.items()}
        self._special_tokens = parts.special_tokens
        self._special_ids = parts.special_ids
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
        if isinstance(files, Path):
            return cls.from_folder(files)
        try:
            return cls.from_gguf(files)
        except MeshwenError as error:
            raise MeshwenError(f"{checkpoint.path}: {error}") from None

    @property
    def content(self) -> dict[str, Any]:
        """What identifies it, as JSON can hold it: of its merges, a probe text's ids."""
        templates, variables = self._chat_template.content
        return {
            "vocabulary": self._ids,
            "special tokens": [sorted(self._special_ids), variables],
            "eos_token_ids": self._eos_token_ids,
            "merges and splits": self.encode(_PROBE),
            "chat template": templates,
        }

    def files(self) -> dict[str, str]:
        """Return the text of the files that `from_folder` and transformers read, by name.

        They give the same ids, texts and chat prompts; of `eos_token_ids`, the first alone.

        Raises:
            MeshwenError: an unusual tokenizer exceeds the limits on time and memory.
        """
        return tokenizer_files(self._parts)

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included; a checkpoint may pad its rows beyond it."""
        return len(self._ids)

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

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint has one, of whatever name."""
        return bool(self._chat_template.names)

    @property
    def chat_templates(self) -> tuple[str, ...]:
        """The text of the checkpoint's chat templates."""
        return tuple(self._chat_template.content[0].values())

    def id_to_token(self, token_id: int) -> str | None:
        """Return a token as the vocabulary spells it; None for an id beyond the vocabulary."""
        return self._tokens.get(whole_number("a token id", token_id))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return a text's token ids; special tokens spelled out in the text become their ids.

        Args:
            text: any text.
            add_special_tokens: also add what the checkpoint puts around a text (Qwen2: nothing;
                DeepSeek-R1-Distill-Qwen: its `bos_token`). Pass False for a rendered chat
                template, which has them already.

        Raises:
            MeshwenError: it is no text, longer than any context, or holds a lone surrogate, which
                UTF-8 cannot express; or the checkpoint's tokenizer fails on it, or exceeds the
                limits on time and memory.
        """
        if not isinstance(text, str):
            raise MeshwenError(f"only text can be encoded, not {brief(text)}")
        if len(text) > _MOST_CHARACTERS:
            raise MeshwenError(
                f"the text has {len(text)} characters, more than any context holds: "
                f"{_MOST_CHARACTERS} at most are encoded"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise MeshwenError(f"the text is not valid Unicode: {error}") from error
        return self._encoder.encode(text, add_special_tokens)

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
        to_bytes = self.token_bytes if skip_special_tokens else self._all_bytes
        return b"".join(map(to_bytes, token_ids("the ids to decode", ids))).decode(errors="replace")

    def stream_decoder(self) -> "StreamDecoder":
        """Return a decoder for one text whose tokens come one by one."""
        return StreamDecoder(self)

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        *,
        tokenize: Literal[False] = False,
        **variables: Any,
    ) -> str: ...

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        *,
        tokenize: bool,
        **variables: Any,
    ) -> str | list[int]: ...

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        *,
        tokenize: bool = False,
        **variables: Any,
    ) -> str | list[int]:
        """Return the prompt for a conversation, as transformers' method of this name does.

        Args:
            messages: the conversation; one, not a list of several.
            tools: as for `ChatTemplate.render`.
            add_generation_prompt: as for `ChatTemplate.render`. transformers' default is False.
            tokenize: return token ids (list of int) in the place of text. transformers' default is
                True.
            variables: `documents`, `continue_final_message` and variables of the template.

        Raises:
            MeshwenError: as `ChatTemplate.render`; or an option of transformers' that asks for
                another result, such as `return_tensors` or `padding`.
        """
        if tokenize:
            return self.encode_chat(messages, tools, add_generation_prompt, **variables)
        return self._chat_template.render(
            messages, tools, add_generation_prompt=add_generation_prompt, **_variables(variables)
        )

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token adds to a text: none for special and unknown ids."""
        token_id = whole_number("a token id", token_id)
        return b"" if token_id in self._special_ids else self._all_bytes(token_id)

    def _all_bytes(self, token_id: int) -> bytes:
        token = self._tokens.get(token_id)
        if token is None:
            return b""
        try:
            return bytes([BYTE_ALPHABET[character] for character in token])
        except KeyError:  # an added token outside the byte alphabet stands for itself
            return token.encode()

    def special_text(self, token_id: int) -> str:
        """Return a special token as it is written, which `decode` leaves out; "" for others."""
        return self._tokens[token_id] if token_id in self._special_ids else ""

    def _special_id(self, name: str) -> int | None:
        token = self._special_tokens.get(name)
        return None if token is None else self._ids.get(token)


def _variables(given: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out options of transformers' that ask for what is done anyway; refuse the others."""
    for name in _NOT_OFFERED & given.keys():
        if given[name]:
            raise MeshwenError(
                f"apply_chat_template does not offer {name}: it returns text, or with "
                "tokenize=True a list of token ids"
            )
    return {name: value for name, value in given.items() if name not in _NOT_OFFERED}


class StreamDecoder:
    """Decodes tokens as they come, in whole characters; the pieces make `Tokenizer.decode`'s text.

    A character whose bytes are spread over tokens comes out with its last byte. Bytes that are no
    UTF-8 come out as U+FFFD, by the same rule as `decode`, once no further byte can complete them.
    """

    # Not `tokenizers.decoders.DecodeStream`: it loses a character that is incomplete at the end and
    # holds back all that follows invalid bytes, at a cost that grows with each token.

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
