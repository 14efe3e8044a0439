"""The engine: commands in, one StepOutput per step out; a step is schedule → run → apply.

    Intake     applies commands            Legs       every leg on this worker
    Scheduler  puts a batch together       BlockPool  who owns which block
    Outcome    applies a batch's results   Report     events, until the step's end

Pure and synchronous: no thread, no I/O, no torch, and the clock is passed in.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable

from baton.engine.batch import NOT_FINITE, Runner, Sampled
from baton.engine.block_pool import BlockPool
from baton.engine.commands import Command
from baton.engine.config import EngineConfig
from baton.engine.events import StepOutput
from baton.engine.intake import Intake
from baton.engine.legs import Legs
from baton.engine.outcome import Outcome
from baton.engine.report import OnKVReady, Report
from baton.engine.scheduler import Scheduler
from baton.engine.sequence import SequenceStatus
from baton.engine.step import Step
from baton.types import BlockId, StepTiming, WorkerSnapshot

log = logging.getLogger(__name__)


class EngineCore:
    """One engine over one runner's KV pool.

    `on_kv_ready(leg, range)` is called inside `step` when KV of an AddPrefill leg is new in the
    pool, possibly before the StepOutput that tells of the leg's admission. It must not block.
    `clock` returns seconds that never go back.
    """

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner,
        *,
        on_kv_ready: OnKVReady | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.pool = BlockPool(config.num_blocks, config.block_size, config.enable_prefix_caching)
        self._runner = runner
        self._clock = clock
        self._report = Report(config, on_kv_ready)
        self._scheduler = Scheduler(config, self.pool, self._report)
        self._legs = Legs(config, self.pool, self._scheduler, self._report, clock)
        self._intake = Intake(config, self.pool, self._scheduler, self._legs, self._report)
        self._outcome = Outcome(self._scheduler, self._legs, self._report)
        self._is_touched = False  # a command was applied since the last output
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
        started = self._clock()
        step = self._scheduler.schedule()
        self._legs.collect_evicted()
        sampled = self._run(step) if step.rows else {}
        if sampled is not None:
            self._outcome.apply(step, sampled)
        duration_ms = (self._clock() - started) * 1000
        return self._output(_timing(step, duration_ms) if step.rows else None)

    def _run(self, step: Step) -> dict[int, tuple[Sampled, ...]] | None:
        """None when the step failed, and its legs with it."""
        try:
            sampled = self._runner.run(step.batch())
            for row in step.rows:
                answer = sampled.get(row.row_id, ())
                is_broken = not row.samples and answer == (Sampled(NOT_FINITE),)
                if len(answer) != len(row.samples) and not is_broken:
                    raise ValueError("the runner did not answer every sample request")
        except Exception as error:  # whatever it is, it is these requests' alone
            log.exception("engine step failed with %d rows", len(step.rows))
            self._outcome.fail(step, f"the engine step raised {type(error).__name__}")
            return None
        return sampled

    def _output(self, timing: StepTiming | None) -> StepOutput | None:
        events = self._report.take()
        stored, removed = self.pool.cache.take_changes()
        is_quiet = timing is None and not events
        self._is_stalled = is_quiet or not self._scheduler.has_sequences
        if is_quiet and not (self._is_touched or stored or removed):
            return None
        self._is_touched = False
        return StepOutput(events, self.snapshot(), timing, stored, removed)

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
        owners: Counter[BlockId] = Counter()
        queued = set()
        for leg in self._legs:
            for seq in leg.sequences():
                owners.update(seq.block_ids + seq.reserve)
                if seq.status in (SequenceStatus.WAITING_FOR_KV, SequenceStatus.HELD):
                    continue
                queued.add(seq.seq_id)
                assert seq.num_uncomputed_tokens > 0, "a queued sequence with nothing to run"
        self.pool.check_integrity(owners)
        self._scheduler.check_integrity(queued)


def _timing(step: Step, duration_ms: float) -> StepTiming:
    return StepTiming(
        step.num_prefill_tokens,
        step.num_cached_tokens,
        step.num_decodes,
        step.context_tokens,
        duration_ms,
    )
