# SPDX-License-Identifier: Apache-2.0
"""Grammars at work: which tokens may come next, so that an answer's text follows one.

llguidance compiles a grammar and keeps track of where in it an answer is. What it says follows from
the grammar and the tokens alone, so it is the same on every mesh and in every batch. Its limits
bound the time and memory that a grammar takes, whatever it says.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from meshwen.engine.grammar import LONGEST_GRAMMAR, GrammarError, llguidance
from meshwen.errors import MeshwenError
from meshwen.tokenizer.tokenizer import Tokenizer

_MOST_KEPT = 64  # compiled grammars
_MOST_LEXER_STATES = 50_000  # of one; each takes 1 to 2 kB
# Each way to write a text in tokens may come: the likeliest does, which is the tokenizer's. Forced
# ones would need the tokenizer in every step. Behind the grammar, since the last setting counts.
_SETTINGS = '\n%llguidance {"no_forcing": true}\n'


class Grammars:
    """A model's compiled grammars: those used last are kept. Any thread may use them.

    Args:
        tokenizer: the model's; None: it has none, and no grammars.
        eos_token_ids: tokens that end an answer: they may come where the grammar is complete.
        vocab_size: of the model, which may have more tokens than the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer | None, eos_token_ids: frozenset[int], vocab_size: int):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._eos = sorted(token for token in eos_token_ids if token < vocab_size)
        self._lock = threading.Lock()  # Of what follows.
        self._tokens: Any = None  # The vocabulary as llguidance has it.
        self._kept: OrderedDict[str, CompiledGrammar] = OrderedDict()

    def compiled(self, text: str) -> CompiledGrammar:
        """A grammar, compiled unless it is kept; that may take some tenths of a second.

        Raises:
            GrammarError: no answer can be held to it.
            MeshwenError: the model or the installation has not what it takes.
        """
        if len(text) > LONGEST_GRAMMAR:
            raise GrammarError(f"it may have {LONGEST_GRAMMAR} characters, not {len(text)}")
        with self._lock:
            if (kept := self._kept.get(text)) is not None:
                self._kept.move_to_end(text)
                return kept
            if self._tokens is None:
                self._tokens = self._vocabulary()
        made = CompiledGrammar(self._tokens, text, self._eos)
        with self._lock:
            self._kept[text] = made
            while len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
        return made

    def _vocabulary(self) -> Any:
        library = llguidance()
        if self._tokenizer is None or not self._eos:
            lacks = "an end-of-text token" if self._tokenizer else "a tokenizer"
            raise MeshwenError(f"grammar needs {lacks}, and this model has none")
        wrapper = library.TokenizerWrapper(
            _Vocabulary(self._tokenizer, self._eos, self._vocab_size)
        )
        return library.LLTokenizer(wrapper, eos_token=self._eos)


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, eos: Sequence[int], vocab_size: int):
        ids = range(vocab_size)
        self.eos_token_id = eos[0]
        self.special_token_ids = [i for i in ids if tokenizer.special_text(i) or i in eos]
        self.tokens = [tokenizer.special_text(i).encode() or tokenizer.token_bytes(i) for i in ids]
        self._of_byte = {token[0]: i for i, token in enumerate(self.tokens) if len(token) == 1}

    def __call__(self, text: bytes | str) -> list[int]:
        """Tokens of a text, one a byte: it must not fail, and nothing depends on it."""
        encoded = text.encode() if isinstance(text, str) else text
        return [self._of_byte[byte] for byte in encoded if byte in self._of_byte]


class CompiledGrammar:
    """A grammar that answers can be held to.

    Args:
        tokens: the vocabulary, an `LLTokenizer`.
        text: the grammar.
        eos: end-of-text tokens, in order.

    Raises:
        GrammarError: it is broken, too complex, or nothing can follow it.
    """

    def __init__(self, tokens: Any, text: str, eos: Sequence[int]):
        library = llguidance()
        limits = library.LLParserLimits(max_lexer_states=_MOST_LEXER_STATES, verbose_errors=False)
        self._eos = eos
        self._matcher = library.LLMatcher(tokens, text + _SETTINGS, log_level=0, limits=limits)
        if not self._matcher.is_error():
            self._matcher.compute_bitmask()  # The first step may be too much for the limits.
        if self._matcher.is_error():
            raise GrammarError(_reason(self._matcher))

    def constraint(self) -> GrammarConstraint:
        """Holds one answer to it."""
        return GrammarConstraint(self._matcher.deep_copy(), self._eos)


class GrammarConstraint:
    """Where in a grammar one answer is.

    Args:
        matcher: an `LLMatcher` of its own.
        eos: end-of-text tokens.
    """

    def __init__(self, matcher: Any, eos: Sequence[int]):
        self._matcher, self._eos = matcher, eos

    @property
    def failure(self) -> str | None:
        """Why nothing can follow: a step was too much for the limits; None: something can."""
        return _reason(self._matcher) if self._matcher.is_error() else None

    def push(self, token: int) -> None:
        """Takes the next token."""
        self._matcher.consume_token(token)

    def fitting(self, drafts: Sequence[int]) -> int:
        """How many of some tokens may follow one after the other, before an end-of-text token."""
        if self._matcher.is_error():
            return 0
        ended = next((i for i, token in enumerate(drafts) if token in self._eos), len(drafts))
        return int(self._matcher.validate_tokens([int(token) for token in drafts[:ended]]))

    def forbid(self, rows: np.ndarray, drafts: Sequence[int] = ()) -> None:
        """Marks what may not come.

        Args:
            rows: bool [1 + drafts, V or more]: next, and after each draft.
            drafts: tokens that `fitting` lets follow.
        """
        taken = 0
        try:
            self._forbid(rows[0])
            for row, draft in zip(rows[1:], drafts, strict=True):
                taken += self._matcher.try_consume_tokens([int(draft)])
                self._forbid(row)
        finally:
            if taken:
                self._matcher.rollback(taken)

    def _forbid(self, row: np.ndarray) -> None:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.zeros(len(row), bool)
        # Where a step was too much there are end-of-text tokens, as if the answer were complete.
        if not self._matcher.is_error():
            found = np.unpackbits(bits, count=min(len(row), 8 * len(bits)), bitorder="little")
            allowed[: len(found)] = found
        row |= ~allowed


def _reason(matcher: Any) -> str:
    """Why a matcher goes no further, in one line."""
    lines = [line.strip() for line in matcher.get_error().splitlines()]
    if lines[:1] == ["NoExtensionBias"]:
        return "no text follows it"
    said = " ".join(line for line in lines if not _POINTER.match(line))
    return _PLACE.sub("", said)[:300]


_POINTER = re.compile(r"\^+$|\d+ \||<non-verbose/>$|\s*$")  # Lines that show a place.
_PLACE = re.compile(r"^at \d+\(\d+\): ")
