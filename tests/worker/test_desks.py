"""Between machine and transports: every order has one outcome, whatever is cancelled when."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from baton.errors import BatonError, Cause
from baton.kvtransfer.base import FetchOpen, FrameSink, FrameSource
from baton.kvtransfer.effects import AttachGranted, AttachmentReady, AttachRefused, CutAttachment
from baton.kvtransfer.exporter import FRAME_BYTES
from baton.kvtransfer.frames import FrameWriter
from baton.kvtransfer.memory import KVMemory
from baton.kvtransfer.progress import KVReady
from baton.types import (
    BlockId,
    KVGroup,
    KVKind,
    KVLayout,
    KVRange,
    KVTicket,
    LegId,
    TokenChunk,
    TransferStats,
    TransportAddress,
)
from baton.worker.effects import FetchKV
from baton.worker.exports import (
    MAX_ATTACHMENTS,
    ExportDesk,
    end_payload,
    parse_end_payload,
)
from baton.worker.fetch_queue import MAX_PER_LINK
from baton.worker.fetches import FetchDesk, _pace_ms
from baton.worker.link_table import LinkTable

LEG = LegId("r", 1)
LAYOUT = KVLayout((KVGroup(KVKind.FULL, 1, 1, 4, "float32"),), block_size=16)
DIGEST = b"d" * 32
TICKET = KVTicket(
    b"t" * 16, "a:1", b"i" * 16, b"f" * 32, LAYOUT, 16, DIGEST, b"s" * 32, 9, 1, b"m" * 32
)
FETCH = FetchOpen(TICKET, KVRange(0, 1, 16, 16), LAYOUT, b"f" * 32, DIGEST, b"s" * 32, "d")
CREDIT = FETCH.initial_credit * FRAME_BYTES
CHUNKS = (TokenChunk(LEG, 0, 0, (7,)),)


# ── exports ──────────────────────────────────────────────────────────────────────────────────────


class Machine:
    """Keeps what the desk says."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.cancelled: list[int] = []
        self.closed: list[int] = []

    def attach(self, key: int, fetch: FetchOpen) -> None:
        self.asked.append(key)

    def cancel_attach(self, key: int) -> None:
        self.cancelled.append(key)

    def attachment_progress(self, epoch: int, num_sent_tokens: int) -> None:
        pass

    def attachment_done(self, epoch: int) -> None:
        pass

    def attachment_closed(self, epoch: int) -> None:
        self.closed.append(epoch)


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def desk(machine: Machine) -> ExportDesk:
    desk = ExportDesk()
    desk.connect(machine)
    return desk


def grant(key: int, first_tokens: tuple[TokenChunk, ...] | None = None) -> AttachGranted:
    return AttachGranted(key, 77, LEG, (BlockId(0),), 16, KVReady(8), first_tokens)


async def asked(desk: ExportDesk) -> asyncio.Task[Any]:
    task = asyncio.create_task(desk.attach(FETCH))
    await asyncio.sleep(0)
    return task


async def test_a_grant_becomes_a_feed(desk: ExportDesk, machine: Machine) -> None:
    task = await asked(desk)
    desk.granted(grant(machine.asked[0]))
    feed = await task
    assert (feed.epoch, feed.ready, feed.end_payload) == (77, KVReady(8), None)
    desk.ready(AttachmentReady((77,), KVReady(8, 16, 1)))
    assert feed.ready == KVReady(8, 16, 1)
    desk.cut(CutAttachment(77, Cause.LEASE_UNKNOWN, "released"))
    assert feed.error is not None
    assert feed.error.cause is Cause.LEASE_UNKNOWN
    desk.closed(77)
    desk.closed(77)
    assert machine.closed == [77]


async def test_first_tokens_of_a_complete_prefill_come_with_the_grant(
    desk: ExportDesk, machine: Machine
) -> None:
    task = await asked(desk)
    desk.granted(grant(machine.asked[0], CHUNKS))
    payload = (await task).end_payload
    assert parse_end_payload(payload, DIGEST) == list(CHUNKS)


async def test_a_refusal_is_raised(desk: ExportDesk, machine: Machine) -> None:
    task = await asked(desk)
    desk.refused(AttachRefused(machine.asked[0], Cause.TICKET_EXPIRED, "too late"))
    with pytest.raises(BatonError) as caught:
        await task
    assert caught.value.cause is Cause.TICKET_EXPIRED


async def test_who_leaves_before_the_answer_is_not_counted(
    desk: ExportDesk, machine: Machine
) -> None:
    task = await asked(desk)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert machine.cancelled == machine.asked
    assert len(desk) == 0


@pytest.mark.parametrize("granted_first", [True, False])
async def test_who_leaves_at_the_answer_is_closed(
    desk: ExportDesk, machine: Machine, granted_first: bool
) -> None:
    task = await asked(desk)
    if granted_first:
        desk.granted(grant(machine.asked[0]))
        task.cancel()
    else:
        task.cancel()
        desk.granted(grant(machine.asked[0]))
    await asyncio.gather(task, return_exceptions=True)
    assert machine.closed == [77]
    assert machine.cancelled == []
    assert len(desk) == 0


