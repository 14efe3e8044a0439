"""ReservationTable against a model of everything around it: an engine that answers late, a writer
that stops late, a gateway that decides whenever it likes."""

from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baton.errors import Cause
from baton.kvtransfer.effects import (
    AskDecision,
    CancelFetch,
    ComputeMissing,
    DropReservation,
    ImportKV,
    KeepVerified,
    KVSource,
    QuiesceReservation,
    ReservationEffect,
    ReservationEnded,
    StartFetch,
)
from baton.kvtransfer.reservation import ReservationState, ReservationTable
from baton.types import BlockId, KVGroup, KVKind, KVLayout, KVTicket, LegId

NUM_TOKENS = 64
NUM_CACHED = 16
DECIDE_MS = 300
STALL_MS = 500
LAYOUT = KVLayout((KVGroup(KVKind.FULL, 2, 1, 4, "float32"),), block_size=16)


def source(number: int) -> KVSource:
    ticket = KVTicket(
        transfer_id=number.to_bytes(16, "little"),
        address="127.0.0.1:1",
        incarnation=bytes(16),
        fingerprint=bytes(32),
        layout=LAYOUT,
        num_tokens=NUM_TOKENS,
        tokens_digest=bytes(32),
        salt_digest=bytes(32),
        expires_at_ms=1,
        key_id=1,
    )
    return KVSource(ticket, (), "h")


BLOCKS = tuple(BlockId(i) for i in range(4))


