"""What a worker counts for its gateways."""

from baton.engine.events import LegFailed, LegPreempted, StepOutput
from baton.errors import Cause
from baton.messages import Admitted, Hello, Imported, KvFailed, PrefixFetched, StepBatch
from baton.totals import STEP_TOKENS
from baton.types import LegId, Role, StepTiming, TransferStats, WorkerSnapshot
from baton.worker.totals import TotalsCounter
from tests.worker.machines import info

LEG = LegId("r", 1)
SNAPSHOT = WorkerSnapshot(Role.BOTH)


def test_steps_are_told_apart_by_their_tokens() -> None:
    counter = TotalsCounter()
    for num_prefill_tokens, num_decodes in ((0, 1), (0, 9), (7, 1), (16384, 1)):
        timing = StepTiming(num_prefill_tokens, num_decodes=num_decodes)
        counter.stepped(StepOutput((), SNAPSHOT, timing))
    counter.stepped(StepOutput((), SNAPSHOT, None))
    totals = counter.read()
    assert totals.num_step_tokens == 1 + 9 + 8 + 16385
    bounds = [*STEP_TOKENS, None]
    counts = {b: c for b, c in zip(bounds, totals.steps_by_tokens, strict=True) if c}
    assert counts == {1: 1, 8: 1, 16: 1, None: 1}


def test_preemptions_and_fetches_that_failed() -> None:
    counter = TotalsCounter()
    events = (LegPreempted(LEG), LegPreempted(LEG), LegFailed(LEG, Cause.STEP_FAILED, ""))
    counter.stepped(StepOutput(events, SNAPSHOT, None))
    counter.sent(Hello(info()))
    messages = (
        KvFailed(LEG, 0, Cause.FRAME_CORRUPT),
        Imported(LEG, TransferStats("shm")),
        Admitted(LEG, 0),
        Admitted(LEG, 16, prefix=PrefixFetched(16, stats=TransferStats("shm"))),
        Admitted(LEG, 16, prefix=PrefixFetched(16, Cause.TRANSFER_STALLED)),
    )
    counter.sent(StepBatch(messages, SNAPSHOT))
    totals = counter.read()
    assert (totals.num_preemptions, totals.num_failed_fetches) == (2, 2)