def test_an_end_of_another_prompt_is_refused() -> None:
    payload = end_payload(CHUNKS, DIGEST)
    with pytest.raises(BatonError) as caught:
        parse_end_payload(payload, b"x" * 32)
    assert caught.value.cause is Cause.TOKENS_MISMATCH


@pytest.mark.parametrize("payload", [b"", b"\xff\xff\xff", b"\x0a\x02\x08\x01"])
def test_a_malformed_end_is_refused(payload: bytes) -> None:
    with pytest.raises(BatonError):
        parse_end_payload(payload, DIGEST)


# ── fetches ──────────────────────────────────────────────────────────────────────────────────────


class Outcomes:
    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.num_frames = 0

    def fetch_progress(self, leg: LegId) -> None:
        self.num_frames += 1

    def fetch_ended(
        self, leg: LegId, stats: TransferStats, first_tokens: Sequence[TokenChunk]
    ) -> None:
        self.seen.append((leg, stats, list(first_tokens)))

    def fetch_failed(self, leg: LegId, valid_tokens: int, cause: Cause, detail: str) -> None:
        self.seen.append((leg, valid_tokens, cause))


class ScriptedTransport:
    """Delivers one end frame, raises, or hangs."""

    def __init__(self, name: str, script: Any) -> None:
        self.name = name
        self._script = script
        self.num_fetches = 0
        self.pace_ms = 0
        self.unreachable: set[str] = set()

    async def start(self, source: FrameSource) -> TransportAddress:
        return TransportAddress(self.name, "x:1")

    def reaches(self, peer: TransportAddress) -> bool:
        return peer.address not in self.unreachable

    async def fetch(
        self, peer: TransportAddress, fetch: FetchOpen, sink: FrameSink
    ) -> TransferStats:
        self.num_fetches += 1
        self.pace_ms = fetch.pace_ms
        if isinstance(self._script, Exception):
            raise self._script
        if self._script is None:
            await asyncio.Event().wait()
        sink.opened(5, 16)
        frame = FrameWriter(5).end(fetch.range, self._script)
        assert await sink.frame(b"".join(bytes(part) for part in frame))
        return TransferStats(self.name, num_bytes=100, duration_ms=1.0)

    async def close(self) -> None:
        pass


ORDER = FetchKV(
    LEG,
    FETCH,
    (TransportAddress("one", "x:1"), TransportAddress("two", "x:2")),
    "h",
    (BlockId(0),),
)


def make(*transports: ScriptedTransport) -> tuple[FetchDesk, Outcomes]:
    outcomes = Outcomes()
    memory = KVMemory(torch.zeros(1, 2, 4, 16, 1, 4), LAYOUT)
    return FetchDesk(outcomes, memory, transports, "h", LinkTable()), outcomes


async def run(desk: FetchDesk) -> None:
    desk.start(ORDER)
    async with asyncio.timeout(10):
        while len(desk):
            await asyncio.sleep(0)


async def test_a_complete_fetch_is_reported_with_its_first_tokens() -> None:
    desk, outcomes = make(ScriptedTransport("one", end_payload(CHUNKS, DIGEST)))
    await run(desk)
    ((leg, stats, chunks),) = outcomes.seen
    assert (leg, stats.transport, chunks) == (LEG, "one", list(CHUNKS))
    assert outcomes.num_frames == 1


async def test_a_link_learns_from_every_complete_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    desk, outcomes = make(ScriptedTransport("one", end_payload(CHUNKS, DIGEST)))
    learned: list[TransferStats] = []
    monkeypatch.setattr(desk._links, "learn", lambda _link, stats: learned.append(stats))
    await run(desk)
    assert learned == [outcomes.seen[0][1]]


async def test_an_end_that_makes_no_sense_fails_the_fetch() -> None:
    desk, outcomes = make(ScriptedTransport("one", end_payload(CHUNKS, b"x" * 32)))
    await run(desk)
    assert outcomes.seen == [(LEG, 16, Cause.TOKENS_MISMATCH)]


@pytest.mark.parametrize("begun", [True, False])
async def test_a_cancelled_fetch_is_reported_once(begun: bool) -> None:
    """Also one whose task never ran."""
    desk, outcomes = make(ScriptedTransport("one", None))
    desk.start(ORDER)
    if begun:
        await asyncio.sleep(0)
    desk.cancel(LEG)
    desk.cancel(LEG)
    await desk.close()
    await asyncio.sleep(0)
    assert outcomes.seen == [(LEG, 16, Cause.CANCELLED)]
    desk.cancel(LEG)  # over: ignored


async def test_a_link_that_failed_is_the_last_choice() -> None:
    broken = ScriptedTransport("one", BatonError(Cause.TRANSPORT_FAILED, "reset"))
    sound = ScriptedTransport("two", end_payload(CHUNKS, DIGEST))
    desk, outcomes = make(broken, sound)
    await run(desk)
    await run(desk)
    assert outcomes.seen[0] == (LEG, 16, Cause.TRANSPORT_FAILED)
    assert outcomes.seen[1][1].transport == "two"
    assert (broken.num_fetches, sound.num_fetches) == (1, 1)


