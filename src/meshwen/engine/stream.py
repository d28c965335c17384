# SPDX-License-Identifier: Apache-2.0
"""Items as they come, for `for` and `async for`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class Stream(Iterator[T], AsyncIterator[T], Generic[T]):
    """An iterator that any thread may advance and close, and `async for` too.

    Closing it, leaving its `with` block, or dropping the last reference to it gives up the rest;
    who waits for an item in another thread then gets none. `async for` waits in a thread of the
    event loop's executor; a task that is cancelled while it waits closes the stream.

    Args:
        pull: waits for the next item; None: there is none.
        close: gives up the rest; may be called from any thread, several times.
    """

    def __init__(self, pull: Callable[[], T | None], close: Callable[[], None]):
        self._pull, self._close = pull, close

    def __next__(self) -> T:
        """The next item."""
        item = self._pull()
        if item is None:
            raise StopIteration
        return item

    async def __anext__(self) -> T:
        """The next item; the event loop goes on while it is waited for."""
        try:
            item = await asyncio.to_thread(self._pull)
        except asyncio.CancelledError:
            self.close()
            raise
        if item is None:
            raise StopAsyncIteration
        return item

    def close(self) -> None:
        """Gives up the rest."""
        self._close()

    async def aclose(self) -> None:
        """As `close`."""
        self.close()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Gives up the rest."""
        self.close()

    def __del__(self) -> None:
        """Gives up the rest."""
        self.close()
