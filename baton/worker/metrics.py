"""A worker's Prometheus metrics: fed from what it does, served over HTTP."""

from collections import Counter
from collections.abc import Sized
from typing import Protocol

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client import Counter as PrometheusCounter

from baton.engine.events import LegFailed, LegPreempted, StepOutput
from baton.engine.pooling_core import PoolingOutput
from baton.errors import Cause
from baton.kvtransfer.lease import COUNTS
from baton.kvtransfer.staging import StagingBudget
from baton.messages import (
    Admitted,
    GatewayMessage,
    Imported,
    KvFailed,
    PrefixFetched,
    StepBatch,
    WorkerMessage,
)
from baton.telemetry import WorkerMetrics
from baton.types import TransferStats, WorkerSnapshot
from baton.worker.producer import ProducerSide


class _Tally:
    """Passes on what has been counted since it last looked."""

    def __init__(self, counts: Counter[str] | Counter[Cause], metric: PrometheusCounter) -> None:
        self._counts = counts
        self._metric = metric
        self._seen: dict[str | Cause, int] = {}

    def take(self) -> None:
        for key, count in self._counts.items():
            if new := count - self._seen.get(key, 0):
                name = key.name.lower() if isinstance(key, Cause) else key
                self._metric.labels(name).inc(new)
                self._seen[key] = count


class Fetching(Protocol):
    """What is asked of `baton.worker.fetches.FetchDesk`."""

    @property
    def num_waiting(self) -> int: ...

    @property
    def staging_bytes(self) -> int: ...

    def __len__(self) -> int: ...


class MetricsObserver:
    """Feeds `WorkerMetrics`."""

    def __init__(self, metrics: WorkerMetrics) -> None:
        self._metrics = metrics
        self._tallies: list[_Tally] = []

    def watch(
        self, producer: ProducerSide, exports: Sized, fetches: Fetching, staging: StagingBudget
    ) -> None:
        """Show what the two sides of the exchange count, and what is under way now."""
        for name in COUNTS:  # each is there from the start
            self._metrics.lease_events.labels(name)
        self._tallies = [
            _Tally(producer.leases.counts, self._metrics.lease_events),
            _Tally(producer.refusals, self._metrics.attach_refusals),
        ]
        # Read when they are scraped, on another thread: lengths, so any moment's will do.
        self._metrics.attachments.set_function(lambda: len(exports))
        for state, count in {
            "running": lambda: len(fetches) - fetches.num_waiting,
            "waiting": lambda: fetches.num_waiting,
        }.items():
            self._metrics.fetches.labels(state).set_function(count)
        for side, num_bytes in {
            "export": lambda: staging.used_bytes,
            "import": lambda: fetches.staging_bytes,
        }.items():
            self._metrics.staging.labels(side).set_function(num_bytes)

    def stepped(self, output: StepOutput) -> None:
        metrics = self._metrics
        self._count()
        if output.timing is not None:
            metrics.step_s.observe(output.timing.duration_ms / 1e3)
            metrics.prefill_tokens.inc(output.timing.num_prefill_tokens)
        for event in output.events:
            if isinstance(event, LegPreempted):
                metrics.preemptions.inc()
            elif isinstance(event, LegFailed):
                metrics.failures.labels(event.cause.name.lower()).inc()
        self._show(output.snapshot)

    def pooled(self, output: PoolingOutput, snapshot: WorkerSnapshot) -> None:
        """A step of a pooling worker."""
        self._metrics.step_s.observe(output.timing.duration_ms / 1e3)
        self._metrics.prefill_tokens.inc(output.timing.num_prefill_tokens)
        for result in output.results:
            if isinstance(result.value, Cause):
                self._metrics.failures.labels(result.value.name.lower()).inc()
        self._show(snapshot)

    def received(self, message: GatewayMessage) -> None:
        pass

    def sent(self, message: WorkerMessage) -> None:
        if not isinstance(message, StepBatch):
            return
        self._count()
        metrics = self._metrics
        metrics.leases.set(message.snapshot.num_leases)
        for item in message.messages:
            if isinstance(item, Admitted):
                metrics.prefills.labels("local" if item.ticket is None else "leased").inc()
                if item.prefix is not None:
                    self._fetched(item.prefix)
            elif isinstance(item, Imported):
                metrics.prefills.labels("remote").inc()
                self._moved(item.stats)
            elif isinstance(item, KvFailed):
                metrics.fetch_failures.labels(item.cause.name.lower()).inc()

    def _count(self) -> None:
        for tally in self._tallies:
            tally.take()

    def _fetched(self, prefix: PrefixFetched) -> None:
        outcome = "ok" if prefix.cause is None else prefix.cause.name.lower()
        self._metrics.prefix_fetches.labels(outcome).inc()
        self._metrics.fetched_prefix_tokens.inc(prefix.num_tokens)
        if prefix.stats is not None:
            self._moved(prefix.stats)

    def _moved(self, stats: TransferStats) -> None:
        self._metrics.kv_transfer_bytes.labels(stats.transport).inc(stats.num_bytes)
        self._metrics.kv_transfer_s.labels(stats.transport).observe(stats.duration_ms / 1e3)
        self._metrics.kv_frames.labels(stats.transport).inc(stats.num_frames)

    def _show(self, snapshot: WorkerSnapshot) -> None:
        blocks, sequences = self._metrics.blocks, self._metrics.sequences
        blocks.labels("free").set(snapshot.free_blocks)
        blocks.labels("total").set(snapshot.total_blocks)
        blocks.labels("quarantined").set(snapshot.num_quarantined_blocks)
        sequences.labels("running").set(snapshot.num_running)
        sequences.labels("waiting").set(snapshot.num_waiting)
        sequences.labels("waiting_for_kv").set(snapshot.num_waiting_for_kv)


class MetricsServer:
    """`GET /metrics` on a thread of its own."""

    def __init__(self, host: str, port: int) -> None:
        """
        Args:
            port: 0 = any free one; `self.port` says which.

        Raises:
            OSError: the port is taken.
        """
        registry = CollectorRegistry()
        self.observer = MetricsObserver(WorkerMetrics(registry))
        self._server, self._thread = start_http_server(port, host, registry)
        self.port = int(self._server.server_port)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
