# SPDX-License-Identifier: Apache-2.0
"""What the server has done, for Prometheus, under the names that vLLM's server gives it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from meshwen.engine.cache_stats import CacheStats
from meshwen.engine.request import Completion, Event, Request
from meshwen.server.engine_thread import Meter

if TYPE_CHECKING:
    from meshwen.server.engine_thread import EngineThread

_LABELS = ("model_name", "engine")
# Bounds of the histograms' buckets, in seconds.
_TO_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_BETWEEN_TOKENS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_OF_REQUEST = (
    *(0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0),
    *(60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_REASONS = ("stop", "length", "abort", "error")


class Metrics:
    """Counts requests and tokens, and measures what users wait for.

    Args:
        model_name: the label of all.

    Attributes:
        generated_tokens: of all answers.
    """

    def __init__(self, model_name: str):
        self._labels = (model_name, "0")
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self.generated_tokens = 0
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens of answers.")
        finished = Counter(
            "vllm:request_success",
            "Answers that ended, by why.",
            (*_LABELS, "finished_reason"),
            registry=self._registry,
        )
        self._finished = {reason: finished.labels(*self._labels, reason) for reason in _REASONS}
        self._first = self._seconds(
            "time_to_first_token", "From a request to its first token.", _TO_FIRST_TOKEN
        )
        self._between = self._seconds(
            "inter_token_latency", "From one token of an answer to the next.", _BETWEEN_TOKENS
        )
        self._whole = self._seconds(
            "e2e_request_latency", "From a request to its last token.", _OF_REQUEST
        )
        self._queued = self._seconds(
            "request_queue_time", "Until a request's computation begins.", _OF_REQUEST
        )
        self._prefill = self._seconds(
            "request_prefill_time", "From then to its first token.", _OF_REQUEST
        )
        self._decode = self._seconds(
            "request_decode_time", "From its first token to its last.", _OF_REQUEST
        )

    def _counter(self, name: str, text: str) -> Counter:
        made = Counter(f"vllm:{name}", text, _LABELS, registry=self._registry)
        return made.labels(*self._labels)

    def _seconds(self, name: str, text: str, bounds: tuple[float, ...]) -> Histogram:
        made = Histogram(
            f"vllm:{name}_seconds", text, _LABELS, buckets=bounds, registry=self._registry
        )
        return made.labels(*self._labels)

    def watch(
        self, engine: EngineThread, cache_stats: Callable[[], CacheStats] | None = None
    ) -> None:
        """Shows from now on how many requests the engine has, and how full its cache is."""
        self._registry.register(_State(engine, cache_stats, self._labels))

    def meter(self, request: Request) -> Meter:
        """What measures one request, which is asked for now."""
        return _RequestMeter(self, request)

    def text(self) -> bytes:
        """All, in Prometheus' text format."""
        return generate_latest(self._registry)

    def begun(self, prompt_tokens: int) -> None:
        """The first token of a request came."""
        self._prompt_tokens.inc(prompt_tokens)

    def tokens(self, count: int) -> None:
        """Tokens came."""
        self._generation_tokens.inc(count)
        self.generated_tokens += count

    def first_token(self, seconds: float) -> None:
        """An answer's first token came so long after its request."""
        self._first.observe(seconds)

    def next_token(self, seconds: float) -> None:
        """An answer's next token came so long after the one before."""
        self._between.observe(seconds)

    def ended(self, reason: str, seconds: float) -> None:
        """An answer ended so long after its request."""
        self._finished[reason].inc()
        self._whole.observe(seconds)

    def completed(self, completion: Completion) -> None:
        """An answer is whole."""
        timings = completion.timings
        self._queued.observe(timings.queue_seconds)
        self._prefill.observe(timings.time_to_first_token - timings.queue_seconds)
        self._decode.observe(timings.decode_seconds)


class _RequestMeter(Meter):
    """Measures one request."""

    def __init__(self, metrics: Metrics, request: Request):
        self._metrics, self._request = metrics, request
        self._asked = time.perf_counter()
        self._last: dict[int, float] = {}  # By choice, when its last token came.
        self._left = request.sampling.n

    def events(self, found: list[Event]) -> None:
        now = time.perf_counter()
        if not self._last:
            self._metrics.begun(len(self._request.prompt_tokens))
        for choice in dict.fromkeys(event.choice for event in found if event.token >= 0):
            if (last := self._last.get(choice)) is None:
                self._metrics.first_token(now - self._asked)
            else:
                self._metrics.next_token(now - last)
            self._last[choice] = now
        self._metrics.tokens(sum(event.token >= 0 for event in found))
        for event in found:
            if event.completion is not None:
                self._left -= 1
                self._metrics.ended(event.completion.finish_reason, now - self._asked)
                self._metrics.completed(event.completion)

    def end(self) -> None:
        for _ in range(self._left):
            self._metrics.ended("abort", time.perf_counter() - self._asked)
        self._left = 0


class _State(Collector):
    """What is asked of the engine when somebody looks."""

    def __init__(
        self,
        engine: EngineThread,
        cache_stats: Callable[[], CacheStats] | None,
        labels: tuple[str, ...],
    ):
        self._engine, self._stats, self._labels = engine, cache_stats, labels
        # What was looked up before is not the clients'.
        self._before = None if cache_stats is None else cache_stats()

    def collect(self) -> Iterator[Metric]:
        engine, stats, before = self._engine, self._stats and self._stats(), self._before
        yield self._gauge("num_requests_running", "Requests that are computed.", engine.running)
        yield self._gauge("num_requests_waiting", "Requests that wait.", engine.waiting)
        yield self._counter("engine_failures", "Steps that failed.", engine.failures)
        if stats is None or before is None:
            return
        used = stats.used_blocks / max(stats.total_blocks, 1)
        yield self._gauge("kv_cache_usage_perc", "Share of the KV blocks in use: 1 is all.", used)
        for name, text, count in (
            ("prefix_cache_queries", "Tokens looked up in the KV cache.", "queried_tokens"),
            ("prefix_cache_hits", "Tokens found there.", "cached_tokens"),
            ("num_preemptions", "Answers that gave their blocks back.", "preemptions"),
        ):
            yield self._counter(name, text, getattr(stats, count) - getattr(before, count))

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=_LABELS)
        family.add_metric(self._labels, value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", text, labels=_LABELS)
        family.add_metric(self._labels, value)
        return family
