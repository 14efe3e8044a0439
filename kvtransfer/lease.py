"""Leases and attachments: who may read a prompt's KV on the worker that computed it, how long.

A pure state machine: methods are events, their results are effects for the worker to carry out in
order, and time is passed in. The table is drawn in docs/kv-exchange.md.

    lease       PINNED ⇄ RETAINED through PINNING; CLOSING while readers of a dead lease stop
    attachment  open → (done) → closed; cut = asked to close, still reading until it says so

A lease is opened when the engine has reserved every prompt block and belongs to the gateway: only
Release, Abort, a lost session, expiry or (while RETAINED) eviction end it, never a reader.
"""

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum

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
from baton.kvtransfer.progress import KVReady
from baton.types import BlockId, KVRange, KVTicket, LegId, TokenChunk

# What `LeaseTable.counts` counts. `reattached`: KV that somebody else had begun to read before.
COUNTS = (
    *("opened", "retained", "pinned_again", "attached", "reattached", "done", "stalled"),
    *("expired", "evicted", "failed", "released"),
)
PACE_FACTOR = 4  # how much slower than announced a consumer may be
MAX_PACE_MS = 15_000  # a consumer that announces more is taken at this
MAX_ATTACHMENTS = 8  # of one lease at a time; each costs the producer a sender


class LeaseState(Enum):
    PINNED = "pinned"  # the engine holds the blocks; a reader may start at once
    RETAINED = "retained"  # was read, or nobody came; the engine may take the blocks
    PINNING = "pinning"  # a reader waits until the engine has undone Retain
    CLOSING = "closing"  # over; the blocks are in quarantine until the last reader has stopped


@dataclass(slots=True)
class _Attachment:
    epoch: int
    num_sent_tokens: int
    progress_at_ms: int
    stall_ms: int
    is_done: bool = False
    is_cut: bool = False


@dataclass(frozen=True, slots=True)
class _Pending:
    token_start: int
    stall_ms: int


@dataclass(slots=True)
class _Lease:
    leg: LegId
    ticket: KVTicket
    block_ids: tuple[BlockId, ...]
    ready: KVReady
    state: LeaseState = LeaseState.PINNED
    first_tokens: tuple[TokenChunk, ...] | None = None
    was_read: bool = False
    num_grants: int = 0
    idle_since_ms: int = 0  # complete and without readers
    attachments: dict[int, _Attachment] = field(default_factory=dict)  # by epoch
    pending: dict[int, "_Pending"] = field(default_factory=dict)  # while PINNING, by key

    def open_epochs(self) -> tuple[int, ...]:
        return tuple(a.epoch for a in self.attachments.values() if not a.is_cut)

    def owes_reader(self, attachment: _Attachment) -> bool:
        """Is there something that the consumer could take or confirm now?"""
        if attachment.num_sent_tokens < self.ready.num_tokens:
            return True
        return self.first_tokens is not None and not attachment.is_done


