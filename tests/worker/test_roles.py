"""A role is a policy, no more."""

import os
import subprocess
import sys

import pytest

from baton.config import WorkerConfig
from baton.decode_worker.policy import decode_policy
from baton.prefill_worker.policy import prefill_policy
from baton.types import Role
from baton.worker.main import run


def test_policies() -> None:
    config = WorkerConfig(lease_watermark=0.6, lease_ms=1234)
    prefill, decode = prefill_policy(config), decode_policy(config)
    assert (prefill.role, decode.role) == (Role.PREFILL, Role.DECODE)
    assert prefill.lease_watermark == 0.6
    assert decode.lease_watermark < prefill.lease_watermark
    assert prefill.lease_idle_ms == decode.lease_idle_ms == 1234


def test_the_command_line_starts_without_torch() -> None:
    """Importing a role package must cost nothing: `baton --help` does."""
    code = "import sys, baton.prefill_worker, baton.decode_worker; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--redis-url is missing"),
        (["--redis-url", "http://host"], "--redis-url (the command line): is no URL of a Redis"),
    ],
)
def test_a_worker_that_cannot_be_found_says_so_at_once(arguments: list[str], expected: str) -> None:
    """That is before it imports torch, which takes seconds."""
    code = (
        "import sys; from baton.cli import main\n"
        "try: main(['prefill-worker', *sys.argv[1:]])\n"
        "except SystemExit as end: sys.exit(99 if 'torch' in sys.modules else end.code)"
    )
    command = [sys.executable, "-c", code, *arguments]
    env = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env, check=False)
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr


def test_failpoints_are_refused_without_test_hooks(caplog: pytest.LogCaptureFixture) -> None:
    config = WorkerConfig(failpoint=("bind:1=kill",), redis_url="redis://127.0.0.1:1/0")
    assert run(config, decode_policy(config)) == 2
    assert "--test-hooks" in caplog.text
