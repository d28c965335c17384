# SPDX-License-Identifier: Apache-2.0
"""Tokens that may not come next in a sequence, by what its request asks for.

Worked out on the host from the sequence alone, so the same on every mesh and in every batch. The
rules, and which goes before which, are transformers' logits processors'. A grammar comes after all
of them: it only forbids.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from meshwen.engine.compiled_grammars import GrammarConstraint
from meshwen.engine.request import Request


class AnswerConstraints:
    """All that one answer may not go on with.

    Args:
        rules: on its tokens; None: there are none.
        grammar: that its text follows; None: any.
        vocab_size: of the model.
    """

    def __init__(
        self, rules: TokenConstraints | None, grammar: GrammarConstraint | None, vocab_size: int
    ):
        self._rules, self._grammar, self._vocab_size = rules, grammar, vocab_size

    @classmethod
    def of(
        cls,
        request: Request,
        limit: int,
        eos: frozenset[int],
        vocab_size: int,
        grammar: GrammarConstraint | None = None,
    ) -> AnswerConstraints | None:
        """A request's; None where every token may come."""
        rules = TokenConstraints.of(request, limit, eos, vocab_size)
        return cls(rules, grammar, vocab_size) if rules or grammar else None

    def push(self, token: int) -> None:
        """Takes the next token."""
        for one in (self._rules, self._grammar):
            if one is not None:
                one.push(token)

    @property
    def take_drafts(self) -> bool:
        """Whether they can say what may follow a token that has not come yet."""
        return self._rules is None

    def fitting(self, drafts: Sequence[int]) -> int:
        """How many of some drafts may follow one after the other; only where they take drafts."""
        return len(drafts) if self._grammar is None else self._grammar.fitting(drafts)

    def forbid(self, rows: np.ndarray, drafts: Sequence[int] = ()) -> None:
        """Marks what may not come.

        Args:
            rows: bool [1 + drafts, V or more]: next, and after each draft.
            drafts: those that are fitting.
        """
        if self._rules is not None:
            self._rules.forbid(rows[0])
        if self._grammar is not None:
            self._grammar.forbid(rows, drafts)

    def nothing_left(self) -> str | None:
        """What lets no token come next; None: some may."""
        row = np.zeros((1, self._vocab_size), bool)
        self.forbid(row)
        if not row.all():
            return None
        failure = self._grammar and self._grammar.failure
        if failure is not None:
            return f"the grammar cannot be followed any further ({failure}), so nothing can come"
        return "the sampling parameters let nothing come"


class TokenConstraints:
    """What one sequence may not go on with.

    Args:
        request: the request.
        limit: the most tokens of its answer.
        eos: end-of-text tokens that end an answer.
        vocab_size: of the model.
    """

    def __init__(self, request: Request, limit: int, eos: frozenset[int], vocab_size: int):
        asked = self._asked = request.sampling
        self._prompt_length, self._limit = len(request.prompt_tokens), limit
        self._ends, self._vocab_size = sorted(eos.union(asked.stop_token_ids)), vocab_size
        # As transformers has it, an end-of-text token is no bad word.
        words = [word for word in asked.bad_words_ids if not (len(word) == 1 and word[0] in eos)]
        self._bad_tokens = [word[0] for word in words if len(word) == 1]
        self._bad_words = [word for word in words if len(word) > 1]
        self._tokens: list[int] = []
        self._ngrams = _Ngrams(asked.no_repeat_ngram_size)
        self._prompt_ngrams = _Ngrams(asked.encoder_no_repeat_ngram_size)
        for token in request.prompt_tokens:
            self.push(token)
            self._prompt_ngrams.push(token)

    @classmethod
    def of(
        cls, request: Request, limit: int, eos: frozenset[int], vocab_size: int
    ) -> TokenConstraints | None:
        """A request's; None where every token may come."""
        constrained = request.sampling.constrained
        return cls(request, limit, eos, vocab_size) if constrained else None

    def push(self, token: int) -> None:
        """Takes the next token."""
        self._tokens.append(token)
        self._ngrams.push(token)

    def forbid(self, row: np.ndarray) -> None:
        """Marks in `row`, bool [V or more], what may not come next."""
        asked, length = self._asked, len(self._tokens)
        answered = length - self._prompt_length
        self._mark(row, self._ngrams.ends(self._tokens))
        self._mark(row, self._prompt_ngrams.ends(self._tokens))
        self._mark(row, self._bad_tokens)
        for *begin, last in self._bad_words:
            if self._tokens[-len(begin) :] == begin:
                self._mark(row, [last])
        if length < asked.min_length or answered < asked.min_new_tokens:
            self._mark(row, self._ends)
        if length == 1 and asked.forced_bos_token_id is not None:
            self._force(row, [asked.forced_bos_token_id])
        if answered == self._limit - 1 and asked.forced_eos_token_id:
            # Transformers makes them equally likely, of which greedy takes the first.
            forced = sorted(asked.forced_eos_token_id)
            self._force(row, forced[:1] if asked.temperature == 0 else forced)
        self._mark(row, asked.suppress_tokens)
        after_bos = self._prompt_length == 1 and asked.forced_bos_token_id is not None
        if answered == int(after_bos):
            self._mark(row, asked.begin_suppress_tokens)

    def _mark(self, row: np.ndarray, tokens: Sequence[int]) -> None:
        row[[token for token in tokens if token < self._vocab_size]] = True

    def _force(self, row: np.ndarray, tokens: Sequence[int]) -> None:
        row[:] = True
        row[list(tokens)] = False


class _Ngrams:
    """N-grams of `size` tokens that have come, by their first tokens; none where `size` is 0."""

    def __init__(self, size: int):
        self._size = size
        self._ends: dict[tuple[int, ...], list[int]] = {}
        self._last: list[int] = []

    def push(self, token: int) -> None:
        if not self._size:
            return
        if len(self._last) == self._size - 1:
            self._ends.setdefault(tuple(self._last), []).append(token)
        self._last = [*self._last, token][-(self._size - 1) :] if self._size > 1 else []

    def ends(self, tokens: Sequence[int]) -> Sequence[int]:
        """Tokens that would repeat an n-gram if they came after these."""
        if not self._size or len(tokens) < self._size - 1:
            return ()
        begin = tuple(tokens[len(tokens) - self._size + 1 :])
        return self._ends.get(begin, ())