class LeaseTable:
    """All leases of one worker. See the module docstring; `docs/kv-exchange.md` has the table."""

    def __init__(self, first_epoch: int, stall_ms: int, idle_ms: int) -> None:
        """
        Args:
            first_epoch: 64 random bits; epochs count up from there, so that none of this process
                repeats one of an earlier one.
            stall_ms: how long a consumer may leave ready data untaken before its attachment is cut,
                over a link that needs no time; see `patience_ms`.
            idle_ms: how long complete KV waits for a first reader before it may be evicted.
        """
        self._next_epoch = first_epoch % 2**64 or 1
        self._stall_ms = stall_ms
        self._idle_ms = idle_ms
        self._leases: dict[LegId, _Lease] = {}
        self._by_transfer: dict[bytes, _Lease] = {}
        self._by_epoch: dict[int, _Lease] = {}
        self._by_key: dict[int, _Lease] = {}
        self._pinned_blocks: Counter[BlockId] = Counter()
        self.counts: Counter[str] = Counter()  # since the start, for metrics

    def __len__(self) -> int:
        return len(self._leases)

    def __contains__(self, leg: LegId) -> bool:
        return leg in self._leases

    @property
    def num_attachments(self) -> int:
        return len(self._by_epoch)

    @property
    def num_pinned_blocks(self) -> int:
        """Distinct blocks that the engine cannot take back, shared ones counted once."""
        return len(self._pinned_blocks)

    def state(self, leg: LegId) -> LeaseState | None:
        lease = self._leases.get(leg)
        return None if lease is None else lease.state

    def mint_epoch(self) -> int:
        """One that no attachment of this process has had."""
        epoch = self._next_epoch
        self._next_epoch = (epoch + 1) % 2**64 or 1  # 0 is no epoch
        return epoch

    # ── from the engine ──────────────────────────────────────────────────────────────────────────

    def open(
        self, leg: LegId, ticket: KVTicket, block_ids: tuple[BlockId, ...], num_ready_tokens: int
    ) -> None:
        """Every prompt block is reserved."""
        assert leg not in self._leases
        assert ticket.transfer_id not in self._by_transfer
        lease = _Lease(leg, ticket, block_ids, KVReady(num_ready_tokens))
        self._leases[leg] = self._by_transfer[ticket.transfer_id] = lease
        self.counts["opened"] += 1
        self._pinned_blocks.update(block_ids)

    def ready(self, leg: LegId, num_ready_tokens: int, now_ms: int) -> list[LeaseEffect]:
        """The prefill has come so far, in all layers."""
        lease = self._leases.get(leg)
        return [] if lease is None else self._ready(lease, KVReady(num_ready_tokens), now_ms)

    def layers_ready(self, leg: LegId, where: KVRange, now_ms: int) -> list[LeaseEffect]:
        """The step that computes the tokens of `where` is through with its layers, from the first
        on. What does not follow on what is known to be ready is ignored."""
        lease = self._leases.get(leg)
        if lease is None or where.layer_start > 0 or where.token_start > lease.ready.num_tokens:
            return []
        ready = KVReady(lease.ready.num_tokens, where.token_stop, where.layer_stop)
        return self._ready(lease, ready, now_ms)

    def _ready(self, lease: _Lease, ready: KVReady, now_ms: int) -> list[LeaseEffect]:
        if not ready.is_beyond(lease.ready):
            return []
        self._restart_clocks(lease, now_ms)
        lease.ready = ready
        epochs = lease.open_epochs()
        return [AttachmentReady(epochs, ready)] if epochs else []

    def sampled(
        self, leg: LegId, first_tokens: tuple[TokenChunk, ...], now_ms: int
    ) -> list[LeaseEffect]:
        """The prefill is complete."""
        lease = self._leases.get(leg)
        if lease is None or lease.first_tokens is not None:
            return []
        self._restart_clocks(lease, now_ms)
        lease.first_tokens = first_tokens
        lease.idle_since_ms = now_ms
        epochs = lease.open_epochs()
        return [AttachmentSampled(epochs, first_tokens)] if epochs else []

    def _restart_clocks(self, lease: _Lease, now_ms: int) -> None:
        """A consumer that waited for the prefill was not stalling."""
        for attachment in lease.attachments.values():
            if not lease.owes_reader(attachment):
                attachment.progress_at_ms = now_ms

    def pinned(self, leg: LegId, now_ms: int) -> list[LeaseEffect]:
        """The engine has undone Retain: whoever waited may read."""
        lease = self._leases.get(leg)
        if lease is None or lease.state is not LeaseState.PINNING:
            return []
        lease.state = LeaseState.PINNED
        self.counts["pinned_again"] += 1
        waiting, lease.pending = lease.pending, {}
        effects: list[LeaseEffect] = []
        for key, pending in waiting.items():
            del self._by_key[key]
            effects.append(self._grant(lease, key, pending, now_ms))
        return effects or self._retain_if_read(lease)

    def evicted(self, leg: LegId) -> list[LeaseEffect]:
        """The engine took a retained lease's blocks."""
        lease = self._leases.get(leg)
        if lease is None or lease.state is LeaseState.CLOSING:
            return []
        assert not lease.attachments, "a lease with readers is pinned"
        effects = self._refuse_pending(lease, "the KV was evicted")
        self._forget(lease)
        self.counts["evicted"] += 1
        return [*effects, LeaseEnded(leg, Cause.LEASE_UNKNOWN)]

    def failed(self, leg: LegId) -> list[LeaseEffect]:
        """The engine failed the leg; its blocks wait in quarantine for QuiesceLease."""
        lease = self._leases.get(leg)
        if lease is None:
            return [QuiesceLease(leg)]
        if lease.state is LeaseState.CLOSING:
            return []  # comes when the last reader has stopped
        self.counts["failed"] += 1
        effects = self._refuse_pending(lease, "the prefill failed")
        if lease.attachments:
            return [*effects, *self._close(lease, "the prefill failed")]
        return [*effects, *self._end(lease)]

    # ── from the gateway ─────────────────────────────────────────────────────────────────────────

    def release(self, leg: LegId) -> list[LeaseEffect]:
        """The request is over, or its session is lost. Legal in every state."""
        lease = self._leases.get(leg)
        if lease is None or lease.state is LeaseState.CLOSING:
            return []
        self.counts["released"] += 1
        return self._drop(lease)

    def _drop(self, lease: _Lease) -> list[LeaseEffect]:
        effects = self._refuse_pending(lease, "the lease was released")
        if not lease.attachments:
            self._forget(lease)
            return [*effects, DropLease(lease.leg, in_flight=False)]
        effects += self._close(lease, "the lease was released")
        return [*effects, DropLease(lease.leg, in_flight=True)]

    # ── from consumers ───────────────────────────────────────────────────────────────────────────

    def attach(
        self, key: int, transfer_id: bytes, token_start: int, now_ms: int, pace_ms: int = 0
    ) -> list[LeaseEffect]:
        """Someone with a verified ticket wants to read tokens [token_start, num_tokens), and needs
        `pace_ms` for the frames that it has credit for.

        Answered by AttachGranted or AttachRefused with the same `key`, now or after PinLease.
        """
        lease = self._by_transfer.get(transfer_id)
        if lease is None or lease.state is LeaseState.CLOSING:
            return [AttachRefused(key, Cause.LEASE_UNKNOWN, "no such lease")]
        if lease.ticket.expires_at_ms <= now_ms:
            return [AttachRefused(key, Cause.TICKET_EXPIRED, "the ticket has expired")]
        if len(lease.attachments) + len(lease.pending) >= MAX_ATTACHMENTS:
            return [AttachRefused(key, Cause.OVERLOADED, "too many readers of one lease")]
        pending = _Pending(token_start, patience_ms(self._stall_ms, pace_ms))
        if lease.state is LeaseState.PINNED:
            return [self._grant(lease, key, pending, now_ms)]
        lease.pending[key] = pending
        self._by_key[key] = lease
        if lease.state is LeaseState.PINNING:
            return []
        lease.state = LeaseState.PINNING
        self._pinned_blocks.update(lease.block_ids)
        return [PinLease(lease.leg)]

    def cancel_attach(self, key: int) -> None:
        """Whoever asked is gone before it was answered."""
        lease = self._by_key.pop(key, None)
        if lease is not None:
            del lease.pending[key]

    def progress(self, epoch: int, num_sent_tokens: int, now_ms: int) -> None:
        """The consumer took a frame."""
        lease = self._by_epoch.get(epoch)
        if lease is not None:
            attachment = lease.attachments[epoch]
            attachment.num_sent_tokens = max(attachment.num_sent_tokens, num_sent_tokens)
            attachment.progress_at_ms = now_ms

    def done(self, epoch: int) -> None:
        """The consumer has verified everything. Of a cut attachment it changes nothing."""
        lease = self._by_epoch.get(epoch)
        if lease is not None and not lease.attachments[epoch].is_cut:
            lease.attachments[epoch].is_done = True
            self.counts["done"] += 1
            lease.was_read = True

    def closed(self, epoch: int, now_ms: int) -> list[LeaseEffect]:
        """Nothing of this attachment reads the blocks any more. Once per epoch."""
        lease = self._by_epoch.pop(epoch, None)
        if lease is None:
            return []
        del lease.attachments[epoch]
        lease.idle_since_ms = now_ms
        if lease.state is LeaseState.CLOSING and not lease.attachments:
            return self._end(lease)
        return self._retain_if_read(lease)

    # ── time ─────────────────────────────────────────────────────────────────────────────────────

    def tick(self, now_ms: int) -> list[LeaseEffect]:
        """Cut stalled readers; let go of leases that nobody reads, end those that expired."""
        effects: list[LeaseEffect] = []
        for lease in list(self._leases.values()):
            if lease.state is LeaseState.CLOSING:
                continue
            for attachment in lease.attachments.values():
                late = now_ms - attachment.progress_at_ms > attachment.stall_ms
                if late and not attachment.is_cut and lease.owes_reader(attachment):
                    self.counts["stalled"] += 1
                    effects.append(_cut(attachment, Cause.TRANSFER_STALLED, "no progress"))
            idle = not lease.attachments and not lease.pending
            if idle and lease.ticket.expires_at_ms <= now_ms:
                self.counts["expired"] += 1
                effects += self._drop(lease)
                effects.append(LeaseEnded(lease.leg, Cause.TICKET_EXPIRED))
            elif idle and self._is_forgotten(lease, now_ms):
                effects += self._retain(lease)
        return effects

    def _is_forgotten(self, lease: _Lease, now_ms: int) -> bool:
        complete = lease.first_tokens is not None
        return complete and now_ms - lease.idle_since_ms > self._idle_ms

    # ── transitions ──────────────────────────────────────────────────────────────────────────────

    def _grant(self, lease: _Lease, key: int, asked: _Pending, now_ms: int) -> AttachGranted:
        epoch = self.mint_epoch()
        attachment = _Attachment(epoch, asked.token_start, now_ms, asked.stall_ms)
        lease.attachments[epoch] = attachment
        self.counts["reattached" if lease.num_grants else "attached"] += 1
        lease.num_grants += 1
        self._by_epoch[epoch] = lease
        return AttachGranted(
            key,
            epoch,
            lease.leg,
            lease.block_ids,
            lease.ticket.num_tokens,
            lease.ready,
            lease.first_tokens,
        )

    def _retain_if_read(self, lease: _Lease) -> list[LeaseEffect]:
        return self._retain(lease) if lease.was_read and not lease.attachments else []

    def _retain(self, lease: _Lease) -> list[LeaseEffect]:
        if lease.state is not LeaseState.PINNED:
            return []
        lease.state = LeaseState.RETAINED
        self.counts["retained"] += 1
        self._unpin_blocks(lease)
        return [RetainLease(lease.leg)]

    def _refuse_pending(self, lease: _Lease, detail: str) -> list[LeaseEffect]:
        waiting, lease.pending = lease.pending, {}
        for key in waiting:
            del self._by_key[key]
        return [AttachRefused(key, Cause.LEASE_UNKNOWN, detail) for key in waiting]

    def _close(self, lease: _Lease, detail: str) -> list[LeaseEffect]:
        lease.state = LeaseState.CLOSING
        readers = lease.attachments.values()
        return [_cut(a, Cause.LEASE_UNKNOWN, detail) for a in readers if not a.is_cut]

    def _end(self, lease: _Lease) -> list[LeaseEffect]:
        self._forget(lease)
        return [QuiesceLease(lease.leg)]

    def _forget(self, lease: _Lease) -> None:
        assert not lease.attachments
        assert not lease.pending
        if lease.state is not LeaseState.RETAINED:
            self._unpin_blocks(lease)
        del self._leases[lease.leg]
        del self._by_transfer[lease.ticket.transfer_id]

    def _unpin_blocks(self, lease: _Lease) -> None:
        for block_id in lease.block_ids:
            self._pinned_blocks[block_id] -= 1
            if not self._pinned_blocks[block_id]:
                del self._pinned_blocks[block_id]

    def check_integrity(self) -> None:
        """Asserts every invariant; for tests and idle workers."""
        assert len(self._by_transfer) == len(self._leases)
        counts = self.counts
        num_ended = counts["expired"] + counts["evicted"] + counts["failed"] + counts["released"]
        num_open = num_attachments = num_pending = 0
        pinned: dict[BlockId, int] = {}
        for leg, lease in self._leases.items():
            assert lease.leg == leg
            assert self._by_transfer[lease.ticket.transfer_id] is lease
            num_open += lease.state is not LeaseState.CLOSING
            num_attachments += len(lease.attachments)
            num_pending += len(lease.pending)
            self._check_lease(lease)
            if lease.state is not LeaseState.RETAINED:
                for block_id in lease.block_ids:
                    pinned[block_id] = pinned.get(block_id, 0) + 1
        assert counts["opened"] == num_ended + num_open
        assert pinned == dict(self._pinned_blocks)
        assert len(self._by_epoch) == num_attachments
        assert len(self._by_key) == num_pending

    def _check_lease(self, lease: _Lease) -> None:
        for epoch, attachment in lease.attachments.items():
            assert self._by_epoch[epoch] is lease
            assert attachment.is_cut or lease.state is not LeaseState.CLOSING
        for key in lease.pending:
            assert self._by_key[key] is lease
            assert lease.state is LeaseState.PINNING
        if lease.state is LeaseState.CLOSING:
            assert lease.attachments
        elif lease.state is not LeaseState.PINNED:
            assert not lease.attachments
            assert lease.was_read or lease.first_tokens is not None


def patience_ms(stall_ms: int, pace_ms: int) -> int:
    """How long a consumer may take nothing that needs `pace_ms` for all it has credit for."""
    return stall_ms + PACE_FACTOR * min(pace_ms, MAX_PACE_MS)


def _cut(attachment: _Attachment, cause: Cause, detail: str) -> CutAttachment:
    attachment.is_cut = True
    return CutAttachment(attachment.epoch, cause, detail)
