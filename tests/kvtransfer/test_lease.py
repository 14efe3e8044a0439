"""LeaseTable against a model of everything around it: an engine that is told late and may evict
what is retained, readers that stop late, a gateway that releases whenever it likes."""

from collections import deque
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baton.errors import Cause
from baton.kvtransfer.effects import (
    AttachGranted,
    AttachmentReady,
    AttachmentSampled,
    AttachRefused,
    CutAttachment,
    DropLease,
    LeaseEffect,
    LeaseEnded,
    PinLease,
    QuiesceLease,
    RetainLease,
)
from baton.kvtransfer.lease import (
    MAX_ATTACHMENTS,
    MAX_PACE_MS,
    PACE_FACTOR,
    LeaseState,
    LeaseTable,
)
from baton.kvtransfer.progress import KVReady
from baton.types import (
    BlockId,
    FinishReason,
    KVGroup,
    KVKind,
    KVLayout,
    KVRange,
    KVTicket,
    LegId,
    TokenChunk,
)

NUM_TOKENS = 64
TTL_MS = 1000
STALL_MS = 200
IDLE_MS = 400
LAYOUT = KVLayout((KVGroup(KVKind.FULL, 2, 1, 4, "float32"),), block_size=16)
TICKET = KVTicket(
    transfer_id=bytes(16),
    address="127.0.0.1:1",
    incarnation=bytes(16),
    fingerprint=bytes(32),
    layout=LAYOUT,
    num_tokens=NUM_TOKENS,
    tokens_digest=bytes(32),
    salt_digest=bytes(32),
    expires_at_ms=TTL_MS,
    key_id=1,
)
BLOCKS = tuple(BlockId(i) for i in range(4))


def ticket(number: int, expires_at_ms: int = TTL_MS) -> KVTicket:
    return replace(TICKET, transfer_id=number.to_bytes(16, "little"), expires_at_ms=expires_at_ms)


def first_tokens(leg: LegId) -> tuple[TokenChunk, ...]:
    return (TokenChunk(leg, 0, 0, (7,), finish_reason=FinishReason.LENGTH),)


