"""The sum of what workers count, whatever they do meanwhile."""

from hypothesis import given
from hypothesis import strategies as st

from baton.gateway.fleet_totals import FleetTotals
from baton.totals import STEP_TOKENS, WorkerTotals
from baton.types import Role, WorkerInfo
from tests.gateway.support import worker_info

NUM_BUCKETS = len(STEP_TOKENS) + 1
counts = st.integers(0, 1000)
grown = st.builds(
    WorkerTotals,
    counts,
    counts,
    counts,
    counts,
    st.lists(counts, min_size=NUM_BUCKETS, max_size=NUM_BUCKETS).map(tuple),
)


def info(worker: int, start: int) -> WorkerInfo:
    return worker_info(f"w{worker}", Role.BOTH, incarnation=start)


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans(), grown)))
def test_the_sum_is_what_came_since_each_was_first_heard(
    words: list[tuple[int, bool, WorkerTotals]],
) -> None:
    """A word: of which worker, is it a new process, what came since its last one."""
    fleet, expected = FleetTotals(), WorkerTotals()
    starts, totals = dict.fromkeys(range(3), 0), dict.fromkeys(range(3), WorkerTotals())
    for worker, is_new, more in words:
        if is_new or not starts[worker]:
            starts[worker] += 1
            totals[worker] = more
        else:
            totals[worker] += more
            expected += more
        fleet.heard(info(worker, starts[worker]), totals[worker])
        assert fleet.sum == expected


def test_a_forgotten_worker_begins_anew() -> None:
    fleet = FleetTotals()
    fleet.heard(info(0, 1), WorkerTotals(num_preemptions=3))
    fleet.heard(info(0, 1), WorkerTotals(num_preemptions=5))
    fleet.forget("w0")
    fleet.heard(info(0, 1), WorkerTotals(num_preemptions=9))
    assert fleet.sum == WorkerTotals(num_preemptions=2)


def test_counts_that_shrink_take_nothing_away() -> None:
    fleet = FleetTotals()
    fleet.heard(info(0, 1), WorkerTotals(num_preemptions=3))
    fleet.heard(info(0, 1), WorkerTotals(num_preemptions=1))
    assert fleet.sum == WorkerTotals()
