"""Continuous batching: which tokens of which sequences make up the next step.

    waiting ── blocks for all known tokens ──► running ──► finished, or held
    ready ── has its blocks, lacks a seat ──►     │
    waiting ◄── preempted, blocks gone ───────────┘

A step has `max_num_seqs` seats and `max_num_batched_tokens` tokens. Sequences that decode come
first, one token each; then prompts, and output to be recomputed, in chunks, those that run and
those that wait in one order. Who decodes and finds no block preempts the last in that order.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence as Seq
from itertools import pairwise

from baton.engine.admission import Admission
from baton.engine.block_pool import BlockPool
from baton.engine.config import EngineConfig
from baton.engine.report import Report
from baton.engine.sequence import LegKind, Order, Sequence, SequenceStatus
from baton.engine.step import Step
from baton.types import BlockId, LegId


class Scheduler:
    """Owns the queues, each in the sequences' order, and decides who gets and who loses blocks."""

    def __init__(self, config: EngineConfig, pool: BlockPool, report: Report) -> None:
        self._config = config
        self._pool = pool
        self._report = report
        self.admission = Admission(config, pool)
        self.waiting: list[Sequence] = []  # without blocks
        self.ready: list[Sequence] = []  # with blocks
        self.running: list[Sequence] = []
        self.waiting_for_kv: set[LegId] = set()
        self.leases: set[LegId] = set()  # legs whose blocks somebody may fetch
        self.num_waiting_tokens = 0

    # ── queues ───────────────────────────────────────────────────────────────────────────────────

    def enqueue(self, seq: Sequence) -> None:
        """A new sequence, or one that comes back from a transfer, a fork or a preemption."""
        if seq.block_ids:
            seq.status = SequenceStatus.WAITING
            insort(self.ready, seq, key=_order)
        else:
            insort(self.waiting, seq, key=_order)
            self.num_waiting_tokens += seq.num_tokens

    def park(self, seq: Sequence) -> None:
        """Until its KV has come."""
        seq.status = SequenceStatus.WAITING_FOR_KV
        self.waiting_for_kv.add(seq.leg.leg_id)

    def unpark(self, seq: Sequence, num_computed_tokens: int) -> None:
        """Its prefix has come, as far as it has. Whoever waits for the rest of its blocks may
        compute them: it might find no seat before them."""
        seq.num_computed_tokens = max(seq.num_computed_tokens, num_computed_tokens)
        self.admission.publish(seq)
        self._pool.cache.abandon(seq.block_ids[seq.num_published_blocks :], seq)
        self.leave(seq, SequenceStatus.HELD)
        self.enqueue(seq)
        self._admitted(seq)

    def leave(self, seq: Sequence, status: SequenceStatus) -> None:
        """Out of its queue; its blocks stay with it."""
        if seq.status is SequenceStatus.RUNNING:
            _remove(self.running, seq)
        elif seq.status is SequenceStatus.WAITING and seq.block_ids:
            _remove(self.ready, seq)
        elif seq.status in (SequenceStatus.WAITING, SequenceStatus.PREEMPTED):
            _remove(self.waiting, seq)
            self.num_waiting_tokens -= seq.num_tokens
        elif seq.status is SequenceStatus.WAITING_FOR_KV:
            self.waiting_for_kv.remove(seq.leg.leg_id)
        seq.status = status

    def extend(self, seq: Sequence, token_ids: Seq[int]) -> None:
        """Tokens that `seq` need not sample: it runs them in one chunk."""
        self.leave(seq, SequenceStatus.WAITING)
        seq.output_token_ids += token_ids
        self.enqueue(seq)

    def take_blocks(self, seq: Sequence, *, abandon: bool = True) -> list[BlockId]:
        """The references of `seq`, for the caller to release or to pass on. Without `abandon`,
        those who wait for what `seq` was to write go on waiting, until the quarantine is lifted."""
        if abandon:
            self._pool.cache.abandon(seq.block_ids[seq.num_published_blocks :], seq)
        blocks = seq.block_ids + seq.reserve
        seq.block_ids, seq.reserve = [], []
        seq.num_computed_tokens = seq.num_published_blocks = 0
        return blocks

    @property
    def has_sequences(self) -> bool:
        return bool(self.running or self.ready or self.waiting)

    def num_decoding(self) -> int:
        """Sequences that will want another block before long."""
        return sum(seq.is_decoding for seq in self.running)

    # ── schedule ─────────────────────────────────────────────────────────────────────────────────

    def schedule(self) -> Step:
        step = Step(self._config.max_num_batched_tokens)
        self._seat_ready()
        for seq in self.running.copy():
            if seq.status is SequenceStatus.RUNNING and seq.is_decoding:
                self._schedule_decode(seq, step)
        for seq in self.running.copy():
            if seq.status is SequenceStatus.RUNNING and not seq.is_decoding:
                self._admit(step, seq.order)
                self._schedule_chunk(seq, step)
        self._admit(step, None)
        return step

    def _admit(self, step: Step, before: Order | None) -> None:
        """Seat whoever waits, in order, as far as budget, seats and blocks go; or only those who
        come before somebody that runs."""
        while step.budget > 0 and self.waiting and self._has_seat():
            seq = self.waiting[0]
            if before is not None and seq.order > before:
                return
            if not self.admission.admit(seq, self.num_decoding()):
                return
            del self.waiting[0]
            self.num_waiting_tokens -= seq.num_tokens
            if not self._await_prefix(seq):
                self._seat(seq)
                self._admitted(seq)
                self._schedule_chunk(seq, step)

    def _has_seat(self) -> bool:
        return len(self.running) < self._config.max_num_seqs

    def _seat_ready(self) -> None:
        while self.ready and self._has_seat():
            seq = self.ready.pop(0)
            self._seat(seq)
            self.admission.announce(seq, seq.num_published_blocks)

    def _await_prefix(self, seq: Sequence) -> bool:
        """Whether `seq`, which has its blocks, waits for a part of its prompt to be fetched."""
        leg, stop = seq.leg, 0
        if leg.num_fetch_tokens and len(self.waiting_for_kv) < self._config.max_num_seqs:
            stop = self.admission.claim_prefix(seq)
        leg.num_fetch_tokens = 0
        if stop:
            self.park(seq)
            self._report.prefix_reserved(seq, stop)
        return bool(stop)

    def _admitted(self, seq: Sequence) -> None:
        self._report.admitted(seq)
        if seq.leg.kind is LegKind.PREFILL:
            self.leases.add(seq.leg.leg_id)

    def _seat(self, seq: Sequence) -> None:
        seq.status = SequenceStatus.RUNNING
        insort(self.running, seq, key=_order)

    def _schedule_decode(self, seq: Sequence, step: Step) -> None:
        start = seq.num_computed_tokens
        while not self._make_room(seq, start, start + 1, step):
            victim = self._victim()
            self._preempt(victim)
            if victim is seq:
                return
        step.add(seq, start, start + 1)

    def _schedule_chunk(self, seq: Sequence, step: Step) -> None:
        computer = self._computer_for(seq)
        if computer is None or computer.seq_id in step.seq_ids or step.budget == 0:
            return
        seq = computer
        start = seq.num_computed_tokens
        stop = self._claim(seq, start, min(seq.num_tokens, start + step.budget))
        if self._make_room(seq, start, stop, step):
            step.add(seq, start, stop)
        else:
            # Only output that is recomputed can lack blocks here. Taking them from a sequence that
            # is already part of this step is not possible, and waiting while holding is not safe.
            self._preempt(seq)

    def _computer_for(self, seq: Sequence) -> Sequence | None:
        """`seq`, or whoever computes the block that it waits for: that one inherits its turn. None
        while that block is fetched."""
        cache, block_size = self._pool.cache, self._config.block_size
        while True:
            start = seq.num_computed_tokens
            self.admission.skip_computed(seq)
            self._report.computed(seq, start)
            index = seq.num_computed_tokens // block_size
            writer = cache.writer(seq.block_ids[index]) if index < len(seq.block_ids) else None
            if writer is None or writer is seq:
                return seq
            if writer.status is not SequenceStatus.RUNNING:
                return None
            seq = writer

    def _claim(self, seq: Sequence, start: int, stop: int) -> int:
        """Become the writer of the blocks under [start, stop) up to the first that another sequence
        computes; where that one starts, or `stop`."""
        block_size = self._config.block_size
        for index in range(start // block_size, -(-stop // block_size)):
            if index == len(seq.block_ids):
                break
            if not self._pool.cache.claim(seq.block_ids[index], seq):
                return index * block_size
        return stop

    # ── blocks ───────────────────────────────────────────────────────────────────────────────────

    def _make_room(self, seq: Sequence, start: int, stop: int, step: Step) -> bool:
        """Let tokens [start, stop) have slots that nobody else reads: append blocks, and copy the
        first one if it is shared. False, and nothing done, when there are too few free blocks."""
        first = start // self._config.block_size
        copy = first < len(seq.block_ids) and not self._is_writable(seq.block_ids[first], seq)
        missing = max(self._config.num_blocks_for(stop) - len(seq.block_ids), 0) + copy
        if not missing:
            return True
        num_new = max(missing - len(seq.reserve), 0)
        if num_new > self._pool.num_free:
            return False
        fresh = seq.reserve[:missing]
        del seq.reserve[:missing]
        fresh += self._pool.allocate(num_new, seq.block_ids[-1] if seq.block_ids else None)
        if copy:
            source, seq.block_ids[first] = seq.block_ids[first], fresh.pop()
            step.copies.append((source, seq.block_ids[first]))
            self._pool.release([source])  # copies are done before anything is computed
        seq.block_ids += fresh
        return True

    def _is_writable(self, block: BlockId, seq: Sequence) -> bool:
        cache = self._pool.cache
        if cache.is_pending(block):
            return cache.writer(block) is seq
        return not (self._pool.is_shared(block) or cache.is_ready(block))

    def _victim(self) -> Sequence:
        """The last in the order of those who hold blocks; never one that has a ticket."""
        prefill = LegKind.PREFILL
        running = next(seq for seq in reversed(self.running) if seq.leg.kind is not prefill)
        ready = next((s for s in reversed(self.ready) if s.leg.kind is not prefill), running)
        return max(ready, running, key=_order)

    def _preempt(self, seq: Sequence) -> None:
        self.leave(seq, SequenceStatus.PREEMPTED)
        self._pool.release(self.take_blocks(seq))
        self.enqueue(seq)
        self._report.preempted(seq.leg.leg_id)

    def check_integrity(self, queued: set[int]) -> None:
        """`queued`: ids of the sequences that should be in a queue.

        Raises:
            AssertionError: a sequence is in no queue, in two, or in the wrong one.
        """
        queues = (self.waiting, self.ready, self.running)
        found = [seq.seq_id for queue in queues for seq in queue]
        assert len(found) == len(queued)
        assert queued.issuperset(found)
        assert len(set(found)) == len(found)
        for queue in queues:
            for before, seq in pairwise(queue):
                assert before.order <= seq.order
        assert len(self.running) <= self._config.max_num_seqs
        for seq in self.running:
            assert seq.status is SequenceStatus.RUNNING
            assert seq.block_ids
        for seq in self.ready:
            assert seq.block_ids
        for seq in self.waiting:
            assert not seq.block_ids
            assert not seq.reserve
        assert self.num_waiting_tokens == sum(seq.num_tokens for seq in self.waiting)


def _order(seq: Sequence) -> Order:
    return seq.order


def _remove(queue: list[Sequence], seq: Sequence) -> None:
    index = bisect_left(queue, seq.order, key=_order)
    assert queue[index] is seq, "a sequence is not where its status says"
    del queue[index]
