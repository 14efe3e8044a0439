"""A role is a policy, no more."""

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


def test_a_worker_without_redis_says_so() -> None:
    command = [sys.executable, "-m", "baton.cli", "prefill-worker"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "--redis-url" in done.stderr


def test_failpoints_are_refused_without_test_hooks(caplog: pytest.LogCaptureFixture) -> None:
    config = WorkerConfig(failpoint=("bind:1=kill",), redis_url="redis://127.0.0.1:1/0")
    assert run(config, decode_policy(config)) == 2
    assert "--test-hooks" in caplog.text
