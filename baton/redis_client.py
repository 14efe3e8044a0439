"""Clients of the Redis that a fleet shares."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from redis.asyncio import ConnectionPool, Redis
from redis.exceptions import RedisError

TIMEOUT_S = 2.0  # of a call: a stalled Redis stalls nobody
FAILURES = (RedisError, OSError, TimeoutError)  # of a call; none of them ends the caller


def connect(url: str) -> Redis:
    """A client whose calls have no limit of their own: each stands under `time_limit`."""
    # redis-py's is `asyncio.wait_for`, which before Python 3.12 may swallow a cancellation; then a
    # loop that asks Redis never ends.
    client: Redis = Redis.from_url(url, socket_timeout=None, socket_connect_timeout=TIMEOUT_S)
    return client


@asynccontextmanager
async def time_limit() -> AsyncIterator[None]:
    """
    Raises:
        TimeoutError: with a text, one of `FAILURES`.
    """
    try:
        async with asyncio.timeout(TIMEOUT_S):
            yield
    except TimeoutError:
        raise TimeoutError(f"no answer within {TIMEOUT_S:g} s") from None


def check_url(url: str) -> None:
    """Without connecting.

    Raises:
        ValueError: no client can be made of it, or it would not be the one that is meant.
    """
    parts = urlsplit(url)
    if parts.scheme == "unix" and (parts.hostname or not parts.path.strip("/")):
        raise ValueError("unix:// takes the whole path of a socket: unix:///run/redis.sock")
    if parts.scheme in ("redis", "rediss") and not (parts.path.strip("/") or "0").isdecimal():
        raise ValueError("what follows the host is the number of a database: redis://host:6379/0")
    try:
        ConnectionPool.from_url(url).make_connection()  # type: ignore[no-untyped-call]
    except (TypeError, ValueError) as error:
        raise ValueError(f"is no URL of a Redis: {error}") from None


def reason_of(error: BaseException) -> str:
    """For a log: some of these have no text."""
    return str(error) or type(error).__name__