async def test_a_link_that_stalled_is_given_more_time() -> None:
    """Otherwise each fetch over it would be given up like the first."""
    stalled = ScriptedTransport("one", BatonError(Cause.TRANSFER_STALLED, "no frame came"))
    links = LinkTable()
    memory = KVMemory(torch.zeros(1, 2, 4, 16, 1, 4), LAYOUT)
    desk = FetchDesk(Outcomes(), memory, [stalled], "h", links)
    await run(desk)
    link = links.get(ORDER.transports[0])
    assert link is not None
    before = link.model.bytes_per_ms
    await run(desk)
    assert link.model.bytes_per_ms == before / 4
    assert stalled.num_fetches == 2, "it is not the last choice: it works"


async def test_an_address_that_is_out_of_reach_is_not_tried() -> None:
    near = ScriptedTransport("one", end_payload(CHUNKS, DIGEST))
    sound = ScriptedTransport("two", end_payload(CHUNKS, DIGEST))
    near.unreachable.add("x:1")
    desk, outcomes = make(near, sound)
    await run(desk)
    assert outcomes.seen[0][1].transport == "two"
    assert near.num_fetches == 0


@pytest.mark.parametrize(
    ("num_bytes", "predicted_ms", "expected"),
    [(0, 0.0, 0), (1000, 0.2, 1), (CREDIT, 500.0, 500), (10 * CREDIT, 5000.0, 500)],
)
def test_the_pace_is_of_what_there_is_credit_for(
    num_bytes: int, predicted_ms: float, expected: int
) -> None:
    assert _pace_ms(FETCH, num_bytes, predicted_ms) == expected


async def test_the_producer_is_told_how_slow_the_link_was_measured() -> None:
    transport = ScriptedTransport("one", None)
    desk, _ = make(transport)
    desk.start(replace(ORDER, fetch=replace(FETCH, range=KVRange(0, 1, 0, 16))))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert transport.pace_ms == 1
    await desk.close()


async def test_fetches_beyond_the_bound_wait_their_turn() -> None:
    transport = ScriptedTransport("one", None)
    desk, outcomes = make(transport)
    orders = [replace(ORDER, leg=LegId(f"r{number}", 1)) for number in range(MAX_PER_LINK + 3)]
    for order in orders:
        desk.start(order)
    for _ in range(5):
        await asyncio.sleep(0)
    assert transport.num_fetches == MAX_PER_LINK
    desk.cancel(orders[-1].leg)  # one that waits
    desk.cancel(orders[0].leg)
    for _ in range(5):
        await asyncio.sleep(0)
    assert transport.num_fetches == MAX_PER_LINK + 1
    assert {leg for leg, _, _ in outcomes.seen} == {orders[0].leg, orders[-1].leg}
    await desk.close()
    await asyncio.sleep(0)
    assert len(outcomes.seen) == len(orders)


async def test_behind_too_much_it_is_refused_at_once() -> None:
    transport = ScriptedTransport("one", None)
    desk, outcomes = make(transport)
    fetch = replace(FETCH, range=KVRange(0, 1, 0, 16))
    orders = [replace(ORDER, fetch=fetch, leg=LegId(f"r{number}", 1)) for number in range(20)]
    desk._queue._max_behind_ms = 0.0
    for order in orders:
        desk.start(order)
    for _ in range(5):
        await asyncio.sleep(0)
    assert transport.num_fetches == MAX_PER_LINK
    assert {cause for _, _, cause in outcomes.seen} == {Cause.OVERLOADED}
    assert len(outcomes.seen) == 20 - MAX_PER_LINK
    await desk.close()


async def test_producers_that_are_gone_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.worker.fetches.FORGET_S", -1.0)
    desk, _ = make(ScriptedTransport("one", end_payload(CHUNKS, DIGEST)))
    for number in range(3):
        order = replace(ORDER, transports=(TransportAddress("one", f"x:{number}"),))
        desk.start(order)
        while len(desk):
            await asyncio.sleep(0)
    assert len(desk._links) == 1
    assert desk._links.get(TransportAddress("one", "x:2")) is not None


async def test_a_producer_has_so_many_readers_and_no_more(
    desk: ExportDesk, machine: Machine
) -> None:
    tasks = [await asked(desk) for _ in range(MAX_ATTACHMENTS)]
    with pytest.raises(BatonError) as caught:
        await desk.attach(FETCH)
    assert caught.value.cause is Cause.OVERLOADED
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asked(desk)
    assert len(machine.asked) == MAX_ATTACHMENTS + 1


async def test_no_common_transport_is_said() -> None:
    desk, outcomes = make(ScriptedTransport("three", None))
    await run(desk)
    assert outcomes.seen == [(LEG, 16, Cause.UNSUPPORTED)]


async def test_a_defect_is_told_as_such() -> None:
    desk, outcomes = make(ScriptedTransport("one", RuntimeError("a defect")))
    await run(desk)
    assert outcomes.seen == [(LEG, 16, Cause.INTERNAL)]
