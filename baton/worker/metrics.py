"""A worker's Prometheus metrics: fed from what it does, served over HTTP."""

from prometheus_client import CollectorRegistry, start_http_server

from baton.engine.events import LegFailed, LegPreempted, StepOutput
from baton.messages import Admitted, Imported, StepBatch, WorkerMessage
from baton.telemetry import WorkerMetrics
from baton.types import WorkerSnapshot


class MetricsObserver:
    """Feeds `WorkerMetrics`."""

    def __init__(self, metrics: WorkerMetrics) -> None:
        self._metrics = metrics

    def stepped(self, output: StepOutput) -> None:
        metrics = self._metrics
        if output.timing is not None:
            metrics.step_s.observe(output.timing.duration_ms / 1e3)
            metrics.prefill_tokens.inc(output.timing.num_prefill_tokens)
        for event in output.events:
            if isinstance(event, LegPreempted):
                metrics.preemptions.inc()
            elif isinstance(event, LegFailed):
                metrics.failures.labels(event.cause.name.lower()).inc()
        self._show(output.snapshot)

    def sent(self, message: WorkerMessage) -> None:
        if not isinstance(message, StepBatch):
            return
        metrics = self._metrics
        metrics.leases.set(message.snapshot.num_leases)
        for item in message.messages:
            if isinstance(item, Admitted):
                metrics.prefills.labels("local" if item.ticket is None else "leased").inc()
            elif isinstance(item, Imported):
                stats = item.stats
                metrics.prefills.labels("remote").inc()
                metrics.kv_transfer_bytes.labels(stats.transport, "in").inc(stats.num_bytes)
                metrics.kv_transfer_s.labels(stats.transport).observe(stats.duration_ms / 1e3)

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
