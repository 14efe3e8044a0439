"""A token that leaves nothing to decide takes a short way through the gateway: it must come to the
same as the long one."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import Cause
from baton.gateway.migration import MigratingMachine
from baton.messages import Bind, Bound, ComputeLocally, Failed, Imported, LegMessage
from baton.types import FinishReason, TokenChunk
from tests.gateway.fleet import D1, P1, Gateway
from tests.gateway.support import request
from tests.gateway.test_migration import MOVED, Moving

# What a test does to a running request: (what, token ids, offset of the first, choice, ends).
Move = tuple[str, int, int, int, bool]
MOVES = st.lists(
    st.tuples(
        st.sampled_from(["source"] * 6 + ["target", "drain", "wait", "lose", "fail", "stop"]),
        st.integers(0, 3),
        st.sampled_from([0, 0, 0, 0, -1, -2, 1]),
        st.sampled_from([0, 0, 1, 2]),
        st.sampled_from([False] * 5 + [True]),
    ),
    max_size=14,
)


@contextmanager
def long_way() -> Iterator[None]:
    with patch.object(MigratingMachine, "pass_on", lambda *_: None):
        yield


def play(n: int, num_prompt: int, moves: list[Move]) -> list[object]:
    """Everything that can be seen of a request that this happens to."""
    gateway = Moving(n, num_prompt)
    target, seen = None, []
    for what, num, offset, choice, ends in moves:
        start = len(gateway.tokens.get(choice, ())) + offset
        reason = FinishReason.LENGTH if ends else None
        ids = tuple(100 + start + i for i in range(num))
        match what:
            case "source":
                gateway.say(gateway.source, TokenChunk(gateway.leg, choice, start, ids, (), reason))
            case "target" if target is not None:
                gateway.say(gateway.target, TokenChunk(target, choice, start, ids, (), reason))
            case "drain":
                gateway.drains()
            case "wait":
                gateway.wait(num * 10_000)
            case "lose":
                gateway.lose(gateway.source)
            case "fail":
                gateway.say(gateway.source, Failed(gateway.leg, Cause.STEP_FAILED, "x"))
            case "stop" if choice < n:
                gateway.dispatcher.finish_choice("r", choice, gateway.now)
        sent = gateway.take()
        for worker_id, message in sent:
            if worker_id == gateway.target and isinstance(message, Bind | ComputeLocally):
                target = message.leg
                ready: tuple[LegMessage, ...] = (Bound(target, 0), Imported(target, MOVED))
                gateway.say(gateway.target, *(ready if isinstance(message, Bind) else ()))
        seen.append((sent, gateway.take(), {c: list(ids) for c, ids in gateway.tokens.items()}))
        machine = gateway.machine
        seen.append((gateway.ended, machine.report, machine.wake_at_ms, machine.is_parked))
        seen.append(gateway.dispatcher.next_wake_ms)
    return seen


@given(st.sampled_from([1, 2]), st.sampled_from([10, 40]), MOVES)
def test_both_ways_are_one(n: int, num_prompt: int, moves: list[Move]) -> None:
    short = play(n, num_prompt, moves)
    with long_way():
        assert play(n, num_prompt, moves) == short


def test_a_running_request_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = Moving()
    monkeypatch.setattr(MigratingMachine, "_settle", None)  # nothing is decided
    gateway.say(gateway.source, TokenChunk(gateway.leg, 0, 3, (8,)))
    gateway.say(gateway.source, TokenChunk(gateway.leg, 0, 4, (9, 10)))
    assert gateway.tokens == {0: [5, 6, 7, 8, 9, 10]}


def test_the_deadline_is_looked_at() -> None:
    gateway = Gateway(P1, D1)
    _, _, d, bind = gateway.held(request(deadline_ms=50))
    gateway.say(d, Bound(bind.leg, 0), Imported(bind.leg, MOVED), TokenChunk(bind.leg, 0, 1, (6,)))
    gateway.now = 60.0
    gateway.say(d, TokenChunk(bind.leg, 0, 2, (7,)))
    assert gateway.ended is not None
    assert gateway.ended.cause is Cause.DEADLINE_EXCEEDED
