"""Which inputs a step takes, and what becomes of those that fail. No model."""

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.engine.pooling_core import AbortJob, AddJob, PoolingCore, PoolingRow
from baton.engine.pooling_thread import PoolingThread
from baton.errors import BatonError, Cause
from baton.pooling import PoolingInput

POISON, NOT_FINITE = 13, 14


class FakeRunner:
    """A result names its input's first token."""

    def __init__(self) -> None:
        self.steps: list[list[int]] = []  # lengths

    def run(self, rows: Sequence[PoolingRow]) -> list[bytes | None]:
        self.steps.append([row.num_tokens for row in rows])
        if any(POISON in row.input.token_ids for row in rows):
            raise RuntimeError("poison")
        return [
            None if NOT_FINITE in row.input.token_ids else bytes(row.input.token_ids[:1])
            for row in rows
        ]


def row(length: int, first: int = 1) -> PoolingRow:
    return PoolingRow(PoolingInput((first, *[0] * (length - 1))))


def make(max_tokens: int = 10, max_seqs: int = 4) -> tuple[PoolingCore, FakeRunner]:
    runner = FakeRunner()
    return PoolingCore(runner, max_tokens, max_seqs), runner


def run(core: PoolingCore) -> dict[tuple[int, int], bytes | Cause]:
    """To the end: (job, index) → result."""
    found: dict[tuple[int, int], bytes | Cause] = {}
    while core.has_work:
        output = core.step()
        assert output is not None
        found |= {(result.job, result.index): result.value for result in output.results}
    return found


def test_steps_mix_jobs_up_to_their_bounds() -> None:
    core, runner = make()
    core.apply(AddJob(1, (row(4, 1), row(4, 2), row(4, 3))))
    core.apply(AddJob(2, (row(2, 4), row(25, 5), row(1, 6))))
    results = run(core)
    assert runner.steps == [[4, 4], [4, 2], [25], [1]]  # the long one is never cut
    assert results == {(1, i): bytes([i + 1]) for i in range(3)} | {
        (2, i): bytes([i + 4]) for i in range(3)
    }
    assert core.step() is None


def test_rows_are_bounded() -> None:
    core, runner = make(max_seqs=3)
    core.apply(AddJob(1, (row(1),) * 7))
    run(core)
    assert runner.steps == [[1] * 3, [1] * 3, [1]]


def test_urgent_ones_pass_and_aborted_ones_cost_nothing() -> None:
    core, runner = make(max_tokens=4)
    core.apply(AddJob(1, (row(4),) * 3))
    core.apply(AddJob(2, (row(3),), priority=-1))
    assert core.step() is not None
    assert runner.steps == [[3]]
    core.apply(AbortJob(1))
    core.apply(AbortJob(99))
    assert not core.has_work
    core.apply(AddJob(3, (row(2),)))
    assert run(core) == {(3, 0): b"\1"}
    assert runner.steps == [[3], [2]]


def test_an_input_fails_alone() -> None:
    core, runner = make()
    core.apply(AddJob(1, (row(2), row(2, POISON), row(2, NOT_FINITE), row(2))))
    assert run(core) == {
        (1, 0): b"\1",
        (1, 1): Cause.STEP_FAILED,
        (1, 2): Cause.NON_FINITE_LOGITS,
        (1, 3): b"\1",
    }
    assert runner.steps[0] == [2] * 4


@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(-1, 1)),
        max_size=6,
    ),
    st.integers(1, 10),
    st.integers(1, 4),
)
def test_every_input_is_computed_once(
    jobs: list[tuple[list[int], int]], max_tokens: int, max_seqs: int
) -> None:
    core, runner = make(max_tokens, max_seqs)
    for number, (lengths, priority) in enumerate(jobs):
        core.apply(AddJob(number, tuple(map(row, lengths)), priority))
    results = run(core)
    assert set(results) == {(n, i) for n, (job, _) in enumerate(jobs) for i in range(len(job))}
    computed = sorted(length for step in runner.steps for length in step)
    assert computed == sorted(length for job, _ in jobs for length in job)
    for step in runner.steps:
        assert len(step) <= max_seqs
        assert len(step) == 1 or sum(step) <= max_tokens


def wait(condition: Callable[[], object]) -> None:
    import time

    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_thread_ends_with_a_fault_of_the_engine_itself() -> None:
    core, _ = make()
    outputs, failures = [], []
    thread = PoolingThread(core, outputs.append, failures.append)
    thread.start()
    thread.post(AddJob(1, (row(2),)))
    wait(lambda: outputs)
    assert thread.is_alive
    core._take = lambda: 1 / 0  # type: ignore[assignment,return-value,method-assign]
    thread.post(AddJob(2, (row(2),)))
    wait(lambda: failures)
    assert isinstance(failures[0], ZeroDivisionError)
    with pytest.raises(BatonError):
        thread.post(AddJob(3, (row(2),)))
    thread.stop()
    assert not thread.is_alive
