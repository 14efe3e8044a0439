"""Fixtures that several rooms use."""

import asyncio
import os
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from redis.asyncio import Redis

from baton.redis_server import redis_command, redis_url

Until = Callable[..., Awaitable[None]]


class RedisServer:
    """A real Redis on a unix socket; can be killed and started again, empty."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.url = redis_url(directory)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(redis_command(self.directory), env=dict(os.environ))

    async def ready(self) -> None:
        client = Redis.from_url(self.url)
        async with asyncio.timeout(20):
            while True:
                try:
                    await client.ping()
                    break
                except Exception:  # noqa: BLE001 - whatever it is, it is not up yet
                    await asyncio.sleep(0.02)
        await client.aclose()

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture
async def redis_server() -> AsyncIterator[RedisServer]:
    # tmp_path can be longer than a unix socket's name may be.
    with tempfile.TemporaryDirectory(prefix="bt-") as directory:
        server = RedisServer(Path(directory))
        server.start()
        await server.ready()
        yield server
        server.kill()


@pytest.fixture
def until() -> Until:
    """`await until(condition)`: wait for a condition that other tasks or processes bring about."""

    async def wait(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.02)

    return wait