class LeaseWorld(RuleBasedStateMachine):
    """The engine's view lags behind the table's by whatever is in `to_engine`."""

    def __init__(self) -> None:
        super().__init__()
        self.table = LeaseTable(first_epoch=2**64 - 3, stall_ms=STALL_MS, idle_ms=IDLE_MS)
        self.now_ms = 0
        self.num_legs = 0
        self.num_keys = 0
        self.engine: dict[LegId, str] = {}  # held | retained | quarantined
        self.to_engine: deque[LeaseEffect] = deque()
        self.transfer_ids: dict[LegId, bytes] = {}
        self.waiting: set[int] = set()
        self.readers: dict[int, LegId] = {}  # epoch → leg, until it has really stopped
        self.cut: set[int] = set()
        self.epochs: set[int] = set()
        self.ended: set[LegId] = set()

    # Carrying effects out.

    def carry_out(self, effects: list[LeaseEffect]) -> None:
        for effect in effects:
            match effect:
                case RetainLease() | PinLease() | DropLease() | QuiesceLease():
                    self.to_engine.append(effect)
                case AttachGranted():
                    self.waiting.remove(effect.key)
                    assert effect.epoch != 0
                    assert effect.epoch not in self.epochs, "an epoch was used twice"
                    assert self.engine[effect.leg] == "held", "granted what the engine may take"
                    self.epochs.add(effect.epoch)
                    self.readers[effect.epoch] = effect.leg
                case AttachRefused():
                    self.waiting.remove(effect.key)
                case CutAttachment():
                    assert effect.epoch in self.readers
                    assert effect.epoch not in self.cut
                    self.cut.add(effect.epoch)
                case AttachmentReady() | AttachmentSampled():
                    assert not set(effect.epochs) - set(self.readers)
                case LeaseEnded():
                    assert effect.leg not in self.ended, "told twice"
                    self.ended.add(effect.leg)

    def free(self, leg: LegId) -> None:
        assert leg not in self.readers.values(), "freed under a reader"
        del self.engine[leg]

    @initialize()
    def one_lease(self) -> None:
        self.admit()

    @precondition(lambda self: self.num_legs < 3)
    @rule()
    def admit(self) -> None:
        self.num_legs += 1
        leg = LegId("r", self.num_legs)
        self.engine[leg] = "held"
        made = ticket(self.num_legs, self.now_ms + TTL_MS)
        self.transfer_ids[leg] = made.transfer_id
        self.table.open(leg, made, tuple(BlockId(self.num_legs + i) for i in range(4)), 16)

    @rule(data=st.data(), token_start=st.sampled_from([0, 16, NUM_TOKENS]))
    def attach(self, data: st.DataObject, token_start: int) -> None:
        leg = data.draw(st.sampled_from(sorted(self.transfer_ids)))
        self.num_keys += 1
        self.waiting.add(self.num_keys)
        self.carry_out(
            self.table.attach(self.num_keys, self.transfer_ids[leg], token_start, self.now_ms)
        )

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def consumer_gives_up_waiting(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.waiting)))
        self.waiting.remove(key)
        self.table.cancel_attach(key)

    @rule(data=st.data(), tokens=st.integers(0, NUM_TOKENS))
    def prefill_advances(self, data: st.DataObject, tokens: int) -> None:
        leg = data.draw(st.sampled_from(sorted(self.transfer_ids)))
        self.carry_out(self.table.ready(leg, tokens, self.now_ms))

    @rule(
        data=st.data(),
        layers=st.integers(1, 2),
        start=st.integers(0, NUM_TOKENS),
        stop=st.integers(1, NUM_TOKENS),
    )
    def layers_get_ready(self, data: st.DataObject, layers: int, start: int, stop: int) -> None:
        leg = data.draw(st.sampled_from(sorted(self.transfer_ids)))
        where = KVRange(0, layers, start, stop)
        self.carry_out(self.table.layers_ready(leg, where, self.now_ms))

    @rule(data=st.data())
    def prefill_samples(self, data: st.DataObject) -> None:
        leg = data.draw(st.sampled_from(sorted(self.transfer_ids)))
        self.carry_out(self.table.sampled(leg, first_tokens(leg), self.now_ms))

    @precondition(lambda self: self.readers)
    @rule(data=st.data(), tokens=st.integers(0, NUM_TOKENS))
    def reader_progress(self, data: st.DataObject, tokens: int) -> None:
        self.table.progress(data.draw(st.sampled_from(sorted(self.readers))), tokens, self.now_ms)

    @precondition(lambda self: self.readers)
    @rule(data=st.data(), done=st.booleans())
    def reader_stops(self, data: st.DataObject, done: bool) -> None:
        epoch = data.draw(st.sampled_from(sorted(self.readers)))
        if done:
            self.table.done(epoch)
        del self.readers[epoch]
        self.carry_out(self.table.closed(epoch, self.now_ms))

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        leg = data.draw(st.sampled_from(sorted(self.transfer_ids)))
        self.carry_out(self.table.release(leg))

    @precondition(lambda self: "held" in self.engine.values())
    @rule(data=st.data())
    def engine_fails_leg(self, data: st.DataObject) -> None:
        held = sorted(leg for leg, state in self.engine.items() if state == "held")
        leg = data.draw(st.sampled_from(held))
        self.engine[leg] = "quarantined"
        self.carry_out(self.table.failed(leg))

    @precondition(lambda self: self.to_engine)
    @rule(count=st.integers(1, 4))
    def engine_applies(self, count: int) -> None:
        for _ in range(min(count, len(self.to_engine))):
            self.engine_applies_one()

    def engine_applies_one(self) -> None:
        effect = self.to_engine.popleft()
        leg = effect.leg  # type: ignore[union-attr]
        state = self.engine.get(leg)
        if state is None:
            return  # gone
        match effect:
            case RetainLease() if state == "held":
                self.engine[leg] = "retained"
            case PinLease() if state in ("held", "retained"):
                self.engine[leg] = "held"
                self.carry_out(self.table.pinned(leg, self.now_ms))
            case DropLease(in_flight=True):
                self.engine[leg] = "quarantined"
            case DropLease() if state != "quarantined":
                self.free(leg)
            case QuiesceLease() if state == "quarantined":
                self.free(leg)

    @precondition(lambda self: "retained" in self.engine.values())
    @rule(data=st.data())
    def engine_evicts(self, data: st.DataObject) -> None:
        retained = sorted(leg for leg, state in self.engine.items() if state == "retained")
        leg = data.draw(st.sampled_from(retained))
        self.free(leg)
        self.carry_out(self.table.evicted(leg))

    @rule(ms=st.integers(1, TTL_MS))
    def time_passes(self, ms: int) -> None:
        self.now_ms += ms
        self.carry_out(self.table.tick(self.now_ms))

    @invariant()
    def integrity(self) -> None:
        self.table.check_integrity()
        assert self.table.num_attachments == len(self.readers)

    def teardown(self) -> None:
        """However it stands: released leases and stopped readers leave nothing behind."""
        for leg in self.transfer_ids:
            self.carry_out(self.table.release(leg))
        assert set(self.readers) == self.cut & set(self.readers)
        for epoch in sorted(self.readers):
            del self.readers[epoch]
            self.carry_out(self.table.closed(epoch, self.now_ms))
        while self.to_engine:
            self.engine_applies_one()
        assert self.engine == {}
        assert not self.waiting
        assert len(self.table) == self.table.num_attachments == self.table.num_pinned_blocks == 0


