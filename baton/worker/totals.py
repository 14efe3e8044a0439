"""Counts what a worker tells its gateways with each heartbeat."""

from bisect import bisect_left
from collections import Counter

from baton.engine.events import LegPreempted, StepOutput
from baton.messages import Admitted, GatewayMessage, KvFailed, StepBatch, WorkerMessage
from baton.totals import STEP_TOKENS, WorkerTotals


class TotalsCounter:
    """An observer of the runtime."""

    def __init__(self) -> None:
        self._num_preemptions = 0
        self._num_failed_fetches = 0
        self._num_step_tokens = 0
        self._steps_by_tokens = [0] * (len(STEP_TOKENS) + 1)
        self._lease_counts: Counter[str] = Counter()

    def watch(self, lease_counts: Counter[str]) -> None:
        """Leases are counted by their table."""
        self._lease_counts = lease_counts

    def read(self) -> WorkerTotals:
        return WorkerTotals(
            num_preemptions=self._num_preemptions,
            num_failed_fetches=self._num_failed_fetches,
            num_expired_leases=self._lease_counts["expired"],
            num_step_tokens=self._num_step_tokens,
            steps_by_tokens=tuple(self._steps_by_tokens),
        )

    def stepped(self, output: StepOutput) -> None:
        self._num_preemptions += sum(isinstance(event, LegPreempted) for event in output.events)
        if output.timing is not None:
            num_tokens = output.timing.num_prefill_tokens + output.timing.num_decodes
            self._num_step_tokens += num_tokens
            self._steps_by_tokens[bisect_left(STEP_TOKENS, num_tokens)] += 1

    def received(self, message: GatewayMessage) -> None:
        pass

    def sent(self, message: WorkerMessage) -> None:
        if isinstance(message, StepBatch):
            self._num_failed_fetches += sum(map(_is_failed_fetch, message.messages))


def _is_failed_fetch(item: object) -> bool:
    if isinstance(item, Admitted):
        return item.prefix is not None and item.prefix.cause is not None
    return isinstance(item, KvFailed)
