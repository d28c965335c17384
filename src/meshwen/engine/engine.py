# SPDX-License-Identifier: Apache-2.0
"""Requests in, tokens out, from any number of threads, which share one batch.

The engine has no thread of its own: a thread that waits for tokens takes a step whenever it gets
the lock. A step gives tokens to all requests, whichever thread takes it, so each caller gets its
own while any of them waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike

from meshwen.cache.budget import KVCachePlan
from meshwen.common.arguments import brief
from meshwen.common.paths import user_path
from meshwen.engine.agreement import check_requests
from meshwen.engine.cache_stats import CacheStats
from meshwen.engine.compiled_grammars import CompiledGrammar, Grammars
from meshwen.engine.core import EngineCore
from meshwen.engine.engine_run import EngineRun
from meshwen.engine.prefixes import Prefixes
from meshwen.engine.prompt_lookup import PromptLookup
from meshwen.engine.request import Event, Request, check_prompt, check_sampling
from meshwen.engine.runner import ModelRunner
from meshwen.engine.sampling_params import SamplingParams
from meshwen.engine.shared_core import SharedCore
from meshwen.engine.speculation import Speculation
from meshwen.engine.stream import Stream
from meshwen.errors import MeshwenError
from meshwen.models.config import ModelConfig
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
        plan: the most sequences at once, the longest, and how many KV blocks there are for them.
        max_waiting: requests that may wait.
        max_num_batched_tokens: the most tokens of a step.
        prefix_caching: whether what prompts begin with is found in the KV cache again.
        speculation: proposes draft tokens; None: there are none. They only change how fast an
            answer comes; in fast numerics also its rounding.

    Attributes:
        max_waiting: may be changed at any time, over processes in all alike.
    """

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: Tokenizer | None,
        eos_token_ids: Sequence[int],
        plan: KVCachePlan,
        max_waiting: int = 1024,
        max_num_batched_tokens: int = 512,
        prefix_caching: bool = True,
        speculation: Speculation | None = None,
    ):
        self._config = runner.config
        self._plan, self.max_waiting = plan, max_waiting
        speculation = speculation or Speculation(PromptLookup(), 0)
        self._core = EngineCore(  # For the thread that has the lock.
            runner, plan, max_num_batched_tokens, prefix_caching, speculation
        )
        self._prefixes = Prefixes(self._core, plan)
        eos = frozenset(eos_token_ids)
        self._shared = SharedCore(self._core, tokenizer, eos)
        self._grammars = Grammars(tokenizer, eos, runner.config.vocab_size)

    @property
    def config(self) -> ModelConfig:
        """The model's hyperparameters."""
        return self._config

    @property
    def max_model_len(self) -> int:
        """The most tokens of a prompt and its answer."""
        return self._plan.max_model_len

    @property
    def cache_plan(self) -> KVCachePlan:
        """How many KV blocks there are, and what they have room for."""
        return self._plan

    @property
    def cache_stats(self) -> CacheStats:
        """How full the KV cache is, and what was found in it so far."""
        return CacheStats.of(self._core.blocks, self._plan, self._core.scheduler.preemptions)

    @property
    def prefilled(self) -> tuple[int, int] | None:
        """Tokens done of the prompt that is being prefilled, and of how many; None: none is."""
        return self._core.scheduler.prefilled

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs, or `step` has something to raise."""
        return self._shared.requests.busy

    @property
    def waiting(self) -> int:
        """Requests whose computation has not begun."""
        return self._shared.requests.waiting

    def unfinished(self, number: int) -> bool:
        """Whether a request that was submitted waits or runs."""
        return number in self._shared.requests.live

    def check(self, request: Request, name: str) -> None:
        """Refuses a request that the engine cannot answer.

        Args:
            request: the request.
            name: what to call its prompt: "prompt 3".

        Raises:
            MeshwenError: the prompt is empty, too long, or has a token outside the vocabulary,
                there is no memory for it and its answer, or no answer can be held to its grammar.
        """
        self._checked(request, name)

    def check_grammar(self, grammar: str) -> None:
        """Refuses a grammar that no answer can be held to; any thread may call this, at any time.

        It is compiled, which may take some tenths of a second, and kept for requests that come
        soon.

        Raises:
            meshwen.engine.grammar.GrammarError: says why.
            MeshwenError: the model or the installation has not what grammars take.
        """
        self._grammars.compiled(grammar)

    def _checked(self, request: Request, name: str) -> CompiledGrammar | None:
        """As `check`; the request's grammar, compiled, which no lock is held for."""
        if not isinstance(request, Request):
            raise MeshwenError(f"{name} must be a Request, not {brief(request)}")
        check_prompt(request.prompt_tokens, self.config, name, self.max_model_len)
        check_sampling(request, self.config, name)
        self._core.limits.check_memory(request)
        grammar = request.sampling.grammar
        return None if grammar is None else self._grammars.compiled(grammar)

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
        grammar = self._checked(request, "the prompt")
        with self._shared.lock.changed:
            self._shared.check_thread()
            if self._shared.requests.waiting >= self.max_waiting:
                raise QueueFullError(f"{self.max_waiting} requests wait already; try again later")
            if self._shared.one_thread:
                check_requests([request])
            return self._shared.add(request, grammar, on_event, None)

    def cancel(self, number: int) -> None:
        """Drops a request that was submitted, waiting or running; no event reports it.

        Its row and blocks are free for the next step. An event that another thread is delivering
        at this moment may still come.
        """
        with self._shared.lock.changed:
            self._shared.check_thread()
            live = self._shared.requests.live.get(number)
            if live is not None and live.run is None:
                self._shared.requests.cancel(number)

    def step(self) -> None:
        """Waits for the lock, then takes a step: a token of each answer, and chunks of prompts.

        Raises:
            Exception: an `on_event` raised it, or a token's text could not be made, in this step or
                in one that a reader of `run` took; its request is cancelled, others go on. Any
                other error ends all requests without an event; the engine is then as new. Where
                that happened in another thread's step, and submitted requests were lost, a
                MeshwenError says so.
            KeyboardInterrupt: the requests stay, but for one whose event was being delivered.
        """
        with self._shared.hold():
            self._shared.step(threading.get_ident())
            with self._shared.lock.changed:
                errors = self._shared.requests.take_errors()
        if errors:
            for other in errors[1:]:
                errors[0].add_note(f"another request failed too: {other!r}")
            raise errors[0]

    def run(self, requests: Sequence[Request]) -> Stream[Event]:
        """Runs requests; every token comes as it is drawn. They are numbered in their order.

        They are submitted when the first event is asked for; however many they are, they may all
        wait. Closing the stream cancels what is unfinished. What is not fetched is kept.

        Raises:
            MeshwenError: `check` refuses one of them; none is run. From the stream: the text of one
                could not be made, which cancels the others; or the requests were lost when a step
                broke off; the thread that took it gets the error itself.
        """
        if not isinstance(requests, Iterable):
            raise MeshwenError(f"requests must be a list, not {brief(requests)}")
        requests = list(requests)
        named = enumerate(requests, start=1)
        grammars = [self._checked(request, f"prompt {number}") for number, request in named]
        run = EngineRun(self._shared, requests, grammars)
        return Stream(run.pull, run.close)

    def save_prefix(
        self,
        path: str | PathLike[str],
        prompt_tokens: Sequence[int],
        cache_salt: str = "",
        *,
        overwrite: bool = False,
    ) -> int:
        """Writes what the KV cache holds of a prompt to a file; computes it if it is not there.

        The file serves every mesh, of any block size: see `meshwen.engine.prefix_file`. Whole
        blocks of the prompt are saved. The first call for a model reads all of its weights, for a
        hash of them.

        Args:
            path: the file, in a folder that is there.
            prompt_tokens: the prompt's ids.
            cache_salt: that of the requests which are to find it.
            overwrite: replace a file that is there.

        Returns:
            How many tokens were saved.

        Raises:
            MeshwenError: prefix caching is off, the mesh spans several processes, `check` refuses
                the prompt, it fills no block, the file is there or cannot be written, or others'
                requests have taken the blocks at once.
        """
        self._prefixes.check("save")
        sampling = SamplingParams(max_new_tokens=1)
        request, file = Request(tuple(prompt_tokens), sampling, cache_salt), user_path(path)
        self.check(request, "the prompt")
        self._prefixes.check_new(file, request, overwrite=overwrite)
        with self._shared.hold():
            prefix = self._prefixes.find(request)
        if prefix is None:
            for event in self.run([request]):
                if event.completion is not None and event.completion.error is not None:
                    raise MeshwenError(event.completion.error)
            with self._shared.hold():
                prefix = self._prefixes.find(request)
        if prefix is None:
            raise MeshwenError(
                "other requests took the KV blocks of the prompt before it was saved: try again, "
                "or raise kv_cache_memory"
            )
        self._prefixes.write(file, prefix, overwrite=overwrite)
        return len(prefix.token_ids)

    def load_prefix(self, path: str | PathLike[str]) -> int:
        """Puts a saved prefix into the KV cache, where requests with its salt find it.

        It stays until its blocks are needed for others, as every other prefix does.

        Args:
            path: what `save_prefix` wrote, for the same model in the same numerics and dtype; on
                whatever mesh.

        Returns:
            How many tokens are in the cache now: whole blocks.

        Raises:
            MeshwenError: prefix caching is off, the mesh spans several processes, the file was
                saved by another model, is damaged, or does not fit; nothing has changed then.
        """
        self._prefixes.check("load")
        prefix = self._prefixes.read(user_path(path))
        with self._shared.hold():
            self._core.scheduler.drop_cancelled()  # No step may have come since.
            self._prefixes.check_room(prefix)
            with self._shared.breaking_off(threading.get_ident()):
                self._prefixes.put(prefix)
        return len(prefix.token_ids)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Waits until no step runs, and lets none begin: for other programs on the same devices.

        Two programs with collectives that are launched at once may reach the devices in different
        orders, and would then wait for each other.
        """
        with self._shared.hold():
            yield
