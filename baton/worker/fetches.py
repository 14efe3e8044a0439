"""The consumer's side of the data plane: fetches under way, over whichever transport fits best."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil
from typing import Protocol

from baton.errors import BatonError, Cause
from baton.grants import HashChain
from baton.kvtransfer.base import FetchOpen, Incoming, Transport
from baton.kvtransfer.exporter import BESIDE_FRAME_BYTES, DEVICE_FRAME_BYTES, FRAME_BYTES
from baton.kvtransfer.importer import Importer
from baton.kvtransfer.memory import KVMemory
from baton.kvtransfer.negotiate import choose
from baton.kvtransfer.staging import DEFAULT_STAGING_BYTES
from baton.types import LegId, TokenChunk, TransferStats, TransportAddress
from baton.worker.effects import FetchKV
from baton.worker.exports import parse_end_payload
from baton.worker.fetch_queue import FetchQueue
from baton.worker.link_table import Link, LinkTable

log = logging.getLogger(__name__)

AVOID_S = 30.0  # how long a link whose transport failed is the last choice
FORGET_S = 600.0  # how long a link that nothing comes over is remembered


class FetchEvents(Protocol):
    """Where fetches' events go; carries the effects out."""

    def fetch_progress(self, leg: LegId) -> None: ...

    def fetch_ended(
        self, leg: LegId, stats: TransferStats, first_tokens: Sequence[TokenChunk]
    ) -> None: ...

    def fetch_failed(self, leg: LegId, valid_tokens: int, cause: Cause, detail: str) -> None: ...


