# SPDX-License-Identifier: Apache-2.0
"""Requests in, tokens out, from any number of threads, which share one batch.

There is no thread of the engine's own: who waits for tokens takes steps, one at a time, by turns. A
step gives tokens to all requests, whoever takes it, so each caller gets its own while any of them
waits.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from meshwen.cache.budget import Capacity
from meshwen.common.arguments import brief
from meshwen.engine.agreement import check_requests
from meshwen.engine.constraints import TokenConstraints
from meshwen.engine.request import Event, Request, check_prompt, check_sampling
from meshwen.engine.runner import ModelRunner
from meshwen.engine.scheduler import Scheduler
from meshwen.engine.sequence import SequenceState
from meshwen.engine.stream import Stream
from meshwen.engine.turns import Turns
from meshwen.errors import MeshwenError
from meshwen.models.config import ModelConfig
from meshwen.runtime.shape_buckets import SMALLEST_BUCKET
from meshwen.tokenizer.tokenizer import Tokenizer


class QueueFullError(MeshwenError):
    """As many requests wait as may."""


class Engine:
    """Runs requests on a model; any thread may call it at any time.

    Where the mesh spans processes, all of them must make the same calls in the same order, which
    threads would not keep: while requests are unfinished, one thread alone may call it there.

    Args:
        runner: the model.
        tokenizer: turns tokens into text; None (a model without one) leaves texts empty.
        eos_token_ids: tokens that end an answer.
        capacity: the most slots, and the longest sequence.
        max_waiting: requests that may wait for a slot.
        prompt_lookup_num_tokens: tokens of an answer to guess in a step, 0 to 15, see
            `meshwen.engine.prompt_lookup`; where the cache has few rows, and no answer a repetition
            penalty. They only change how fast an answer comes; in fast numerics also its rounding.
    """

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: Tokenizer | None,
        eos_token_ids: Sequence[int],
        capacity: Capacity,
        max_waiting: int = 1024,
        prompt_lookup_num_tokens: int = 0,
    ):
        if not 0 <= prompt_lookup_num_tokens < SMALLEST_BUCKET:  # No more than a chunk overwrites.
            raise MeshwenError(
                f"prompt_lookup_num_tokens must be from 0 to {SMALLEST_BUCKET - 1}, "
                f"not {prompt_lookup_num_tokens}"
            )
        self._plan, self._tokenizer = runner.plan, tokenizer
        self._eos = frozenset(eos_token_ids)
        self._capacity, self._max_waiting = capacity, max_waiting
        self._scheduler = Scheduler(runner, capacity, prompt_lookup_num_tokens)  # Of who has a turn
        self._one_thread = runner.plan.mesh.is_multi_process
        self._turns = Turns()
        # What follows is guarded by `_turns.changed`.
        self._submitted = 0
        self._live: dict[int, _Live] = {}  # Unfinished requests.
        self._new: list[SequenceState] = []  # Those that the scheduler does not know yet.
        self._dropped = False  # The scheduler has cancelled ones.
        self._failures: list[Exception] = []  # That `step` has yet to raise.
        self._user: int | None = None  # The thread that called last.

    @property
    def config(self) -> ModelConfig:
        """The model's hyperparameters."""
        return self._plan.config

    @property
    def max_model_len(self) -> int:
        """The most tokens of a prompt and its answer."""
        return self._capacity.max_model_len

    @property
    def prefilled(self) -> tuple[int, int] | None:
        """Tokens read of the prompt that is being read, and of how many; None: none is."""
        return self._scheduler.prefilled

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs, or `step` has something to raise."""
        return bool(self._live or self._failures)

    def check(self, request: Request, name: str) -> None:
        """Refuses a request that the engine cannot answer.

        Args:
            request: the request.
            name: what to call its prompt: "prompt 3".

        Raises:
            MeshwenError: the prompt is empty, too long, or has a token outside the vocabulary, or
                there is no memory for it and its answer.
        """
        if not isinstance(request, Request):
            raise MeshwenError(f"{name} must be a Request, not {brief(request)}")
        check_prompt(request.prompt_tokens, self.config, name, self._capacity.max_model_len)
        check_sampling(request, self.config, name)
        self._scheduler.check_memory(request)

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> int:
        """Takes a request; its tokens then go to `on_event`, one event each.

        Somebody must take steps: `step`, or who waits for what `run` gives. `on_event` is called by
        the thread that takes the step, which goes on when it returns. It may call `submit` and
        `cancel`. What it raises cancels the request and is raised by this or the next `step`.

        Returns:
            The request's number.

        Raises:
            QueueFullError: too many requests wait.
            MeshwenError: `check` refuses the request.
        """
        self.check(request, "the prompt")
        with self._turns.changed:
            self._check_thread()
            if sum(live.sequence.waits for live in list(self._live.values())) >= self._max_waiting:
                raise QueueFullError(f"{self._max_waiting} requests wait already; try again later")
            if self._one_thread:
                check_requests([request])
            return self._add(request, on_event, None)

    def cancel(self, number: int) -> None:
        """Drops a request that was submitted, waiting or running; no event tells of it.

        Its slot is free for the next step. An event that another thread is giving out at this
        moment may still come.
        """
        with self._turns.changed:
            self._check_thread()
            if (live := self._live.get(number)) is not None and live.run is None:
                self._drop(number)

    def step(self) -> None:
        """Waits for its turn, then reads a chunk of a prompt and takes a step of each answer.

        Raises:
            Exception: an `on_event` raised it, in this step or in one that a reader of `run` took;
                its request is cancelled, others go on. Any other error ends all requests without an
                event; the engine is then as new. Where that befell another thread's step, and
                submitted requests were lost, a MeshwenError says so.
            KeyboardInterrupt: the requests stay, but for one whose event was being given out.
        """
        with self._turn():
            self._step(threading.get_ident())
            with self._turns.changed:
                failures, self._failures = self._failures, []
        if failures:
            for other in failures[1:]:
                failures[0].add_note(f"another request failed too: {other!r}")
            raise failures[0]

    def run(self, requests: Sequence[Request]) -> Stream[Event]:
        """Runs requests; every token comes as it is drawn. They are numbered in their order.

        They are submitted when the first event is asked for; however many they are, they may all
        wait. Closing the stream cancels what is unfinished. What is not fetched is kept.

        Raises:
            MeshwenError: `check` refuses one of them; none is run. From the stream: the requests
                were lost when a step broke off; the thread that took it gets the error itself.
        """
        if not isinstance(requests, Iterable):
            raise MeshwenError(f"requests must be a list, not {brief(requests)}")
        requests = list(requests)
        for number, request in enumerate(requests, start=1):
            self.check(request, f"prompt {number}")
        run = _Run(self, requests)
        return Stream(run.pull, run.close)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Waits until no step runs, and lets none begin: for other programs on the same devices.

        Two programs with collectives that are launched at once may reach the devices in different
        orders, and would then wait for each other.
        """
        with self._turn():
            yield

    @contextmanager
    def _turn(self, ready: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        with self._turns.changed:
            self._check_thread()
        with self._turns.take(ready) as mine:
            yield mine

    def _check_thread(self) -> None:
        thread = threading.get_ident()
        if self._one_thread and thread != self._user and (self._live or self._turns.busy_elsewhere):
            raise MeshwenError(
                "the mesh spans several processes, which must all make the same calls in the same "
                "order: call the model from one thread"
            )
        self._user = thread

    def _add(self, request: Request, on_event: Callable[[Event], None], run: _Run | None) -> int:
        number, self._submitted = self._submitted, self._submitted + 1

        def deliver(event: Event) -> None:
            if event.completion is not None:
                with self._turns.changed:
                    self._live.pop(number, None)
            on_event(event)

        limit = self._scheduler.limit(request)
        constraints = TokenConstraints.of(request, limit, self._eos, self.config.vocab_size)
        sequence = SequenceState(
            number, request, limit, self._tokenizer, self._eos, deliver, constraints
        )
        self._live[number] = _Live(sequence, run, threading.get_ident())
        self._new.append(sequence)
        return number

    def _drop(self, number: int) -> None:
        if (live := self._live.pop(number, None)) is not None:
            live.sequence.cancelled = self._dropped = True

    def _step(self, told: int | None = None) -> None:
        """Takes a step, for who has the turn; thread `told` needs no word of what it breaks."""
        try:
            with self._turns.changed:
                new, self._new = self._new, []
                dropped, self._dropped = self._dropped, False
            self._scheduler.add(new)
            if dropped:
                self._scheduler.drop_ended()
            self._scheduler.step()
        except BaseException as error:  # An interrupt too, wherever it comes.
            self._take_errors()  # Before they are lost with the step.
            self._lose(error, told)
            raise
        self._take_errors()

    def _take_errors(self) -> None:
        """Ends the requests whose `on_event` raised; `step` raises that."""
        with self._turns.changed:
            for number, failure in self._scheduler.take_errors():
                self._live.pop(number, None)
                self._failures.append(failure)

    def _lose(self, error: BaseException, told: int | None) -> None:
        """Tells whose requests a step that broke off has taken with it.

        The cache is gone. An interrupt says nothing against the requests themselves, though: but
        for one that was just being told of a token, they are read again.
        """
        torn = self._scheduler.telling
        self._scheduler.forget()
        with self._turns.changed:
            new = {sequence.number for sequence in self._new}
            lost = [n for n, _ in list(self._live.items()) if n not in new]
            if not isinstance(error, Exception):
                self._new = [one.sequence for n, one in list(self._live.items()) if n != torn]
                lost = [] if torn is None else [torn]
            for live in [live for n in lost if (live := self._live.pop(n, None))]:
                failure = MeshwenError("these requests were lost when a step of others failed")
                failure.__cause__ = error
                if live.run is not None:
                    live.run.failure = failure
                elif live.thread != told:
                    self._failures.append(failure)


@dataclass(frozen=True)
class _Live:
    """An unfinished request; `run` is None for one that was submitted."""

    sequence: SequenceState
    run: _Run | None
    thread: int  # That submitted it.


class _Run:
    """The requests of one call of `Engine.run`, and those of their events that were not fetched."""

    def __init__(self, engine: Engine, requests: Sequence[Request]):
        self._engine = engine
        self._requests: Sequence[Request] | None = requests  # None once they are submitted.
        self._numbers: dict[int, int] = {}  # The engine's, of unfinished requests, to the caller's.
        self._came: deque[Event] = deque()
        self.failure: MeshwenError | None = None

    def pull(self) -> Event | None:
        """Waits for the next event, taking steps by turns; None: all have come, or it is closed.

        Raises:
            MeshwenError: the requests were lost.
            BaseException: this thread's step broke off.
        """
        changed = self._engine._turns.changed
        with changed:
            self._engine._check_thread()
        try:
            with changed:
                self._submit()
            while True:
                with changed:
                    if self._ready():
                        return self._take()
                with self._engine._turn(self._ready) as mine:
                    if mine:
                        self._engine._step()
        except BaseException:
            self.close()
            raise

    def _submit(self) -> None:
        """Submits the requests, the first time."""
        requests, self._requests = self._requests, None
        if requests and self._engine._one_thread:
            check_requests(requests)
        for number, request in enumerate(requests or ()):
            self._numbers[self._engine._add(request, self._came.append, self)] = number

    def close(self) -> None:
        """Cancels what is unfinished; who waits in `pull` gets None."""
        with self._engine._turns.changed:
            # Not by `_numbers`: an interrupt may have come before a request's was noted.
            for number in [n for n, live in list(self._engine._live.items()) if live.run is self]:
                self._engine._drop(number)
            self._requests, self.failure = None, None
            self._numbers.clear()
            self._engine._turns.changed.notify_all()

    def _ready(self) -> bool:
        return bool(self._came or self.failure or not self._numbers)

    def _take(self) -> Event | None:
        if not self._numbers:
            return None
        if not self._came:
            assert self.failure
            raise self.failure
        event = self._came.popleft()
        number = self._numbers[event.request]
        if event.completion is not None:
            del self._numbers[event.request]
        return replace(event, request=number)
