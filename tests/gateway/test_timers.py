"""Timers against a plain dict."""

from hypothesis import given
from hypothesis import strategies as st

from baton.gateway.timers import Timers

IDS = st.sampled_from("abcd")
TIMES = st.one_of(st.integers(0, 20).map(float), st.just(float("inf")))


@given(st.lists(st.one_of(st.tuples(IDS, TIMES), st.integers(0, 20))))
def test_equals_a_dict(steps: list[tuple[str, float] | int]) -> None:
    timers, model = Timers(), dict[str, float]()
    for step in steps:
        if isinstance(step, int):
            due = {request_id for request_id, at_ms in model.items() if at_ms <= step}
            popped = timers.pop_due(step)
            assert set(popped) == due
            assert len(popped) == len(due)
            assert popped == sorted(popped, key=lambda request_id: model[request_id])
            model = {request_id: model[request_id] for request_id in model.keys() - due}
        else:
            request_id, at_ms = step
            timers.set(request_id, at_ms)
            model[request_id] = at_ms
        model = {request_id: at_ms for request_id, at_ms in model.items() if at_ms != float("inf")}
        assert timers.next_ms == min(model.values(), default=float("inf"))
        assert len(timers) == len(model)


def test_a_stream_that_sets_its_timer_with_every_token_takes_no_memory() -> None:
    timers = Timers()
    for number in range(10_000):
        timers.set("same", 5.0)
        timers.set("moves", float(number))
    assert timers.num_entries < 200
