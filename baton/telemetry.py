"""Logs and metrics: every metric object of Baton's own is declared here, once, on a registry that
is passed in; vLLM's names for them are in `baton.vllm_metrics`.

All series carry Baton's own prefix `baton_`. Times are seconds, sizes bytes. Label sets are closed
(roles, transports, outcomes), never ids, so that cardinality is bounded.
"""

import json
import logging
import sys

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from baton.histogram import LoopHistogram
from baton.settings import LogSettings
from baton.vllm_metrics import VllmMetrics

_LATENCY_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0
)  # fmt: skip

PHASES = ("tokenize", "queue", "prefill", "first_byte")


class _Metrics:
    """Makes metric objects on one registry, all with Baton's prefix."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"baton_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"baton_{name}", text, labels, registry=self.registry)


class GatewayMetrics(_Metrics):
    """What the gateway sees, which is every request: fleet totals included."""

    def __init__(self, registry: CollectorRegistry, vllm: VllmMetrics | None = None) -> None:
        """
        Args:
            vllm: told the same under vLLM's names.
        """
        super().__init__(registry)
        self.vllm = vllm
        self.requests = self._counter("requests", "Finished requests.", "endpoint", "outcome")
        self.requests_open = self._gauge("requests_open", "Requests in progress.")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of accepted requests.")
        self.cached_tokens = self._counter("cached_prompt_tokens", "Of these, from a prefix cache.")
        self.generation_tokens = self._counter(
            "generation_tokens", "Output tokens sent to clients."
        )
        self._declare_latencies()
        self._declare_hand_off()
        self._declare_fleet()

    def _seconds(self, name: str, text: str, *labels: str) -> LoopHistogram:
        return LoopHistogram(
            f"baton_{name}_seconds", text, labels, buckets=_LATENCY_S, registry=self.registry
        )

    def _declare_latencies(self) -> None:
        self.ttft_s = self._seconds("time_to_first_token", "From arrival to the first token.")
        self.ttft_phase_s = self._seconds("ttft_phase", "Parts of TTFT; they sum to it.", "phase")
        self.itl_s = self._seconds("inter_token_latency", "Between two chunks of one choice.")
        self.tpot_s = self._seconds(
            "time_per_output_token", "(last token - first token) / (output tokens - 1)."
        )
        self.e2e_s = self._seconds("e2e_request_latency", "From arrival to the end of the answer.")

    def _declare_hand_off(self) -> None:
        self.remote_prefills = self._counter(
            "remote_prefills", "Requests decoded from KV that another process computed."
        )
        self.local_prefills = self._counter(
            "local_prefills", "Requests prefilled where they decode."
        )
        self.kv_transfer_bytes = self._counter(
            "kv_transfer_bytes", "KV moved between workers.", "transport"
        )
        self.kv_transfer_s = self._seconds("kv_transfer", "Duration of one fetch.", "transport")
        self.prefix_fetches = self._counter(
            "prefix_fetches", "Prefixes fetched by hash, by how it ended.", "outcome"
        )
        self.fetched_prefix_tokens = self._counter(
            "fetched_prefix_tokens", "Prompt tokens fetched by hash instead of computed."
        )
        self.migrations = self._counter(
            "migrations", "Running requests that changed their decode worker.", "cause", "result"
        )
        self.migration_bytes = self._counter(
            "migration_bytes", "KV fetched from the worker that a request left.", "cause"
        )
        self.retries = self._counter(
            "request_retries",
            "Legs and fetches that failed; the request went on if it could.",
            "cause",
        )
        self.token_conflicts = self._counter(
            "token_conflicts", "Chunks with another id at a committed index. Always a defect."
        )

    def _declare_fleet(self) -> None:
        self.workers = self._gauge("workers", "Workers with a live session.", "role")
        self.conflicts = self._gauge(
            "pair_conflicts", "Pairs of workers that never hand over to each other.", "cause"
        )
        self.redis_reachable = self._gauge("redis_reachable", "1 if Redis answers this gateway.")
        self.disaggregation = self._gauge(
            "disaggregation", "1 for what lately served requests say of hand-overs.", "state"
        )
        self.fleet_blocks = self._gauge("fleet_kv_blocks", "KV blocks of all workers.", "state")
        self.fleet_leases = self._gauge("fleet_open_leases", "KV leases of all workers.")
        self.fleet_sequences = self._gauge("fleet_sequences", "Sequences of all workers.", "state")


class WorkerMetrics(_Metrics):
    """What one worker sees."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self.blocks = self._gauge("kv_blocks", "KV blocks.", "state")
        self.sequences = self._gauge("sequences", "Sequences.", "state")
        self.leases = self._gauge("open_leases", "Open KV leases.")
        self.step_s = self._seconds("step", "Duration of an engine step.")
        self.prefill_tokens = self._counter("prefill_tokens", "Tokens prefilled.")
        self.preemptions = self._counter("preemptions", "Preempted legs.")
        self.prefills = self._counter("prefills", "Legs by where their KV came from.", "kind")
        self.kv_transfer_bytes = self._counter("kv_transfer_bytes", "KV fetched.", "transport")
        self.kv_transfer_s = self._seconds("kv_transfer", "Duration of one fetch.", "transport")
        self.prefix_fetches = self._counter(
            "prefix_fetches", "Prefixes fetched by hash, by how it ended.", "outcome"
        )
        self.fetched_prefix_tokens = self._counter(
            "fetched_prefix_tokens", "Prompt tokens fetched by hash instead of computed."
        )
        self.failures = self._counter("leg_failures", "Legs that failed here.", "cause")
        self._declare_exchange()

    def _seconds(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(
            f"baton_{name}_seconds", text, labels, registry=self.registry, buckets=_LATENCY_S
        )

    def _declare_exchange(self) -> None:
        self.lease_events = self._counter("kv_lease_events", "What became of KV leases.", "event")
        self.attach_refusals = self._counter(
            "kv_attach_refusals", "Fetches refused by this producer.", "cause"
        )
        self.fetch_failures = self._counter(
            "kv_fetch_failures",
            "Fetches by this consumer that ended early; frame_* are damaged or misplaced frames.",
            "cause",
        )
        self.kv_frames = self._counter("kv_frames", "Verified frames.", "transport")
        self.attachments = self._gauge("kv_attachments", "Consumers that read KV here now.")
        self.fetches = self._gauge("kv_fetches", "Fetches of this consumer.", "state")
        self.staging = self._gauge("kv_staging_bytes", "KV on its way, by direction.", "side")


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def setup_logging(settings: LogSettings, process: str) -> None:
    """Send this process's logs to stderr; `process` ("gateway", "prefill-0") leads every line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        _JsonFormatter()
        if settings.log_format == "json"
        else logging.Formatter(f"%(asctime)s %(levelname).1s {process} %(message)s", "%H:%M:%S")
    )
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    # httpx and uvicorn's access log repeat, per request, what our own line says better.
    for noisy in ("httpx", "uvicorn.access"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