TestLeaseWorld = LeaseWorld.TestCase
TestLeaseWorld.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)


LEG = LegId("r", 1)


@pytest.fixture
def table() -> LeaseTable:
    table = LeaseTable(first_epoch=41, stall_ms=STALL_MS, idle_ms=IDLE_MS)
    table.open(LEG, TICKET, BLOCKS, 16)
    return table


def granted(effects: list[LeaseEffect]) -> AttachGranted:
    (effect,) = effects
    assert isinstance(effect, AttachGranted)
    return effect


def test_a_read_lease_is_retained_and_pinned_again(table: LeaseTable) -> None:
    epoch = granted(table.attach(1, TICKET.transfer_id, 0, 0)).epoch
    table.done(epoch)
    assert table.closed(epoch, 0) == [RetainLease(LEG)]
    assert table.num_pinned_blocks == 0
    assert table.attach(2, TICKET.transfer_id, 0, 0) == [PinLease(LEG)]
    assert table.num_pinned_blocks == len(BLOCKS)
    assert granted(table.pinned(LEG, 0)).epoch == epoch + 1


def test_a_lease_that_was_not_read_to_the_end_stays_pinned(table: LeaseTable) -> None:
    epoch = granted(table.attach(1, TICKET.transfer_id, 0, 0)).epoch
    assert table.closed(epoch, 0) == []
    assert table.state(LEG) is LeaseState.PINNED


def test_a_second_consumer_attaches_beside_a_paused_one(table: LeaseTable) -> None:
    paused = granted(table.attach(1, TICKET.transfer_id, 0, 0)).epoch
    second = granted(table.attach(2, TICKET.transfer_id, 0, 0)).epoch
    table.done(second)
    assert table.closed(second, 0) == []  # the paused one still reads
    assert table.closed(paused, 0) == [RetainLease(LEG)]


def test_late_done_of_a_cut_attachment_changes_nothing(table: LeaseTable) -> None:
    epoch = granted(table.attach(1, TICKET.transfer_id, 0, 0)).epoch
    (cut,) = table.tick(STALL_MS + 1)
    assert cut == CutAttachment(epoch, Cause.TRANSFER_STALLED, "no progress")
    table.done(epoch)
    assert table.closed(epoch, 0) == []
    assert table.state(LEG) is LeaseState.PINNED


def test_layers_are_told_as_they_get_ready(table: LeaseTable) -> None:
    epoch = granted(table.attach(1, TICKET.transfer_id, 0, 0)).epoch

    def told(effects: list[LeaseEffect]) -> KVReady:
        (effect,) = effects
        assert isinstance(effect, AttachmentReady)
        assert effect.epochs == (epoch,)
        return effect.ready

    assert told(table.layers_ready(LEG, KVRange(0, 1, 16, 48), 0)) == KVReady(16, 48, 1)
    assert table.layers_ready(LEG, KVRange(0, 1, 16, 48), 0) == []
    assert told(table.layers_ready(LEG, KVRange(0, 2, 16, 48), 0)) == KVReady(16, 48, 2)
    assert table.layers_ready(LEG, KVRange(0, 1, 48, 64), 0) == [], "a hole: something was missed"
    assert told(table.ready(LEG, 48, 0)) == KVReady(48)
    assert table.layers_ready(LEG, KVRange(0, 2, 16, 48), 0) == [], "that step is over"


def test_layers_ahead_are_no_debt_before_the_step_ends(table: LeaseTable) -> None:
    epoch = granted(table.attach(1, TICKET.transfer_id, 0, 0)).epoch
    table.progress(epoch, 16, 10)
    table.layers_ready(LEG, KVRange(0, 1, 16, 48), 20)
    assert table.tick(10 * STALL_MS) == []
    table.ready(LEG, 48, 10 * STALL_MS)
    assert [type(e) for e in table.tick(11 * STALL_MS + 1)] == [CutAttachment]


def test_waiting_for_the_prefill_is_not_stalling(table: LeaseTable) -> None:
    epoch = granted(table.attach(1, TICKET.transfer_id, 0, 0)).epoch
    table.progress(epoch, 16, 10)
    assert table.tick(10 * STALL_MS) == []  # everything ready was taken
    table.ready(LEG, 32, 10 * STALL_MS)
    assert table.tick(11 * STALL_MS) == []
    assert [type(e) for e in table.tick(11 * STALL_MS + 1)] == [CutAttachment]