class FetchDesk:
    """Owns the tasks that fetch. Every `start` ends in one fetch_ended or fetch_failed.

    Fetches beyond the bounds of `FetchQueue` wait; behind too much, they fail with OVERLOADED at
    once, so that the gateway has the prompt computed here."""

    def __init__(
        self,
        events: FetchEvents,
        memory: KVMemory,
        transports: Sequence[Transport],
        host_id: str,
        links: LinkTable,
        max_staging_bytes: int = DEFAULT_STAGING_BYTES,
    ) -> None:
        """
        Args:
            transports: in our order of preference.
            host_id: of this worker.
            links: what is known of the links to producers; learns from every fetch.
            max_staging_bytes: of frames on their way, of all fetches.
        """
        self._events = events
        self._memory = memory
        self._host_id = host_id
        self._transports = {transport.name: transport for transport in transports}
        self._tasks: dict[LegId, asyncio.Task[TransferStats]] = {}
        self._links = links
        self._queue = FetchQueue(max_staging_bytes=max_staging_bytes)
        self._turns: dict[LegId, asyncio.Future[None]] = {}

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def num_waiting(self) -> int:
        """Of them, for their turn."""
        return self._queue.num_waiting

    @property
    def staging_bytes(self) -> int:
        """What those that run may have on their way."""
        return self._queue.staging_bytes

    def start(self, order: FetchKV) -> None:
        fetch = _Fetch(self, order)
        task = asyncio.create_task(fetch.run(), name=f"fetch {order.leg}")
        self._tasks[order.leg] = task
        # Not in the task itself: one that is cancelled before it begins would never report.
        task.add_done_callback(fetch.report)

    def cancel(self, leg: LegId) -> None:
        task = self._tasks.get(leg)
        if task is not None:
            task.cancel()

    async def close(self) -> None:
        """Cancel what is under way and wait for it."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    # ── links ────────────────────────────────────────────────────────────────────────────────────

    def choose(self, order: FetchKV) -> tuple[Transport, TransportAddress, Link]:
        """The first of our transports that the producer offers and that has not just failed.

        Raises:
            BatonError: UNSUPPORTED; there is no common one.
        """
        now_s = time.monotonic()
        avoid = self._links.to_avoid(now_s)
        is_same_host = order.host_id == self._host_id
        offered = [
            address
            for address in order.transports
            if address.name in self._transports and self._transports[address.name].reaches(address)
        ]
        address = choose(tuple(self._transports), offered, is_same_host, avoid)
        if self._links.get(address) is None:
            self._links.forget(unused_since_s=now_s - FORGET_S)
        link = self._links.open(address, is_same_host, now_s)
        if not link.is_chosen:
            link.is_chosen = True
            log.info("KV from %s comes over %s", address, link.where)
        return self._transports[address.name], address, link

    async def turn(
        self,
        order: FetchKV,
        address: TransportAddress,
        num_bytes: int,
        predicted_ms: float,
        is_spare: bool,
    ) -> None:
        """Wait until this fetch may begin.

        Raises:
            BatonError: OVERLOADED; too much is before it.
        """
        now_ms = time.monotonic_ns() // 1_000_000
        frame_bytes = BESIDE_FRAME_BYTES if address.name == "cuda" else DEVICE_FRAME_BYTES
        staging_bytes = min(num_bytes, order.fetch.initial_credit * frame_bytes)
        if not self._queue.ask(order.leg, address, predicted_ms, now_ms, is_spare, staging_bytes):
            raise BatonError(Cause.OVERLOADED, f"too many fetches wait for {address}")
        turn = self._turns[order.leg] = asyncio.get_running_loop().create_future()
        self._admit()
        await turn

    def _admit(self) -> None:
        for leg in self._queue.admit():
            turn = self._turns.pop(leg)
            if not turn.done():  # cancelled: it leaves in a moment
                turn.set_result(None)

    def _ended(self, leg: LegId) -> None:
        del self._tasks[leg]
        self._turns.pop(leg, None)
        self._queue.leave(leg)
        self._admit()


class _Fetch:
    """One of them."""

    def __init__(self, desk: FetchDesk, order: FetchKV) -> None:
        self._desk = desk
        self._order = order
        self._importer: Importer | None = None
        self._first_tokens: list[TokenChunk] = []

    async def run(self) -> TransferStats:
        order, desk = self._order, self._desk
        transport, address, link = desk.choose(order)
        rate = link.model.bytes_per_ms * 1e3
        by_hash = isinstance(order.fetch.source, HashChain)
        importer = Importer(
            desk._memory, order.block_ids, order.fetch.range, rate, takes_less=by_hash
        )
        self._importer = importer
        num_bytes = desk._memory.num_bytes(order.fetch.range)
        predicted_ms = num_bytes / link.model.bytes_per_ms
        fetch = replace(order.fetch, pace_ms=_pace_ms(order.fetch, num_bytes, predicted_ms))
        await desk.turn(order, address, num_bytes, predicted_ms, is_spare=by_hash)
        try:
            stats = await transport.fetch(address, fetch, _Sink(importer, self._progress))
        except BatonError as error:
            if error.cause is Cause.TRANSPORT_FAILED:
                link.avoid_until_s = time.monotonic() + AVOID_S
            elif error.cause is Cause.TRANSFER_STALLED:
                _warn(address, desk._links.stalled(link))
            raise
        stats = replace(
            stats,
            num_tokens=importer.valid_tokens - order.fetch.range.token_start,
            ready_bytes=importer.ready_bytes,
            ready_ms=importer.ready_ms,
        )
        _warn(address, desk._links.learn(link, stats))
        payload = importer.end_payload or b""
        self._first_tokens = parse_end_payload(payload, order.fetch.tokens_digest)
        return stats

    def _progress(self) -> None:
        self._desk._events.fetch_progress(self._order.leg)

    def report(self, task: asyncio.Task[TransferStats]) -> None:
        """Once, after the last write."""
        desk, leg = self._desk, self._order.leg
        desk._ended(leg)
        if task.cancelled():
            self._failed(Cause.CANCELLED, "the fetch was cancelled")
            return
        match task.exception():
            case None:
                desk._events.fetch_ended(leg, task.result(), self._first_tokens)
            case BatonError() as error:
                self._failed(error.cause, error.message)
            case error:
                log.error("a fetch failed", exc_info=error)
                self._failed(Cause.INTERNAL, f"{type(error).__name__} while fetching")

    def _failed(self, cause: Cause, detail: str) -> None:
        where = self._order.fetch.range
        valid = where.token_start if self._importer is None else self._importer.valid_tokens
        log.info(
            "fetch of %s ended at token %d: %s: %s", self._order.leg, valid, cause.name, detail
        )
        self._desk._events.fetch_failed(self._order.leg, valid, cause, detail)


def _warn(address: TransportAddress, warning: str | None) -> None:
    if warning is not None:
        log.warning("KV from %s is slow: %s", address, warning)


def _pace_ms(fetch: FetchOpen, num_bytes: int, predicted_ms: float) -> int:
    """See `FetchOpen`; `predicted_ms` is for all its `num_bytes`."""
    share = min(1.0, fetch.initial_credit * FRAME_BYTES / num_bytes) if num_bytes else 0.0
    return ceil(predicted_ms * share)


class _Sink:
    """An importer that says when it has written something."""

    def __init__(self, importer: Importer, on_progress: Callable[[], None]) -> None:
        self._importer = importer
        self._on_progress = on_progress

    def opened(self, epoch: int, num_ready_tokens: int) -> None:
        self._importer.opened(epoch, num_ready_tokens)

    async def frame(self, *frames: Incoming) -> bool:
        is_complete = await self._importer.frame(*frames)
        for _ in frames:
            self._on_progress()
        return is_complete

    def patience_s(self) -> float | None:
        return self._importer.patience_s()
