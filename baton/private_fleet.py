"""A fleet of one's own, for as long as one command needs it."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from baton.config import ServeConfig, to_env
from baton.errors import BatonError, Cause
from baton.fleet import free_port
from baton.supervisor import bind_to_parent

_POLL_S = 0.25
_STOP_S = 30.0  # nobody's answers are cut: whoever used it is done
_HOST = "127.0.0.1"


@contextmanager
def private_fleet(config: ServeConfig) -> Iterator[str]:
    """Its URL, once a route is proven. Ctrl-C reaches the caller alone.

    Raises:
        BatonError: it ended before that.
    """
    port = free_port(_HOST)
    own = to_env(config) | {"BATON_HOST": _HOST, "BATON_PORT": str(port)}
    env = {k: v for k, v in os.environ.items() if not k.startswith("BATON_")} | own
    process = subprocess.Popen(
        [sys.executable, "-m", "baton.cli", "serve"],
        env=env | {"PYTHONSAFEPATH": "1", "BATON_LOG_LEVEL": "warning"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=bind_to_parent(),  # noqa: PLW1509 - a system call, and no lock
    )
    url = f"http://{_HOST}:{port}"
    try:
        _wait_ready(process, url)
        yield url
    finally:
        _stop(process)


def _wait_ready(process: "subprocess.Popen[bytes]", url: str) -> None:
    while not _is_ready(url):
        if process.poll() is not None:
            raise BatonError(Cause.INTERNAL, "the fleet did not start; its last words are above")
        time.sleep(_POLL_S)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()  # what it started ends with it
        process.wait()
