"""How many bytes of KV may be on their way at once: packed by a producer and not yet taken by their
consumers, or granted to producers by a consumer."""

import asyncio

DEFAULT_STAGING_BYTES = 512 << 20


class StagingBudget:
    """Of all fetches that one worker serves. Event loop only."""

    def __init__(self, max_bytes: int = DEFAULT_STAGING_BYTES) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self._changed = asyncio.Event()

    @property
    def free_bytes(self) -> int:
        return max(self.max_bytes - self.used_bytes, 0)

    def use(self, num_bytes: int) -> None:
        self.used_bytes += num_bytes

    def free(self, num_bytes: int) -> None:
        self.used_bytes -= num_bytes
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def freed(self) -> None:
        """Wait until something is."""
        await self._changed.wait()
