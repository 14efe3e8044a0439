"""What a step says about itself, and what scheduling must not cost."""

import subprocess
import sys

import pytest

from baton.engine.commands import Release
from baton.engine.core import EngineCore
from baton.engine.null_runner import NullRunner
from baton.types import Role, StepTiming
from tests.engine.driver import Driver, leg_id, prompt, request


def test_an_engine_without_work_says_nothing() -> None:
    driver = Driver()
    assert not driver.core.has_work
    assert driver.core.step() is None


def test_a_command_without_events_still_brings_a_fresh_snapshot() -> None:
    driver = Driver()
    driver.prefill(request("p", prompt(40)))
    driver.run()
    driver.core.apply(Release(leg_id("p")))
    assert driver.core.has_work
    output = driver.core.step()
    assert output is not None
    assert (output.events, output.timing) == ((), None)
    assert output.snapshot.free_blocks == 64
    assert driver.core.step() is None


def test_timing_tells_prefill_from_decode() -> None:
    driver = Driver(max_num_batched_tokens=40)
    driver.local(request("a", prompt(20, 1), max_tokens=9))
    driver.step()
    driver.local(request("b", prompt(60, 2), max_tokens=9))
    run = driver.runner.run

    def slow(batch, on_layers):  # type: ignore[no-untyped-def]
        driver.now_s += 0.25
        return run(batch, on_layers)

    driver.runner.run = slow  # type: ignore[method-assign]
    driver.step()
    driver.step()
    driver.step()
    assert [output.timing for output in driver.outputs] == [
        StepTiming(20, 0, 0, 0, 0.0),
        StepTiming(39, 0, 1, 21, 250.0),
        StepTiming(21, 39, 1, 22, 250.0),
        StepTiming(0, 0, 2, 23 + 61, 250.0),
    ]


def test_the_snapshot_counts_what_there_is() -> None:
    driver = Driver(32, max_num_seqs=2, max_num_batched_tokens=30, role=Role.PREFILL)
    driver.local(request("a", prompt(20, 1), max_tokens=9))
    driver.step()
    driver.local(request("b", prompt(60, 2), max_tokens=9))
    driver.local(request("c", prompt(50, 3), max_tokens=9))
    driver.decode(request("d", prompt(30, 4)))
    driver.step()
    snapshot = driver.core.snapshot()
    assert (snapshot.role, snapshot.draining, snapshot.step_age_ms) == (Role.PREFILL, False, 0.0)
    assert (snapshot.num_running, snapshot.num_waiting, snapshot.num_waiting_for_kv) == (2, 1, 1)
    assert snapshot.queued_prefill_tokens == (60 - 29) + 50
    assert snapshot.context_tokens == 22
    assert (snapshot.free_blocks, snapshot.total_blocks) == (32 - 2 - 4 - 3, 32)


def test_the_engine_needs_no_torch() -> None:
    code = (
        "import sys; import baton.engine.core, baton.engine.thread, baton.engine.null_runner;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'triton', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("num_prompt", "num_blocks"), [(100, 500), (6000, 800)])
def test_a_step_looks_at_new_tokens_only(
    num_prompt: int, num_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No scan over a running, a waiting or a held prompt: calls and returns of a decode step do not
    depend on its length."""
    driver = Driver(num_blocks, max_num_batched_tokens=8000, max_model_len=8000, num_layers=1)
    driver.prefill(request("held", prompt(num_prompt, 1)))
    driver.local(request("runs", prompt(num_prompt, 2), max_tokens=90))
    driver.run_until_decoding()
    driver.local(request("waits", prompt(7900, 3)))  # it does not fit while the others are there
    driver.core.step()
    monkeypatch.setattr(NullRunner, "export_kv", lambda *_: [1])
    assert driver.core.snapshot().num_waiting == 1
    assert max(count_calls(driver.core) for _ in range(20)) < 600


def count_calls(core: EngineCore) -> int:
    """Calls and returns, Python's and C's, of one step."""
    num_calls = 0

    def count(*_: object) -> None:
        nonlocal num_calls
        num_calls += 1

    sys.setprofile(count)
    try:
        core.step()
    finally:
        sys.setprofile(None)
    return num_calls
