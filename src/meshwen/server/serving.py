# SPDX-License-Identifier: Apache-2.0
"""What the handlers of all requests share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from meshwen.engine.cache_stats import CacheStats
from meshwen.models.config import ModelConfig
from meshwen.server.engine_thread import EngineThread
from meshwen.server.layout import Layout
from meshwen.server.metrics import Metrics
from meshwen.server.options import ServerOptions
from meshwen.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Serving:
    """A model that is served; `app.state.serving` of the application.

    Attributes:
        engine: computes answers.
        tokenizer: the model's; None: it has none, and takes token ids alone.
        config: the model's hyperparameters.
        max_model_len: the most tokens of a prompt and its answer.
        generation_config: the checkpoint's sampling defaults, as its file has them.
        names: the model's, for clients; answers have the first.
        fingerprint: `system_fingerprint`: what decides the bits of an answer.
        options: how it is served.
        created: when, in seconds since 1970.
        layout: how it lies on its mesh; None: it is not known.
        cache_stats: says how full the KV cache is; None: it is not known.
        metrics: counts what is done.
    """

    engine: EngineThread
    tokenizer: Tokenizer | None
    config: ModelConfig
    max_model_len: int
    generation_config: Mapping[str, Any]
    names: tuple[str, ...]
    fingerprint: str
    options: ServerOptions
    created: int
    layout: Layout | None = None
    cache_stats: Callable[[], CacheStats] | None = None
    metrics: Metrics = field(default_factory=lambda: Metrics("unknown"))
