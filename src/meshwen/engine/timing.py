# SPDX-License-Identifier: Apache-2.0
"""When things happened to a request."""

from __future__ import annotations

import time

from meshwen.engine.request import Timings


class RequestTimer:
    """The times of one request, from its submission on."""

    def __init__(self) -> None:
        self._submitted = self._first_token = time.perf_counter()
        self._began: float | None = None

    @property
    def waits(self) -> bool:
        """Whether its prefill has not begun."""
        return self._began is None

    def begin(self) -> None:
        """Its prefill begins; the first time counts."""
        if self._began is None:
            self._began = time.perf_counter()

    def first_token(self) -> None:
        """Its first token has come."""
        self._first_token = time.perf_counter()

    def timings(self) -> Timings:
        """The times of a request that ends now."""
        assert self._began is not None
        return Timings(
            queue_seconds=self._began - self._submitted,
            time_to_first_token=self._first_token - self._submitted,
            decode_seconds=time.perf_counter() - self._first_token,
        )
