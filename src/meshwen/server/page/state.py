# SPDX-License-Identifier: Apache-2.0
"""What the engine is doing, as the page shows it."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from meshwen.server.serving import Serving


def engine_state(serving: Serving) -> dict[str, Any]:
    """The engine's state at this moment; null for what is not known.

    Counts are since the server was started; whoever asks twice has the rate between.
    """
    stats = None if serving.cache_stats is None else asdict(serving.cache_stats())
    return {
        "model": serving.names[0],
        "fingerprint": serving.fingerprint,
        "max_model_len": serving.max_model_len,
        "max_queue": serving.options.max_queue,
        "seconds": time.monotonic(),
        "running": serving.engine.running,
        "waiting": serving.engine.waiting,
        "generated_tokens": serving.metrics.generated_tokens,
        "cache": stats,
        "mesh": None if serving.layout is None else serving.layout.to_json(),
    }
