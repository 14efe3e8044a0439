"""Every leg on this worker: opening, forking, growing and ending one."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq

from baton.engine.admission import check_request, growth_blocks
from baton.engine.block_pool import BlockPool
from baton.engine.config import EngineConfig
from baton.engine.report import Report
from baton.engine.scheduler import Scheduler
from baton.engine.sequence import FINISHED, Leg, LegKind, Sequence, SequenceStatus
from baton.engine.stopping import Finish, check_stop
from baton.errors import BatonError, Cause
from baton.hashing import root_hash
from baton.types import BlockId, LegId, Logprobs, Request

FirstToken = tuple[int, Logprobs | None]


class Legs:
    """Owns the legs, and through them every block that is not free or in quarantine."""

    def __init__(
        self,
        config: EngineConfig,
        pool: BlockPool,
        scheduler: Scheduler,
        report: Report,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._pool = pool
        self._scheduler = scheduler
        self._report = report
        self._clock = clock
        self._legs: dict[LegId, Leg] = {}
        self._arrivals = itertools.count()
        self._seq_ids = itertools.count()
        self._eos_token_ids = frozenset(config.eos_token_ids)

    def __iter__(self) -> Iterator[Leg]:
        return iter(self._legs.values())

    def get(self, leg_id: LegId) -> Leg | None:
        return self._legs.get(leg_id)

    # ── opening ──────────────────────────────────────────────────────────────────────────────────

    def open(self, kind: LegKind, leg_id: LegId, request: Request) -> Leg | None:
        """A new leg without sequences, or None after LegFailed."""
        known = self._legs.get(leg_id)
        if known is not None:
            self.fail(known, Cause.PROTOCOL, "a second leg with the same id")
            return None
        try:
            check_request(self._config, kind, request)
            full = len(self._scheduler.waiting) >= self._config.max_num_waiting
            if full and kind is not LegKind.DECODE:
                raise BatonError(Cause.OVERLOADED, "too many requests are waiting")
        except BatonError as error:
            self._report.failed(leg_id, error.cause, error.message)
            return None
        by_deadline = self._config.scheduling_policy == "deadline"
        left_ms = request.deadline_ms if by_deadline else None
        leg = Leg(
            leg_id,
            kind,
            request,
            request.priority,
            0.0 if not by_deadline else float("inf"),
            next(self._arrivals),
            root_hash(self._config.fingerprint, request.salt),
            set(request.open_choices()),
        )
        if left_ms is not None:
            leg.deadline_s = self._clock() + left_ms / 1000
        self._legs[leg_id] = leg
        return leg

    def new_trunk(self, leg: Leg) -> Sequence:
        leg.trunk = self._new_sequence(leg, min(leg.open_choices, default=0))
        return leg.trunk

    def narrow(self, leg: Leg, trunk: Sequence) -> None:
        """With a single choice to compute, the trunk is that choice's branch from the start."""
        (choice,) = leg.open_choices
        leg.trunk, leg.branches[choice] = None, trunk
        trunk.choice, trunk.order = choice, leg.order(choice)
        trunk.output_token_ids[:] = leg.request.committed(choice)

    def _new_sequence(self, leg: Leg, choice: int) -> Sequence:
        return Sequence(next(self._seq_ids), leg, choice)

    # ── growing ──────────────────────────────────────────────────────────────────────────────────

    def fork(self, leg: Leg, first_tokens: Mapping[int, FirstToken]) -> None:
        """The prompt's KV is there: one branch per open choice takes over from the trunk.

        Branches share all blocks; whoever writes into the last, partial one copies it first.
        Committed output wins over a first token.
        """
        trunk = leg.trunk
        assert trunk is not None
        self._scheduler.leave(trunk, SequenceStatus.HELD)
        for choice in sorted(leg.open_choices):
            if self.settle(leg, choice):
                continue
            branch = leg.branches[choice] = self._new_sequence(leg, choice)
            branch.output_token_ids += leg.request.committed(choice)
            self._share_blocks(trunk, branch)
            self._scheduler.enqueue(branch)
            if not branch.output_token_ids:
                self.append(branch, *first_tokens[choice])
        self._pool.release(self._scheduler.take_blocks(trunk))
        leg.trunk = None
        self._forget_if_over(leg)

    def _share_blocks(self, trunk: Sequence, branch: Sequence) -> None:
        self._pool.acquire(trunk.block_ids)
        branch.block_ids = trunk.block_ids.copy()
        branch.hashes = trunk.hashes.copy()
        branch.num_computed_tokens = trunk.num_computed_tokens
        branch.num_published_blocks = trunk.num_published_blocks
        num_growth = growth_blocks(self._config, trunk.leg.request, branch.choice)
        branch.reserve, trunk.reserve = trunk.reserve[:num_growth], trunk.reserve[num_growth:]

    def append(self, branch: Sequence, token_id: int, logprobs: Logprobs | None) -> None:
        """One more token of a branch, which may be its last."""
        branch.output_token_ids.append(token_id)
        finish = self.check_stop(branch.leg, branch.output_token_ids)
        index = len(branch.output_token_ids) - 1
        self._report.token(branch.leg, branch.choice, index, token_id, logprobs, finish)
        if finish[0] is not None:
            self.finish(branch, FINISHED[finish[0]])

    def check_stop(self, leg: Leg, output: Seq[int]) -> Finish:
        return check_stop(
            leg.request.sampling,
            self._eos_token_ids,
            output,
            leg.num_prompt_tokens,
            self._config.max_model_len,
        )

    def settle(self, leg: Leg, choice: int) -> bool:
        """End a choice whose committed output is complete already."""
        committed = leg.request.committed(choice)
        reason = self.check_stop(leg, committed)[0] if committed else None
        if reason is None:
            return False
        leg.open_choices.discard(choice)
        self._report.finished(leg, choice, len(committed), reason)
        return True

    def hold(self, leg: Leg, block_ids: list[BlockId], num_tokens: int) -> None:
        """Let a new leg hold the KV of `num_tokens` tokens that another one computed."""
        trunk = self.new_trunk(leg)
        self._pool.acquire(block_ids)
        trunk.block_ids = block_ids
        trunk.num_computed_tokens = num_tokens
        trunk.num_published_blocks = len(block_ids)  # it is not the one to publish them
        trunk.status = SequenceStatus.HELD
        self._scheduler.leases.add(leg.leg_id)
        self._report.shared(leg, block_ids, num_tokens)

    # ── ending ───────────────────────────────────────────────────────────────────────────────────

    def finish(self, branch: Sequence, status: SequenceStatus) -> None:
        """One choice is over, and with the last one its leg."""
        self._scheduler.leave(branch, status)
        self._pool.release(self._scheduler.take_blocks(branch))
        branch.leg.open_choices.discard(branch.choice)
        del branch.leg.branches[branch.choice]
        self._forget_if_over(branch.leg)

    def close(self, leg: Leg, status: SequenceStatus, *, in_flight: bool) -> None:
        """The whole leg is over; its blocks are free, or in quarantine while in flight."""
        blocks = []
        for seq in leg.sequences():
            is_written = in_flight and seq.status is SequenceStatus.WAITING_FOR_KV
            self._scheduler.leave(seq, status)
            blocks += self._scheduler.take_blocks(seq, abandon=not is_written)
        if leg.is_retained and in_flight:
            blocks = self._pool.pin(leg.leg_id)
        elif leg.is_retained:
            self._pool.drop_retained(leg.leg_id)
        if in_flight:
            self._pool.quarantine(leg.leg_id, blocks)
        else:
            self._pool.release(blocks)
        self._forget(leg)

    def fail(self, leg: Leg, cause: Cause, detail: str) -> None:
        """The engine ends a leg; whoever transfers its blocks does not know yet."""
        self.close(leg, SequenceStatus.FINISHED_FAILED, in_flight=leg.is_exposed)
        self._report.failed(leg.leg_id, cause, detail)

    def poison(self, leg: Leg) -> None:
        """Let nobody reuse the KV of a leg whose results are not finite."""
        for seq in leg.sequences():
            for block in seq.block_ids:
                if self._pool.cache.is_ready(block):
                    self._pool.cache.forget(block)

    def collect_evicted(self) -> None:
        """Forget retained legs whose blocks were taken since the last call."""
        for leg_id in self._pool.take_evicted_legs():
            self._forget(self._legs[leg_id])
            self._report.lease_evicted(leg_id)

    def _forget_if_over(self, leg: Leg) -> None:
        if not leg.open_choices and leg.trunk is None:
            self._forget(leg)

    def _forget(self, leg: Leg) -> None:
        del self._legs[leg.leg_id]
        self._scheduler.leases.discard(leg.leg_id)
        leg.trunk = None
        leg.branches.clear()
