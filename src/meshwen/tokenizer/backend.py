# SPDX-License-Identifier: Apache-2.0
"""From a tokenizer.json's content to what encodes text: the tokenizers library, within limits.

A tokenizer.json is an untrusted program: normalisers that each double the text, post-processors
that do so, regular expressions that backtrack for hours, values on which the library panics. What
Qwen2's and similar tokenizers consist of is bounded by construction and runs in this process.
Anything else runs in a process of its own (`contained.py`): as right, some 0.2 ms slower a text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Literal, NotRequired, Protocol

import tokenizers
from annotated_types import Ge, Le
from tokenizers import AddedToken
from tokenizers.models import BPE
from typing_extensions import TypedDict

from meshwen.common.contained import Contained
from meshwen.common.json_files import TokenId
from meshwen.errors import MeshwenError

# Qwen2's words, as its published tokenizer.json splits them: every digit stands alone.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Patterns that are known to take time in proportion to the text.
_SPLITS = {
    QWEN2_SPLIT,
    QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|"),  # GPT-4's, Llama 3's
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2's
}
_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD"}  # Twice is the same as once.
_MODEL_OPTIONS = {
    *("unk_token", "continuing_subword_prefix", "end_of_word_suffix"),
    *("fuse_unk", "byte_fallback", "ignore_merges"),
}
_MOST_STEPS = 8
_MOST_AFFIXES = 64
_MOST_ADDED = 1 << 20  # characters of all added tokens; each takes some hundred bytes of memory


class Token(TypedDict):
    """An added token; flags that are missing are false, `normalized` the opposite of `special`."""

    content: str
    single_word: NotRequired[bool]
    lstrip: NotRequired[bool]
    rstrip: NotRequired[bool]
    normalized: NotRequired[bool]
    special: NotRequired[bool]


class TokenWithId(Token):
    """An added token as tokenizer.json has it."""

    id: TokenId


class Model(TypedDict):
    """The byte-pair encoding: `merges` are "a b" or ["a", "b"]."""

    type: NotRequired[Literal["BPE"]]
    vocab: dict[str, TokenId]
    merges: list[str] | list[list[str]]
    dropout: NotRequired[Annotated[float, Ge(0), Le(0)] | None]  # Random, where it is more.
    unk_token: NotRequired[str | None]
    continuing_subword_prefix: NotRequired[str | None]
    end_of_word_suffix: NotRequired[str | None]
    fuse_unk: NotRequired[bool]
    byte_fallback: NotRequired[bool]
    ignore_merges: NotRequired[bool]


class Decoder(TypedDict):
    """How tokens become text: as bytes."""

    type: Literal["ByteLevel"]


class Content(TypedDict):
    """A tokenizer.json. `split_special_tokens` is tokenizer_config.json's."""

    model: Model
    added_tokens: NotRequired[list[TokenWithId]]
    normalizer: NotRequired[dict[str, Any] | None]
    pre_tokenizer: NotRequired[dict[str, Any] | None]
    post_processor: NotRequired[dict[str, Any] | None]
    decoder: Decoder
    split_special_tokens: NotRequired[bool]


class Encoder(Protocol):
    """What encodes text."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Return a text's token ids. Raises MeshwenError where the tokenizer fails."""

    def to_json(self) -> str:
        """Return the text of a tokenizer.json that makes it again. Raises as `encode`."""


def encoder(content: Content, where: str) -> Encoder:
    """Make what encodes text as a tokenizer.json says.

    Args:
        content: of the right shape.
        where: the file, for messages.

    Raises:
        MeshwenError: the library does not take it, or it exceeds the limits on time or memory.
    """
    return InProcess(content, where) if is_bounded(content) else InOwnProcess(content, where)


class InProcess:
    """Encodes in this process."""

    def __init__(self, content: Content, where: str):
        self._where = where
        with _library_errors(where):
            self._backend = build(content)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """See `Encoder`."""
        with _library_errors(self._where):
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def to_json(self) -> str:
        """See `Encoder`."""
        with _library_errors(self._where):
            return self._backend.to_str(pretty=True)


class InOwnProcess:
    """Encodes in a process of its own, in bounded time and memory."""

    def __init__(self, content: Content, where: str):
        name = f"{where}: the tokenizer"
        self._process = Contained("meshwen.tokenizer.worker", name, setup={"content": content})
        self.encode("", True)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """See `Encoder`."""
        request = {"text": text, "add_special_tokens": add_special_tokens}
        return list(self._process.ask(request)["ids"])

    def to_json(self) -> str:
        """See `Encoder`."""
        return str(self._process.ask({})["tokenizer"])


