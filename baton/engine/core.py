"""The engine: commands in, StepOutputs out; a step is schedule → run → apply.

    Intake     applies commands            Legs       every leg on this worker
    Scheduler  puts a batch together       BlockPool  who owns which block
    Outcome    applies a batch's results   Report     events, until the step's end

Pure and synchronous: no thread, no I/O, no torch, and the clock is passed in.
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from itertools import chain

from baton.engine.batch import NOT_FINITE, OnLayers, Runner, Sampled
from baton.engine.block_pool import BlockPool
from baton.engine.commands import Command
from baton.engine.config import EngineConfig
from baton.engine.events import StepOutput
from baton.engine.intake import Intake
from baton.engine.legs import Legs
from baton.engine.outcome import Outcome
from baton.engine.report import Report
from baton.engine.scheduler import Scheduler
from baton.engine.sequence import LegKind, SequenceStatus
from baton.engine.step import Step
from baton.types import BlockId, KVRange, LegId, StepTiming, WorkerSnapshot

log = logging.getLogger(__name__)

OnKVReady = Callable[[LegId, KVRange], None]


class EngineCore:
    """One engine over one runner's KV pool.

    A step is `begin` and `compute`, or `step` for those who need no word before it is computed.

    `on_kv_ready(leg, range)`, if set, is called inside `compute` as layers become ready: the KV of
    an AddPrefill leg's tokens that this step computes, in the layers [0, layer_stop), is in the
    pool and stays as it is. Each call covers the ones before it. The last layer is not told here
    but by PrefillProgress: a token is whole only when its step has ended well. It comes from the
    runner's threads, and must not block. `clock` returns seconds that never go back.
    """

    on_kv_ready: OnKVReady | None = None

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.pool = BlockPool(config.num_blocks, config.block_size, config.enable_prefix_caching)
        self._runner = runner
        self._clock = clock
        self._report = Report(config)
        self._scheduler = Scheduler(config, self.pool, self._report)
        self._legs = Legs(config, self.pool, self._scheduler, self._report, clock)
        self._intake = Intake(config, self.pool, self._scheduler, self._legs, self._report)
        self._outcome = Outcome(self._scheduler, self._legs, self._report)
        self._step, self._started = Step(0), 0.0  # the present one
        self._is_touched = False  # a command was applied since the last output
        self._is_quiet = True  # nothing has happened in the present step
        self._is_stalled = True  # nothing can be scheduled before the next command

    @property
    def has_work(self) -> bool:
        """False: `step` would do nothing before the next command."""
        return self._is_touched or not self._is_stalled

    def apply(self, command: Command) -> None:
        """Between steps only. What is wrong with a request becomes an event, never an exception."""
        self._intake.apply(command)
        self._scheduler.admission.retry()
        self._legs.collect_evicted()
        self._is_touched, self._is_stalled = True, False

    def step(self) -> StepOutput | None:
        """Compute once, and tell what happened since the previous output; None if nothing did."""
        self._schedule()
        return self.compute()

    def begin(self) -> StepOutput | None:
        """Put the next step together. What is known before it is computed (who has got blocks, who
        was refused) is told at once, so that nobody waits a step for it; mostly that is nothing.
        `compute` follows, with no command applied in between."""
        self._schedule()
        return self._output(None) if self._report else None

    def _schedule(self) -> None:
        self._started = self._clock()
        self._step = self._scheduler.schedule()
        self._legs.collect_evicted()
        self._is_quiet = not (self._step.rows or self._report)

    def compute(self) -> StepOutput | None:
        """Run what `begin` put together, and tell what happened since; None if nothing did."""
        step = self._step
        sampled = self._run(step) if step.rows else {}
        if sampled is not None:
            self._outcome.apply(step, sampled)
        duration_ms = (self._clock() - self._started) * 1000
        self._is_stalled = self._is_quiet or not self._scheduler.has_sequences
        return self._output(_timing(step, duration_ms) if step.rows else None)

    def _run(self, step: Step) -> dict[int, tuple[Sampled, ...]] | None:
        """None when the step failed, and its legs with it."""
        try:
            sampled = self._runner.run(step.batch(), self._on_layers(step))
            for row in step.rows:
                answer = sampled.get(row.row_id, ())
                is_broken = not row.num_answers and answer == (Sampled(NOT_FINITE),)
                if len(answer) != row.num_answers and not is_broken:
                    raise ValueError("the runner did not answer every sample request")
        except Exception as error:  # whatever it is, it is these requests' alone
            log.exception("engine step failed with %d rows", len(step.rows))
            self._outcome.fail(step, f"the engine step raised {type(error).__name__}")
            return None
        return sampled

    def _on_layers(self, step: Step) -> OnLayers | None:
        """Whom the runner tells of finished layers, if somebody may fetch what it computes."""
        tell = self.on_kv_ready
        exported = [
            (seq.leg.leg_id, row.start, row.num_context_tokens)
            for seq, row in zip(step.seqs, step.rows, strict=True)
            if seq.leg.kind is LegKind.PREFILL
        ]
        if tell is None or not exported:
            return None
        return partial(_tell_layers, tell, exported, self.config.num_layers)

    def _output(self, timing: StepTiming | None) -> StepOutput | None:
        events = self._report.take()
        stored, removed = self.pool.cache.take_changes()
        if not (timing or events or stored or removed or self._is_touched):
            return None
        self._is_touched = False
        pinned = self._report.take_pinned()  # with a command, so the output is not quiet
        return StepOutput(events, self.snapshot(), timing, stored, removed, pinned)

    def snapshot(self) -> WorkerSnapshot:
        """The load as this engine knows it: the worker fills in draining and step_age_ms."""
        scheduler = self._scheduler
        running, ready = scheduler.running, scheduler.ready
        prefilling = [seq for seq in running + ready if not seq.is_decoding]
        return WorkerSnapshot(
            role=self.config.role,
            num_running=len(running),
            num_waiting=len(scheduler.waiting) + len(ready),
            num_waiting_for_kv=len(scheduler.waiting_for_kv),
            free_blocks=self.pool.num_free,
            total_blocks=self.config.num_blocks,
            num_leases=len(scheduler.leases),
            num_quarantined_blocks=self.pool.num_quarantined,
            queued_prefill_tokens=scheduler.num_waiting_tokens
            + sum(seq.num_uncomputed_tokens for seq in prefilling),
            context_tokens=sum(seq.num_tokens for seq in running if seq.is_decoding),
        )

    def check_integrity(self) -> None:
        """Between steps.

        Raises:
            AssertionError: a block leaks or has two owners, or a sequence is not where it belongs.
        """
        owners: dict[BlockId, int] = {}
        queued = set()
        for leg in self._legs:
            for seq in leg.sequences():
                for block in chain(seq.block_ids, seq.reserve):
                    owners[block] = owners.get(block, 0) + 1
                if seq.status in (SequenceStatus.WAITING_FOR_KV, SequenceStatus.HELD):
                    continue
                queued.add(seq.seq_id)
                assert seq.num_uncomputed_tokens > 0, "a queued sequence with nothing to run"
        self.pool.check_integrity(owners)
        self._scheduler.check_integrity(queued)


def _tell_layers(
    tell: OnKVReady, exported: list[tuple[LegId, int, int]], num_layers: int, num_ready: int
) -> None:
    if 0 < num_ready < num_layers:
        for leg, start, stop in exported:
            tell(leg, KVRange(0, num_ready, start, stop))


def _timing(step: Step, duration_ms: float) -> StepTiming:
    return StepTiming(
        step.num_prefill_tokens,
        step.num_cached_tokens,
        step.num_decodes,
        step.context_tokens,
        duration_ms,
    )
