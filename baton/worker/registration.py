"""A worker's entry in Redis, and what it tells there about its prefix cache."""

import asyncio
from contextlib import suppress

from baton.engine.events import StepOutput
from baton.locality import Signer, WorkerRegistration, read_registrations
from baton.messages import GatewayMessage, WorkerMessage
from baton.redis_client import FAILURES, connect
from baton.settings import ClusterSettings
from baton.types import BlockHash, WorkerInfo


class Registration:
    """An observer of the engine's prefix cache; registered between `start` and `close`."""

    def __init__(self, settings: ClusterSettings, redis_url: str, info: WorkerInfo) -> None:
        tokens = [secret.get_secret_value() for secret in settings.cluster_token]
        self._redis = connect(redis_url)
        self._cluster = settings.cluster
        self._signer = Signer(tokens)
        self._entry = WorkerRegistration(self._redis, settings.cluster, tokens, info)
        self._running: asyncio.Task[None] | None = None

    async def peers(self) -> list[WorkerInfo]:
        """Who is registered now; nobody, as long as Redis cannot say."""
        try:
            found, _ = await read_registrations(self._redis, self._signer, self._cluster)
        except FAILURES:
            return []
        return list(found.values())

    def start(self) -> None:
        self._running = asyncio.create_task(self._entry.run())

    def inventory(self) -> tuple[int, list[BlockHash]]:
        return self._entry.inventory()

    def stepped(self, output: StepOutput) -> None:
        if output.stored or output.removed:
            self._entry.publish(output.stored, output.removed)

    def received(self, message: GatewayMessage) -> None:
        pass

    def sent(self, message: WorkerMessage) -> None:
        pass

    async def close(self) -> None:
        """Nobody finds this worker any more. Idempotent."""
        running, self._running = self._running, None
        if running is not None:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
            await self._redis.aclose()
