"""Who packs the next frame when several consumers read at once: those with a ticket come first."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """Readers by hash yield between two frames; so a reader with a ticket waits for at most one of
    theirs. Event loop only."""

    def __init__(self) -> None:
        self._num_first = 0
        self._is_free = asyncio.Event()
        self._is_free.set()

    @asynccontextmanager
    async def take(self, yields: bool) -> AsyncIterator[None]:
        """While a frame is packed. `yields`: begin when nobody who does not yield is at it."""
        if yields:
            while self._num_first:
                await self._is_free.wait()
            yield
            return
        self._num_first += 1
        self._is_free.clear()
        try:
            yield
        finally:
            self._num_first -= 1
            if not self._num_first:
                self._is_free.set()