class ReservationWorld(RuleBasedStateMachine):
    """The engine learns of effects in order but late; so does the writer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = ReservationTable(DECIDE_MS, STALL_MS)
        self.now_ms = 0
        self.num_legs = 0
        self.engine: dict[LegId, str] = {}  # asked | waiting | running | quarantined
        self.to_engine: deque[ReservationEffect] = deque()
        self.writers: dict[LegId, StartFetch] = {}  # until they have really stopped
        self.cancelled: set[LegId] = set()
        self.asked: set[LegId] = set()  # the gateway owes a decision
        self.over: set[LegId] = set()  # as the gateway sees it

    @property
    def living(self) -> list[LegId]:
        return sorted(set(self.engine) - self.over)

    def carry_out(self, effects: list[ReservationEffect]) -> None:
        for effect in effects:
            leg = effect.leg
            match effect:
                case StartFetch():
                    assert leg not in self.writers, "two writers of one leg"
                    assert self.engine[leg] == "waiting"
                    assert NUM_CACHED <= effect.token_start <= NUM_TOKENS
                    self.writers[leg] = effect
                    self.cancelled.discard(leg)
                    self.asked.discard(leg)
                case CancelFetch():
                    assert leg in self.writers
                    self.cancelled.add(leg)
                case AskDecision():
                    assert leg not in self.writers, "asked while the writer goes on"
                    assert leg not in self.over
                    self.asked.add(leg)
                case ReservationEnded():
                    assert leg not in self.over, "told twice"
                    self.over.add(leg)
                case _:
                    if isinstance(effect, ImportKV | ComputeMissing | KeepVerified):
                        assert leg not in self.writers
                        assert leg not in self.over
                    self.asked.discard(leg)
                    self.to_engine.append(effect)

    def free(self, leg: LegId) -> None:
        assert leg not in self.writers, "freed under a writer"
        del self.engine[leg]

    @initialize()
    def one(self) -> None:
        self.bind()

    @precondition(lambda self: self.num_legs < 3)
    @rule()
    def bind(self) -> None:
        self.num_legs += 1
        leg = LegId("r", self.num_legs)
        self.engine[leg] = "asked"
        self.table.reserve(leg, source(self.num_legs))

    @precondition(lambda self: "asked" in self.engine.values())
    @rule(data=st.data(), room=st.booleans())
    def engine_answers(self, data: st.DataObject, room: bool) -> None:
        asked = sorted(leg for leg, state in self.engine.items() if state == "asked")
        leg = data.draw(st.sampled_from(asked))
        if room:
            self.engine[leg] = "waiting"
            self.carry_out(self.table.reserved(leg, BLOCKS, NUM_TOKENS, NUM_CACHED, self.now_ms))
        else:
            del self.engine[leg]
            self.over.add(leg)
            self.table.refused(leg)

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def frame(self, data: st.DataObject) -> None:
        self.table.progress(data.draw(st.sampled_from(sorted(self.writers))), self.now_ms)

    @precondition(lambda self: self.writers)
    @rule(data=st.data(), valid_tokens=st.integers(0, NUM_TOKENS + 5))
    def fetch_fails(self, data: st.DataObject, valid_tokens: int) -> None:
        leg = data.draw(st.sampled_from(sorted(self.writers)))
        del self.writers[leg]
        self.carry_out(
            self.table.fetch_failed(leg, valid_tokens, Cause.TRANSPORT_FAILED, "", self.now_ms)
        )

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def fetch_ends(self, data: st.DataObject) -> None:
        leg = data.draw(st.sampled_from(sorted(self.writers)))
        del self.writers[leg]
        self.carry_out(self.table.fetch_ended(leg))

    @precondition(lambda self: self.living)
    @rule(data=st.data(), number=st.integers(1, 9))
    def rebind(self, data: st.DataObject, number: int) -> None:
        leg = data.draw(st.sampled_from(self.living))
        self.carry_out(self.table.rebind(leg, source(number), self.now_ms))

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        leg = data.draw(st.sampled_from(self.living))
        self.carry_out(self.table.compute(leg, self.now_ms))

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.abort_leg(data.draw(st.sampled_from(self.living)))

    def abort_leg(self, leg: LegId) -> None:
        self.over.add(leg)
        if leg in self.table:
            self.carry_out(self.table.abort(leg))
        else:  # the worker aborts legs that left the table at the engine
            self.to_engine.append(DropReservation(leg, in_flight=False))

    @precondition(lambda self: "waiting" in self.engine.values())
    @rule(data=st.data())
    def engine_fails_leg(self, data: st.DataObject) -> None:
        waiting = sorted(leg for leg, state in self.engine.items() if state == "waiting")
        leg = data.draw(st.sampled_from(waiting))
        self.engine[leg] = "quarantined"
        self.over.add(leg)
        self.carry_out(self.table.failed(leg))

    @precondition(lambda self: self.to_engine)
    @rule(count=st.integers(1, 4))
    def engine_applies(self, count: int) -> None:
        for _ in range(min(count, len(self.to_engine))):
            self.engine_applies_one()

    def engine_applies_one(self) -> None:
        effect = self.to_engine.popleft()
        leg = effect.leg
        state = self.engine.get(leg)
        if state is None:
            return
        match effect:
            case ImportKV() | ComputeMissing() if state == "waiting":
                self.engine[leg] = "running"
            case KeepVerified(_, valid_tokens) if state == "waiting":
                assert NUM_CACHED <= valid_tokens <= NUM_TOKENS
            case DropReservation(in_flight=True) if state != "quarantined":
                assert state == "waiting"
                self.engine[leg] = "quarantined"
            case DropReservation(in_flight=False) if state != "quarantined":
                self.free(leg)
            case QuiesceReservation() if state == "quarantined":
                self.free(leg)

    @rule(ms=st.integers(1, STALL_MS))
    def time_passes(self, ms: int) -> None:
        self.now_ms += ms
        self.carry_out(self.table.tick(self.now_ms))

    @invariant()
    def integrity(self) -> None:
        self.table.check_integrity()
        for leg in self.writers:
            expected = ReservationState.CLOSING if leg in self.over else ReservationState.FETCHING
            assert self.table.state(leg) is expected
        for leg in self.asked - self.over:
            assert self.table.state(leg) is ReservationState.FAILED

    def teardown(self) -> None:
        """However it stands: abort everything, let writers stop, and nothing is left."""
        for leg in self.living:
            self.abort_leg(leg)
        assert set(self.writers) <= self.cancelled
        for leg in sorted(self.writers):
            del self.writers[leg]
            self.carry_out(self.table.fetch_failed(leg, 0, Cause.CANCELLED, "", self.now_ms))
        while self.to_engine:
            self.engine_applies_one()
        assert self.engine == {}
        assert len(self.table) == 0


TestReservationWorld = ReservationWorld.TestCase
TestReservationWorld.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)

LEG = LegId("r", 1)


@pytest.fixture
def table() -> ReservationTable:
    """One reservation whose fetch runs."""
    table = ReservationTable(DECIDE_MS, STALL_MS)
    table.reserve(LEG, source(1))
    (fetch,) = table.reserved(LEG, BLOCKS, NUM_TOKENS, NUM_CACHED, 0)
    assert fetch == StartFetch(LEG, source(1), NUM_CACHED, NUM_TOKENS, BLOCKS)
    return table


def fail(table: ReservationTable, valid_tokens: int, now_ms: int = 0) -> list[ReservationEffect]:
    return table.fetch_failed(LEG, valid_tokens, Cause.FRAME_CORRUPT, "checksum", now_ms)


def test_complete_kv_is_imported(table: ReservationTable) -> None:
    assert table.fetch_ended(LEG) == [ImportKV(LEG)]
    assert len(table) == 0


def test_a_failure_is_told_and_what_is_verified_is_kept(table: ReservationTable) -> None:
    assert fail(table, 40) == [
        KeepVerified(LEG, 40),
        AskDecision(LEG, 40, Cause.FRAME_CORRUPT, "checksum"),
    ]
    (fetch,) = table.rebind(LEG, source(2), 0)
    assert fetch == StartFetch(LEG, source(2), 40, NUM_TOKENS, BLOCKS)
    assert fail(table, 20)[0] == KeepVerified(LEG, 40)  # never less than before


def test_a_decision_during_the_fetch_is_carried_out_at_its_end(table: ReservationTable) -> None:
    assert table.rebind(LEG, source(2), 0) == [CancelFetch(LEG)]
    assert table.compute(LEG, 0) == []  # the later decision stands
    assert fail(table, 20) == [KeepVerified(LEG, 20), ComputeMissing(LEG)]


def test_a_decision_that_comes_too_late_is_moot(table: ReservationTable) -> None:
    table.compute(LEG, 0)
    assert table.fetch_ended(LEG) == [ImportKV(LEG)]


def test_a_decision_before_the_blocks_are_reserved() -> None:
    table = ReservationTable(DECIDE_MS, STALL_MS)
    table.reserve(LEG, source(1))
    assert table.compute(LEG, 0) == []
    assert table.reserved(LEG, BLOCKS, NUM_TOKENS, NUM_CACHED, 0) == [ComputeMissing(LEG)]


def test_a_fetch_that_brings_nothing_is_cancelled_once(table: ReservationTable) -> None:
    table.progress(LEG, 100)
    assert table.tick(100 + STALL_MS) == []
    assert table.tick(101 + STALL_MS) == [CancelFetch(LEG)]
    assert table.tick(102 + STALL_MS) == []
    question = fail(table, 20)[1]
    assert isinstance(question, AskDecision)
    assert question.cause is Cause.TRANSFER_STALLED


def test_nobody_decides(table: ReservationTable) -> None:
    fail(table, 20, now_ms=10)
    assert table.tick(9 + DECIDE_MS) == []
    assert table.tick(10 + DECIDE_MS) == [
        DropReservation(LEG, in_flight=False),
        ReservationEnded(LEG, Cause.DEADLINE_EXCEEDED, "the gateway did not decide"),
    ]
    assert len(table) == 0


def test_abort_during_a_fetch_waits_for_the_writer(table: ReservationTable) -> None:
    assert table.abort(LEG) == [CancelFetch(LEG), DropReservation(LEG, in_flight=True)]
    assert table.abort(LEG) == []
    assert table.rebind(LEG, source(2), 0) == []
    assert fail(table, 20) == [QuiesceReservation(LEG)]


def test_the_engine_fails_a_leg_under_a_writer(table: ReservationTable) -> None:
    assert table.failed(LEG) == [CancelFetch(LEG)]
    assert fail(table, 20) == [QuiesceReservation(LEG)]
    assert table.failed(LEG) == [QuiesceReservation(LEG)]  # gone: nothing writes