def build(content: Content) -> tokenizers.Tokenizer:
    """Make the library's tokenizer.

    Raises:
        Exception: whatever the library raises.
        ValueError: an added token gets another id than the content gives it.
    """
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    # Truncation and padding would be for batches of a fixed length.
    steps = {
        **{"version": "1.0", "truncation": None, "padding": None, "added_tokens": []},
        **{name: content.get(name) for name in ("normalizer", "pre_tokenizer", "post_processor")},
        **{"decoder": content["decoder"], "model": empty},
    }
    backend = tokenizers.Tokenizer.from_str(json.dumps(steps))
    model = content["model"]
    merges = [_pair(rule) for rule in model["merges"]]
    options: dict[str, Any] = {
        name: value for name, value in model.items() if name in _MODEL_OPTIONS and value is not None
    }
    backend.model = BPE(vocab=model["vocab"], merges=merges, **options)
    added = sorted(content.get("added_tokens", []), key=lambda token: token["id"])
    backend.add_tokens([_added(token) for token in added])
    for token in added:
        found = backend.token_to_id(token["content"])
        if found != token["id"]:
            raise ValueError(
                f"the added token {token['content']!r} has the id {token['id']}, but its place in "
                f"the vocabulary is {found}"
            )
    backend.encode_special_tokens = content.get("split_special_tokens", False)
    return backend


def is_bounded(content: Content) -> bool:
    """Whether encoding takes time and memory in proportion to the text, whatever the text."""
    model = content["model"]
    before = _steps(content.get("pre_tokenizer"), "pretokenizers")
    after = _steps(content.get("post_processor"), "processors")
    return (
        not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and all(
            step.get("type") in _NORMALIZERS
            for step in _steps(content.get("normalizer"), "normalizers")
        )
        and all(_is_bounded_split(step) for step in before)
        # Each one writes every byte as a character of one or two bytes.
        and sum(step.get("type") == "ByteLevel" for step in before) <= 1
        and all(_is_bounded_affix(step) for step in after)
        # The library panics where there are two.
        and sum(step.get("type") == "TemplateProcessing" for step in after) <= 1
        and sum(len(token["content"]) for token in content.get("added_tokens", [])) <= _MOST_ADDED
    )


def _steps(component: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """The parts of a sequence, or the component itself; {} for what is neither."""
    if component is None:
        return []
    if component.get("type") != "Sequence":
        return [component]
    steps = component.get(inner)
    if not isinstance(steps, list) or len(steps) > _MOST_STEPS:
        return [{}]
    return [step if isinstance(step, dict) else {} for step in steps]


def _is_bounded_split(step: Mapping[str, Any]) -> bool:
    if step.get("type") != "Split":
        return step.get("type") in ("ByteLevel", "Digits")
    pattern = step.get("pattern")
    return isinstance(pattern, dict) and (
        pattern.get("Regex") in _SPLITS or bool(pattern.get("String"))
    )


def _is_bounded_affix(step: Mapping[str, Any]) -> bool:
    """Whether a post-processor has the text once, and few tokens around it."""
    if step.get("type") != "TemplateProcessing":
        return step.get("type") == "ByteLevel"
    try:
        pieces = step["single"]
        # The library panics where there is no second text, B.
        once = [one["Sequence"]["id"] for one in pieces if "Sequence" in one] == ["A"]
        affixes = [one["ids"] for one in step["special_tokens"].values()]
        return once and len(pieces) <= _MOST_AFFIXES and max(map(len, affixes), default=0) <= 1
    except (TypeError, KeyError, AttributeError):
        return False


def _pair(rule: str | list[str]) -> tuple[str, str]:
    parts = rule.split(" ") if isinstance(rule, str) else rule
    if len(parts) != 2 or not all(parts):
        raise ValueError(f"the merge {rule!r} is not two tokens")
    return parts[0], parts[1]


def _added(token: Token) -> AddedToken:
    special = token.get("special", False)
    return AddedToken(
        token["content"],
        single_word=token.get("single_word", False),
        lstrip=token.get("lstrip", False),
        rstrip=token.get("rstrip", False),
        normalized=token.get("normalized", not special),
        special=special,
    )


@contextmanager
def _library_errors(where: str) -> Iterator[None]:
    """Turn whatever the library raises into one line. A panic of its is no `Exception`."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:300]
        raise MeshwenError(f"{where}: the tokenizer is broken: {reason}") from None
