"""Logs and metrics: every metric object of Baton is declared here, once, on a registry that is
passed in.

All series carry Baton's own prefix `baton_`. Times are seconds, sizes bytes. Label sets are closed
(roles, transports, outcomes), never ids, so that cardinality is bounded.
"""

import json
import logging
import sys
import time
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from baton.config import LogSettings

_LATENCY_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0
)  # fmt: skip
_LENGTHS = tuple(float(2**i) for i in range(18))

PHASES = ("tokenize", "queue", "prefill", "first_byte")


class GatewayMetrics:
    """What the gateway sees, which is every request: fleet totals included."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.requests = Counter(
            "baton_requests", "Finished requests.", ["endpoint", "outcome"], registry=registry
        )
        self.requests_open = Gauge(
            "baton_requests_open", "Requests in progress.", registry=registry
        )
        self.ttft_s = Histogram(
            "baton_time_to_first_token_seconds",
            "From the request's arrival to its first token.",
            buckets=_LATENCY_S,
            registry=registry,
        )
        self.ttft_phase_s = Histogram(
            "baton_ttft_phase_seconds",
            "Parts of TTFT; over all phases they sum to it.",
            ["phase"],
            buckets=_LATENCY_S,
            registry=registry,
        )
        self.itl_s = Histogram(
            "baton_inter_token_latency_seconds",
            "Between two consecutive chunks of one choice.",
            buckets=_LATENCY_S,
            registry=registry,
        )
        self.tpot_s = Histogram(
            "baton_time_per_output_token_seconds",
            "(last token - first token) / (output tokens - 1).",
            buckets=_LATENCY_S,
            registry=registry,
        )
        self.e2e_s = Histogram(
            "baton_e2e_request_latency_seconds",
            "From arrival to the end of the answer.",
            buckets=_LATENCY_S,
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "baton_prompt_tokens", "Prompt tokens of accepted requests.", registry=registry
        )
        self.cached_tokens = Counter(
            "baton_cached_prompt_tokens", "Of these, from a prefix cache.", registry=registry
        )
        self.generation_tokens = Counter(
            "baton_generation_tokens", "Output tokens sent to clients.", registry=registry
        )
        self.remote_prefills = Counter(
            "baton_remote_prefills",
            "Requests decoded from KV that another process computed.",
            registry=registry,
        )
        self.local_prefills = Counter(
            "baton_local_prefills", "Requests prefilled where they decode.", registry=registry
        )
        self.kv_transfer_bytes = Counter(
            "baton_kv_transfer_bytes", "KV moved between workers.", ["transport"], registry=registry
        )
        self.kv_transfer_s = Histogram(
            "baton_kv_transfer_seconds",
            "Duration of one fetch.",
            ["transport"],
            buckets=_LATENCY_S,
            registry=registry,
        )
        self.retries = Counter(
            "baton_request_retries",
            "Legs started again after a failure.",
            ["cause"],
            registry=registry,
        )
        self.token_conflicts = Counter(
            "baton_token_conflicts",
            "A worker sent another id for a committed index. Always a defect.",
            registry=registry,
        )
        self.workers = Gauge(
            "baton_workers", "Workers with a live session.", ["role"], registry=registry
        )
        self.fleet_blocks = Gauge(
            "baton_fleet_kv_blocks", "KV blocks of all workers.", ["state"], registry=registry
        )
        self.fleet_leases = Gauge(
            "baton_fleet_open_leases", "Open KV leases of all workers.", registry=registry
        )
        self.fleet_sequences = Gauge(
            "baton_fleet_sequences", "Sequences of all workers.", ["state"], registry=registry
        )


class WorkerMetrics:
    """What one worker sees."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.blocks = Gauge("baton_kv_blocks", "KV blocks.", ["state"], registry=registry)
        self.sequences = Gauge("baton_sequences", "Sequences.", ["state"], registry=registry)
        self.leases = Gauge("baton_open_leases", "Open KV leases.", registry=registry)
        self.step_s = Histogram(
            "baton_step_seconds",
            "Duration of an engine step.",
            buckets=_LATENCY_S,
            registry=registry,
        )
        self.step_tokens = Histogram(
            "baton_step_tokens", "Tokens computed in a step.", buckets=_LENGTHS, registry=registry
        )
        self.prefill_tokens = Counter(
            "baton_prefill_tokens", "Tokens prefilled.", registry=registry
        )
        self.preemptions = Counter("baton_preemptions", "Preempted legs.", registry=registry)
        self.prefills = Counter(
            "baton_prefills", "Legs by where their KV came from.", ["kind"], registry=registry
        )
        self.kv_transfer_bytes = Counter(
            "baton_kv_transfer_bytes",
            "KV moved.",
            ["transport", "direction"],
            registry=registry,
        )
        self.kv_transfer_s = Histogram(
            "baton_kv_transfer_seconds",
            "Duration of one fetch.",
            ["transport"],
            buckets=_LATENCY_S,
            registry=registry,
        )
        self.failures = Counter(
            "baton_leg_failures", "Legs that failed here.", ["cause"], registry=registry
        )


@dataclass(slots=True)
class Stopwatch:
    """Splits one duration into named phases that sum to the whole."""

    started_s: float = field(default_factory=time.monotonic)
    last_s: float = 0.0
    phases_ms: dict[str, float] = field(default_factory=dict)

    def lap(self, phase: str) -> None:
        """Everything since the previous lap (or the start) was `phase`."""
        now = time.monotonic()
        begin = self.last_s or self.started_s
        self.phases_ms[phase] = self.phases_ms.get(phase, 0.0) + (now - begin) * 1e3
        self.last_s = now


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
