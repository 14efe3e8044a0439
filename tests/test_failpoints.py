import os
import signal
import subprocess
import sys

import pytest

from baton.errors import BatonError, Cause
from baton.failpoints import Failpoints

CHILD = """
import sys
from baton.failpoints import Failpoints
failpoints = Failpoints(sys.argv[1:])
for _ in range(2):
    failpoints.hit("bind")
    print("passed", flush=True)
"""


def child(spec: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", CHILD, spec]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_none_by_default() -> None:
    assert not Failpoints()
    Failpoints().hit("bind")


def test_an_error_at_the_count_and_once() -> None:
    failpoints = Failpoints(["bind:2=error"])
    failpoints.hit("submit")
    failpoints.hit("bind")
    with pytest.raises(BatonError) as caught:
        failpoints.hit("bind")
    assert caught.value.cause is Cause.STEP_FAILED
    assert caught.value.cause.retryable
    assert caught.value.cause.http_status == 503
    failpoints.hit("bind")


def test_counting_from_later_on() -> None:
    failpoints = Failpoints(["bind:+2=error"])
    for _ in range(3):
        failpoints.hit("bind")
    failpoints.count()
    failpoints.hit("bind")
    with pytest.raises(BatonError):
        failpoints.hit("bind")


def test_one_after_the_other() -> None:
    failpoints = Failpoints(["bind:+1=error", "token:+1=error"])
    failpoints.count()
    failpoints.hit("token")
    with pytest.raises(BatonError):
        failpoints.hit("bind")
    failpoints.count()
    with pytest.raises(BatonError):
        failpoints.hit("token")


@pytest.mark.parametrize(
    "spec", ["bind", "bind:0=kill", "bind:++1=kill", "bind:1=explode", "nowhere:1=kill", ""]
)
def test_bad_specs_are_refused(spec: str) -> None:
    with pytest.raises(ValueError, match="no failpoint"):
        Failpoints([spec])


def test_kill() -> None:
    process = child("bind:2=kill")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert out == "passed\n"


def test_stop() -> None:
    process = child("bind:1=stop")
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    process.send_signal(signal.SIGCONT)
    out, _ = process.communicate(timeout=60)
    assert out == "passed\npassed\n"
