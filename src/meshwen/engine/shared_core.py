# SPDX-License-Identifier: Apache-2.0
"""An engine's core that threads share, and the requests that they leave for its next step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from meshwen.engine.answer_text import AnswerText
from meshwen.engine.compiled_grammars import CompiledGrammar
from meshwen.engine.constraints import AnswerConstraints
from meshwen.engine.core import EngineCore
from meshwen.engine.fair_lock import FairLock
from meshwen.engine.request import Event, Request
from meshwen.engine.request_table import LiveRequest, RequestTable, Run
from meshwen.engine.sequence import SequenceState
from meshwen.errors import MeshwenError
from meshwen.tokenizer.tokenizer import Tokenizer


class SharedCore:
    """Takes requests from any thread, and steps them in the thread that holds the lock.

    Args:
        core: steps sequences.
        tokenizer: turns tokens into text; None leaves texts empty.
        eos_token_ids: tokens that end an answer.

    Attributes:
        core: for the thread that holds the lock.
        lock: says which thread that is.
        requests: the unfinished ones; guarded by `lock.changed`.
        one_thread: one thread alone may call the engine while requests are unfinished.
    """

    def __init__(
        self, core: EngineCore, tokenizer: Tokenizer | None, eos_token_ids: frozenset[int]
    ):
        self.core, self.lock, self.requests = core, FairLock(), RequestTable()
        self.one_thread = core.runner.plan.mesh.is_multi_process
        self._tokenizer, self._eos = tokenizer, eos_token_ids
        self._last_thread: int | None = None  # That called.

    @contextmanager
    def hold(self, unless: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Holds the lock during the block: see `FairLock.hold`, and `check_thread`."""
        with self.lock.changed:
            self.check_thread()
        with self.lock.hold(unless) as held:
            yield held

    def check_thread(self) -> None:
        """Refuses a second thread where only one may call; `lock.changed` is held."""
        thread = threading.get_ident()
        others = self.requests.live or self.lock.held_by_another_thread
        if self.one_thread and thread != self._last_thread and others:
            raise MeshwenError(
                "the mesh spans several processes, which must all make the same calls in the same "
                "order: call the model from one thread"
            )
        self._last_thread = thread

    def add(
        self,
        request: Request,
        grammar: CompiledGrammar | None,
        on_event: Callable[[Event], None],
        run: Run | None,
    ) -> int:
        """Leaves a request for the next step; `lock.changed` is held.

        Args:
            request: the request.
            grammar: its own, compiled.
            on_event: called with each token.
            run: the call of `Engine.run` that it belongs to; None for one that was submitted.

        Returns:
            Its number.
        """
        answers = request.sampling.n
        number = self.requests.next_number(answers)

        def finish_and_report(event: Event) -> None:
            if event.completion is not None:
                with self.lock.changed:
                    self.requests.finish(number)
            on_event(event)

        first, *others = (
            self._answer(request.answer(choice), grammar, number, choice, finish_and_report)
            for choice in range(answers)
        )
        first.siblings += others
        self.requests.add(LiveRequest((first, *others), run, threading.get_ident()))
        return number

    def _answer(
        self,
        request: Request,
        grammar: CompiledGrammar | None,
        number: int,
        choice: int,
        on_event: Callable[[Event], None],
    ) -> SequenceState:
        """One answer of a request."""
        limit = self.core.limits.answer_tokens(request)
        eos = frozenset() if request.sampling.ignore_eos else self._eos
        vocab_size = self.core.runner.config.vocab_size
        held = None if grammar is None else grammar.constraint()
        return SequenceState(
            number + choice,
            request,
            limit,
            eos,
            on_event,
            AnswerText(self._tokenizer, request.sampling.stop, request.sampling.include_stop),
            AnswerConstraints.of(request, limit, eos, vocab_size, held),
            choice=choice,
        )

    def step(self, thread: int | None = None) -> None:
        """Takes a step, while the lock is held; `thread` gets itself what breaks the step off."""
        with self.breaking_off(thread):
            with self.lock.changed:
                new, cancelled = self.requests.take_new()
            self.core.step(new, drop_cancelled=cancelled)
        self._take_errors()

    @contextmanager
    def breaking_off(self, thread: int | None) -> Iterator[None]:
        """Ends requests and the cache, which is donated, with what raises; the lock is held."""
        try:
            yield
        except BaseException as error:  # An interrupt too, wherever it comes.
            self._take_errors()  # Before they are lost with the step.
            delivering = self.core.delivery.delivering
            self.core.clear()
            with self.lock.changed:
                self.requests.lose(error, delivering, thread)
            raise

    def _take_errors(self) -> None:
        """Ends the requests whose tokens could not be delivered: see `RequestTable.fail`."""
        with self.lock.changed:
            for number, error in self.core.delivery.take_errors():
                self.requests.fail(number, error)
