"""Fetches are bounded per link and in all; none waits for ever, and none waits in vain."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.types import LegId
from baton.worker.fetch_queue import FetchQueue


def leg(number: int) -> LegId:
    return LegId(f"r{number}", 1)


def test_short_ones_first_but_nobody_is_overtaken_for_ever() -> None:
    queue = FetchQueue(max_per_link=1, max_behind_ms=1e9)
    queue.ask(leg(0), "a", 10, now_ms=0)
    assert queue.admit() == [leg(0)]
    queue.ask(leg(1), "a", 500, now_ms=0)
    for number in range(2, 100):
        now_ms = 100 * number
        queue.ask(leg(number), "a", 10, now_ms)
        queue.leave(leg(number - 1) if number > 2 else leg(0))
        (begun,) = queue.admit()
        if begun == leg(1):
            break
        assert begun == leg(number)
    assert now_ms <= 600


def test_a_prefix_that_could_be_computed_gives_way() -> None:
    queue = FetchQueue(max_per_link=1)
    queue.ask(leg(0), "a", 10, now_ms=0)
    queue.admit()
    queue.ask(leg(1), "a", 1, now_ms=0, is_spare=True)
    queue.ask(leg(2), "a", 1000, now_ms=0)
    queue.leave(leg(0))
    assert queue.admit() == [leg(2)]


def test_a_link_that_is_far_behind_takes_no_more() -> None:
    queue = FetchQueue(max_per_link=2, max_behind_ms=100)
    assert queue.ask(leg(0), "a", 80, now_ms=0)
    assert queue.ask(leg(1), "a", 80, now_ms=0)
    queue.admit()
    assert not queue.ask(leg(2), "a", 1, now_ms=0)
    assert queue.ask(leg(3), "b", 1, now_ms=0)  # another link is not
    queue.leave(leg(0))
    assert queue.ask(leg(4), "a", 1e9, now_ms=0)  # there is room: however long it takes


def test_bytes_on_their_way_are_bounded_and_the_large_one_is_not_passed() -> None:
    queue = FetchQueue(max_staging_bytes=100)
    for number, num_bytes in enumerate((60, 60, 10)):
        queue.ask(leg(number), number, number, now_ms=0, staging_bytes=num_bytes)
    assert queue.admit() == [leg(0)]
    assert queue.staging_bytes == 60
    queue.leave(leg(0))
    assert queue.admit() == [leg(1), leg(2)]
    queue.leave(leg(1))
    queue.leave(leg(2))
    queue.ask(leg(3), "a", 1, now_ms=0, staging_bytes=1000)
    assert queue.admit() == [leg(3)], "alone, whatever its size"


class Machine(RuleBasedStateMachine):
    """Against a model: who asked, who runs."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = FetchQueue(max_per_link=2, max_fetches=3, max_behind_ms=50)
        self.waiting: dict[LegId, str] = {}
        self.running: dict[LegId, str] = {}
        self.number = 0

    @rule(link=st.sampled_from("abc"), predicted_ms=st.floats(0, 100), is_spare=st.booleans())
    def ask(self, link: str, predicted_ms: float, is_spare: bool) -> None:
        self.number += 1
        if self.queue.ask(leg(self.number), link, predicted_ms, self.number, is_spare):
            self.waiting[leg(self.number)] = link
        self.admit()

    @precondition(lambda self: self.waiting or self.running)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        chosen = data.draw(st.sampled_from([*self.waiting, *self.running]))
        self.queue.leave(chosen)
        self.waiting.pop(chosen, None)
        self.running.pop(chosen, None)
        self.admit()

    def admit(self) -> None:
        for begun in self.queue.admit():
            self.running[begun] = self.waiting.pop(begun)

    @invariant()
    def bounded(self) -> None:
        assert len(self.running) <= 3
        assert self.queue.num_waiting == len(self.waiting)
        for link in "abc":
            assert list(self.running.values()).count(link) == self.queue.num_running(link) <= 2

    @invariant()
    def nobody_waits_in_vain(self) -> None:
        if len(self.running) < 3:
            for link in self.waiting.values():
                assert self.queue.num_running(link) == 2


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