def test_a_slow_link_has_as_long_as_its_bytes_take(table: LeaseTable) -> None:
    """What a consumer has credit for takes it three seconds: it may take nothing for so long."""
    slow = granted(table.attach(1, TICKET.transfer_id, 0, 0, pace_ms=3_000)).epoch
    fast = granted(table.attach(2, TICKET.transfer_id, 0, 0, pace_ms=0)).epoch
    (cut,) = table.tick(STALL_MS + 1)
    assert cut == CutAttachment(fast, Cause.TRANSFER_STALLED, "no progress")
    assert table.tick(STALL_MS + PACE_FACTOR * 3_000) == []
    (cut,) = table.tick(STALL_MS + PACE_FACTOR * 3_000 + 1)
    assert cut == CutAttachment(slow, Cause.TRANSFER_STALLED, "no progress")


def test_nobody_holds_a_lease_by_claiming_to_be_slow(table: LeaseTable) -> None:
    table.attach(1, TICKET.transfer_id, 0, 0, pace_ms=2**32 - 1)
    assert table.tick(STALL_MS + PACE_FACTOR * MAX_PACE_MS) == []
    assert len(table.tick(STALL_MS + PACE_FACTOR * MAX_PACE_MS + 1)) == 1


def test_the_pace_is_kept_while_the_lease_is_pinned_again(table: LeaseTable) -> None:
    epoch = granted(table.attach(1, TICKET.transfer_id, 0, 0)).epoch
    table.done(epoch)
    table.closed(epoch, 0)
    table.attach(2, TICKET.transfer_id, 0, 0, pace_ms=3_000)
    assert len(table.pinned(LEG, 0)) == 1
    assert table.tick(STALL_MS + PACE_FACTOR * 3_000) == []
    assert len(table.tick(STALL_MS + PACE_FACTOR * 3_000 + 1)) == 1


def test_expiry_spares_a_reader_that_makes_progress(table: LeaseTable) -> None:
    epoch = granted(table.attach(1, TICKET.transfer_id, 0, TTL_MS - 1)).epoch
    table.progress(epoch, 8, TTL_MS)
    assert table.tick(TTL_MS + 1) == []
    refused = table.attach(2, TICKET.transfer_id, 0, TTL_MS + 1)
    assert refused == [AttachRefused(2, Cause.TICKET_EXPIRED, "the ticket has expired")]
    table.done(epoch)
    table.closed(epoch, TTL_MS + 1)
    assert table.tick(TTL_MS + 2) == [
        DropLease(LEG, in_flight=False),
        LeaseEnded(LEG, Cause.TICKET_EXPIRED),
    ]


def test_release_under_a_reader_waits_for_it(table: LeaseTable) -> None:
    epoch = granted(table.attach(1, TICKET.transfer_id, 0, 0)).epoch
    cut, drop = table.release(LEG)
    assert isinstance(cut, CutAttachment)
    assert drop == DropLease(LEG, in_flight=True)
    assert table.release(LEG) == []
    assert table.closed(epoch, 0) == [QuiesceLease(LEG)]
    assert len(table) == 0


def test_eviction_refuses_who_waited_for_the_pin(table: LeaseTable) -> None:
    epoch = granted(table.attach(1, TICKET.transfer_id, 0, 0)).epoch
    table.done(epoch)
    table.closed(epoch, 0)
    table.attach(2, TICKET.transfer_id, 0, 0)
    assert table.evicted(LEG) == [
        AttachRefused(2, Cause.LEASE_UNKNOWN, "the KV was evicted"),
        LeaseEnded(LEG, Cause.LEASE_UNKNOWN),
    ]


def test_an_unknown_epoch_changes_nothing(table: LeaseTable) -> None:
    table.progress(7, 1, 0)
    table.done(7)
    assert table.closed(7, 0) == []
    assert table.state(LEG) is LeaseState.PINNED


def test_nobody_waits_for_the_pin_any_more(table: LeaseTable) -> None:
    epoch = granted(table.attach(1, TICKET.transfer_id, 0, 0)).epoch
    table.done(epoch)
    table.closed(epoch, 0)
    table.attach(2, TICKET.transfer_id, 0, 0)
    table.cancel_attach(2)
    assert table.pinned(LEG, 0) == [RetainLease(LEG)]


def test_shared_blocks_count_once(table: LeaseTable) -> None:
    table.open(LegId("s", 1), ticket(2), (*BLOCKS[:3], BlockId(9)), 16)
    assert table.num_pinned_blocks == 5
    table.release(LEG)
    assert table.num_pinned_blocks == 4


def test_readers_of_one_lease_are_bounded(table: LeaseTable) -> None:
    for key in range(MAX_ATTACHMENTS):
        granted(table.attach(key, TICKET.transfer_id, 0, 0))
    (refused,) = table.attach(99, TICKET.transfer_id, 0, 0)
    assert isinstance(refused, AttachRefused)
    assert refused.cause is Cause.OVERLOADED
