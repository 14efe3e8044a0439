"""The series under which vLLM's dashboards and Kubernetes inference routers look for a server.

Only those with a meaning here, with vLLM's names, labels and buckets; `engine` is always "0",
because the gateway speaks for the whole fleet. Where vLLM counts requests, a choice counts as one,
as it does there.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge

from baton.histogram import LoopHistogram
from baton.totals import STEP_TOKENS, WorkerTotals
from baton.types import SamplingParams, TransferStats, WorkerSnapshot

_LABELS = ("model_name", "engine")
_TTFT_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0
)  # fmt: skip
_TPOT_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0
)  # fmt: skip
_REQUEST_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0
)  # fmt: skip
_TRANSFER_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 5.0)
_TRANSFER_BYTES = tuple(float(2**power) for power in range(21, 31))
_TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))


@dataclass(frozen=True, slots=True)
class ChoiceSpan:
    """Seconds of one choice, on one clock, and what it gave."""

    first_s: float
    last_s: float
    num_tokens: int
    finish_reason: str | None  # None: it was cut off


@dataclass(frozen=True, slots=True)
class RequestSpan:
    """One finished request, however it ended. Times in seconds on one clock."""

    started_s: float
    opened_s: float
    ended_s: float
    queue_s: float
    num_prompt_tokens: int
    num_cached_tokens: int  # not computed: fetched ones among them
    num_fetched_tokens: int  # from the prefix cache of another worker
    sampling: SamplingParams
    choices: Sequence[ChoiceSpan]
    is_error: bool  # it failed; choices that were cut off without one were aborted
    transfers: Sequence[TransferStats]


class VllmMetrics:
    """Declares the series on a registry; told what the gateway's own metrics are told."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._shown = WorkerTotals()
        self._declare_state()
        self._declare_counters()
        self._declare_times()
        self._declare_sizes()

    # ── told ─────────────────────────────────────────────────────────────────────────────────────

    def first_token(self, model: str, ttft_s: float) -> None:
        self._ttft.observe(ttft_s, (model, "0"))

    def next_token(self, model: str, itl_s: float) -> None:
        self._itl.observe(itl_s, (model, "0"))

    def finished(self, model: str, span: RequestSpan) -> None:
        labels = (model, "0")
        self._count_prompt(labels, span)
        self._params_n.observe(span.sampling.n, labels)
        if span.sampling.max_tokens is not None:
            self._params_max_tokens.observe(span.sampling.max_tokens, labels)
        self._e2e.observe(span.ended_s - span.started_s, labels)
        self._observe_choices(labels, span)
        for transfer in span.transfers:
            self._transfer_s.observe(transfer.duration_ms / 1e3, labels)
            self._transfer_bytes.observe(transfer.num_bytes, labels)

    def _count_prompt(self, labels: tuple[str, str], span: RequestSpan) -> None:
        """Each token once, by where it came from first. That its KV was then handed over to another
        worker is no source."""
        num_cached = min(span.num_cached_tokens, span.num_prompt_tokens)
        num_fetched = min(span.num_fetched_tokens, num_cached)
        num_hit, num_computed = num_cached - num_fetched, span.num_prompt_tokens - num_cached
        self._prompt_tokens.labels(*labels).inc(span.num_prompt_tokens)
        for source, num_tokens in {
            "local_compute": num_computed,
            "local_cache_hit": num_hit,
            "external_kv_transfer": num_fetched,
        }.items():
            self._prompt_tokens_by_source.labels(*labels, source).inc(num_tokens)
        self._prompt_tokens_cached.labels(*labels).inc(num_cached)
        for source, num_tokens in {"device": num_hit, "p2p": num_fetched}.items():
            self._cached_by_source.labels(*labels, source).inc(num_tokens)
        self._prefix_queries.labels(*labels).inc(span.num_prompt_tokens)
        self._prefix_hits.labels(*labels).inc(num_hit)
        self._external_queries.labels(*labels).inc(span.num_prompt_tokens - num_hit)
        self._external_hits.labels(*labels).inc(num_fetched)
        self._request_prompt_tokens.observe(span.num_prompt_tokens, labels)
        self._computed_tokens.observe(num_computed, labels)

    def _observe_choices(self, labels: tuple[str, str], span: RequestSpan) -> None:
        for choice in span.choices:
            reason = choice.finish_reason or ("error" if span.is_error else "abort")
            self._success.labels(*labels, reason).inc()
            self._generation_tokens.labels(*labels).inc(choice.num_tokens)
            self._request_generation_tokens.observe(choice.num_tokens, labels)
            if choice.num_tokens > 1:
                tpot_s = (choice.last_s - choice.first_s) / (choice.num_tokens - 1)
                self._tpot.observe(tpot_s, labels)
        if not span.choices:
            self._success.labels(*labels, "error" if span.is_error else "abort").inc()
            return
        first_s = min(choice.first_s for choice in span.choices)
        last_s = max(choice.last_s for choice in span.choices)
        began_s = min(span.opened_s + span.queue_s, first_s)
        longest = max(choice.num_tokens for choice in span.choices)
        self._longest_generation.observe(longest, labels)
        self._queue.observe(began_s - span.opened_s, labels)
        self._prefill.observe(first_s - began_s, labels)
        self._decode.observe(last_s - first_s, labels)
        self._inference.observe(last_s - began_s, labels)

    def pooled(self, model: str, num_tokens: int, took_s: float, reason: str) -> None:
        """A request for embeddings or scores has ended; `reason` is a finished_reason."""
        labels = (model, "0")
        self._prompt_tokens.labels(*labels).inc(num_tokens)
        self._prompt_tokens_by_source.labels(*labels, "local_compute").inc(num_tokens)
        self._request_prompt_tokens.observe(num_tokens, labels)
        self._success.labels(*labels, reason).inc()
        self._e2e.observe(took_s, labels)

    def refused(self, model: str, reason: str) -> None:
        """A request was turned away for lack of capacity; `reason` is a cause in lower case."""
        self._rejections.labels(model, reason).inc()

    def show(
        self,
        model: str,
        block_size: int,
        snapshots: Iterable[WorkerSnapshot],
        totals: WorkerTotals,
        num_parked: int,
    ) -> None:
        """The fleet's state, when it is scraped; `num_parked` requests wait at the gateway."""
        loads, labels = list(snapshots), (model, "0")
        total = sum(load.total_blocks for load in loads)
        free = sum(load.free_blocks for load in loads)
        waiting_for_kv = sum(load.num_waiting_for_kv for load in loads)
        waiting = num_parked + sum(load.num_waiting for load in loads)
        self._running.labels(*labels).set(sum(load.num_running for load in loads))
        self._waiting.labels(*labels).set(waiting + waiting_for_kv)
        self._waiting_by_reason.labels(*labels, "capacity").set(waiting)
        self._waiting_by_reason.labels(*labels, "deferred").set(waiting_for_kv)
        self._kv_usage.labels(*labels).set(1 - free / total if total else 0.0)
        self._kv_fetches.labels(*labels, "in_progress").set(waiting_for_kv)
        self._cache_info.clear()
        self._cache_info.labels("0", str(block_size), str(total), "True").set(1)
        self._show_totals(labels, totals)

    def _show_totals(self, labels: tuple[str, str], totals: WorkerTotals) -> None:
        new, self._shown = totals - self._shown, totals
        self._preemptions.labels(*labels).inc(new.num_preemptions)
        self._failed_transfers.labels(*labels).inc(new.num_failed_fetches)
        self._expired.labels(*labels).inc(new.num_expired_leases)
        self._step_tokens.show(totals.steps_by_tokens, totals.num_step_tokens, labels)

    # ── declared ─────────────────────────────────────────────────────────────────────────────────

    def _declare_state(self) -> None:
        self._running = self._gauge("num_requests_running", "Sequences in the engines' batches.")
        self._waiting = self._gauge("num_requests_waiting", "Sequences that wait.")
        self._waiting_by_reason = self._gauge(
            "num_requests_waiting_by_reason",
            "Sequences that wait: for room, or for remote KV.",
            "reason",
        )
        self._kv_usage = self._gauge("kv_cache_usage_perc", "KV blocks in use; 1 = all.")
        self._kv_fetches = self._gauge(
            "num_requests_kv_fetch_by_stage", "Sequences that wait for remote KV.", "stage"
        )
        self._cache_info = Gauge(
            "vllm:cache_config_info",
            "The KV cache of the fleet.",
            ("engine", "block_size", "num_gpu_blocks", "enable_prefix_caching"),
            registry=self._registry,
        )

    def _declare_counters(self) -> None:
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens.")
        self._prompt_tokens_by_source = self._counter(
            "prompt_tokens_by_source", "Prompt tokens by where their KV came from.", "source"
        )
        self._prompt_tokens_cached = self._counter("prompt_tokens_cached", "Cached prompt tokens.")
        self._cached_by_source = self._counter(
            "prompt_tokens_cached_by_source", "Cached tokens by whose cache it was.", "source"
        )
        self._generation_tokens = self._counter("generation_tokens", "Output tokens.")
        self._prefix_queries = self._counter("prefix_cache_queries", "Tokens looked up.")
        self._prefix_hits = self._counter("prefix_cache_hits", "Of these, tokens found.")
        self._external_queries = self._counter(
            "external_prefix_cache_queries", "Tokens looked up in the caches of other workers."
        )
        self._external_hits = self._counter(
            "external_prefix_cache_hits", "Of these, tokens fetched from there."
        )
        self._preemptions = self._counter("num_preemptions", "Preempted sequences.")
        self._failed_transfers = self._counter(
            "nixl_num_failed_transfers", "Transfers of KV that ended early."
        )
        self._expired = self._counter("nixl_num_kv_expired_reqs", "KV leases that expired.")
        self._success = self._counter("request_success", "Finished requests.", "finished_reason")
        self._rejections = Counter(
            "vllm:admission_rejections",
            "Requests refused for lack of capacity.",
            ("model_name", "reason"),
            registry=self._registry,
        )

    def _declare_times(self) -> None:
        self._ttft = self._histogram("time_to_first_token_seconds", "TTFT.", _TTFT_S)
        self._itl = self._histogram("inter_token_latency_seconds", "ITL.", _TPOT_S)
        self._tpot = self._histogram(
            "request_time_per_output_token_seconds", "TPOT of a request.", _TPOT_S
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "Whole requests.", _REQUEST_S)
        self._queue = self._histogram("request_queue_time_seconds", "Waiting.", _REQUEST_S)
        self._inference = self._histogram(
            "request_inference_time_seconds", "Prefill and decode.", _REQUEST_S
        )
        self._prefill = self._histogram("request_prefill_time_seconds", "Prefill.", _REQUEST_S)
        self._decode = self._histogram("request_decode_time_seconds", "Decode.", _REQUEST_S)
        self._transfer_s = self._histogram(
            "nixl_xfer_time_seconds", "Transfers of KV between workers.", _TRANSFER_S
        )

    def _declare_sizes(self) -> None:
        self._transfer_bytes = self._histogram(
            "nixl_bytes_transferred", "Bytes of a transfer of KV.", _TRANSFER_BYTES
        )
        self._request_prompt_tokens = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a request.", _TOKENS
        )
        self._request_generation_tokens = self._histogram(
            "request_generation_tokens", "Output tokens of a request.", _TOKENS
        )
        self._longest_generation = self._histogram(
            "request_max_num_generation_tokens", "Output tokens of the longest choice.", _TOKENS
        )
        self._step_tokens = self._histogram(
            "iteration_tokens_total", "Tokens computed in one step of one worker.", STEP_TOKENS
        )
        self._computed_tokens = self._histogram(
            "request_prefill_kv_computed_tokens", "Prompt tokens that were computed.", _TOKENS
        )
        self._params_max_tokens = self._histogram(
            "request_params_max_tokens", "max_tokens of a request.", _TOKENS
        )
        self._params_n = self._histogram(
            "request_params_n", "n of a request.", (1.0, 2.0, 5.0, 10.0, 20.0)
        )

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"vllm:{name}", text, (*_LABELS, *labels), registry=self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"vllm:{name}", text, (*_LABELS, *labels), registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> LoopHistogram:
        return LoopHistogram(
            f"vllm:{name}", text, _LABELS, buckets=buckets, registry=self._registry
        )
