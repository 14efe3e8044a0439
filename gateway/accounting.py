"""What one request took, told twice: to the metrics, and in one log line when it is over."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from baton.errors import BatonError, Cause
from baton.gateway.backend import PrefillPath, RequestReport
from baton.gateway.choice import Delta
from baton.telemetry import PHASES, GatewayMetrics
from baton.tracing import Span
from baton.types import SamplingParams, TransferStats
from baton.vllm_metrics import ChoiceSpan, RequestSpan

log = logging.getLogger(__name__)

OK = "ok"
CANCELLED = "cancelled"
_REFUSED = {cause.name.lower() for cause in (Cause.OVERLOADED, Cause.NO_ROOM, Cause.DRAINING)}


def outcome_of(error: Exception) -> str:
    return (error.cause if isinstance(error, BatonError) else Cause.INTERNAL).name.lower()


@dataclass(slots=True)
class _ChoiceTimes:
    first_s: float
    last_s: float
    num_tokens: int
    finish_reason: str | None = None


class RequestRecord:
    """From arrival to the end of one request. Set `outcome` ("ok", or a cause's name in lower case)
    before `close`; what is closed without one was cancelled."""

    def __init__(
        self,
        metrics: GatewayMetrics,
        endpoint: str,
        model: str,
        sampling: SamplingParams,
        ids: str,
        span: Span | None = None,
    ) -> None:
        self.outcome = CANCELLED
        self._span = span
        self._metrics = metrics
        self._endpoint = endpoint
        self._model = model
        self._sampling = sampling
        self._ids = ids
        self._started_s = time.monotonic()
        self._opened_s: float | None = None
        self._first_byte_s: float | None = None
        self._num_prompt_tokens = 0
        self._choices: dict[int, _ChoiceTimes] = {}
        self._phases_ms: dict[str, float] = {}
        self._closed = False
        metrics.requests_open.inc()

    @property
    def traceparent(self) -> str:
        """For workers; "" when the request is not traced."""
        return "" if self._span is None else self._span.traceparent

    @property
    def has_token(self) -> bool:
        return bool(self._choices)

    def opened(self, num_prompt_tokens: int) -> None:
        """Tokenized and valid; the routing side has it from now on."""
        self._opened_s = time.monotonic()
        self._num_prompt_tokens = num_prompt_tokens
        self._metrics.prompt_tokens.inc(num_prompt_tokens)

    def token(self, delta: Delta) -> None:
        now = time.monotonic()
        times = self._choices.get(delta.index)
        if times is None:
            self._choices[delta.index] = times = _ChoiceTimes(now, now, 0)
        else:
            self._metrics.itl_s.observe(now - times.last_s)
            if self._metrics.vllm is not None:
                self._metrics.vllm.next_token(self._model, now - times.last_s)
        times.last_s = now
        times.finish_reason = delta.finish_reason
        times.num_tokens += len(delta.token_ids)
        if delta.finish_reason is not None and times.num_tokens > 1:
            self._metrics.tpot_s.observe((now - times.first_s) / (times.num_tokens - 1))

    def first_byte(self, report: RequestReport) -> None:
        """The first token is on its way to the client: TTFT, and what it was made of."""
        if self._first_byte_s is not None or self._opened_s is None:
            return
        self._first_byte_s = time.monotonic()
        ttft_ms = (self._first_byte_s - self._started_s) * 1e3
        left_ms = ttft_ms
        # The routing side measures with its own readings of the clock, so its parts are cut to fit.
        tokenize_ms = (self._opened_s - self._started_s) * 1e3
        for phase, measured_ms in zip(
            PHASES, (tokenize_ms, report.queue_ms, report.prefill_ms, ttft_ms), strict=True
        ):
            self._phases_ms[phase] = min(measured_ms, left_ms)
            left_ms -= self._phases_ms[phase]
        self._metrics.ttft_s.observe(ttft_ms / 1e3)
        if self._metrics.vllm is not None:
            self._metrics.vllm.first_token(self._model, ttft_ms / 1e3)
        for phase, part_ms in self._phases_ms.items():
            self._metrics.ttft_phase_s.observe(part_ms / 1e3, (phase,))

    def close(self, reports: Sequence[RequestReport]) -> None:
        """`reports`: one for each prompt that was opened. Idempotent."""
        if self._closed:
            return
        self._closed = True
        metrics = self._metrics
        metrics.requests_open.dec()
        metrics.requests.labels(self._endpoint, self.outcome).inc()
        metrics.e2e_s.observe(time.monotonic() - self._started_s)
        self._end_span()
        metrics.generation_tokens.inc(self._num_output_tokens)
        for report in reports:
            self._count(report)
        self._tell_vllm(reports)
        log.info("%s", self._line(reports))

    def _end_span(self) -> None:
        if self._span is not None:
            self._span.set(
                outcome=self.outcome,
                prompt_tokens=self._num_prompt_tokens,
                output_tokens=self._num_output_tokens,
                **{f"{name}_ms": ms for name, ms in self._phases_ms.items()},
            )
            self._span.end("" if self.outcome in (OK, CANCELLED) else self.outcome)

    @property
    def _num_output_tokens(self) -> int:
        return sum(times.num_tokens for times in self._choices.values())

    def _count(self, report: RequestReport) -> None:
        metrics = self._metrics
        metrics.cached_tokens.inc(report.num_cached_tokens)
        if report.path is PrefillPath.REMOTE:
            metrics.remote_prefills.inc()
        elif report.path is PrefillPath.LOCAL:
            metrics.local_prefills.inc()
        for cause in report.failures:
            metrics.retries.labels(cause.name.lower()).inc()
        for prefix in report.prefixes:
            outcome = "ok" if prefix.cause is None else prefix.cause.name.lower()
            metrics.prefix_fetches.labels(outcome).inc()
            metrics.fetched_prefix_tokens.inc(prefix.num_tokens)
        for transfer in (*report.transfers, *_moved(report)):
            metrics.kv_transfer_bytes.labels(transfer.transport).inc(transfer.num_bytes)
            metrics.kv_transfer_s.observe(transfer.duration_ms / 1e3, (transfer.transport,))
        for migration in report.migrations:
            metrics.migrations.labels(migration.cause.value, migration.result.value).inc()
            metrics.migration_bytes.labels(migration.cause.value).inc(migration.num_bytes)
        if report.num_defects:
            metrics.token_conflicts.inc(report.num_defects)
            log.error("%s: a worker gave other tokens than were committed", self._ids)

    def _tell_vllm(self, reports: Sequence[RequestReport]) -> None:
        vllm = self._metrics.vllm
        if vllm is None:
            return
        if self._opened_s is None:
            if self.outcome in _REFUSED:
                vllm.refused(self._model, self.outcome)
            return
        choices = [
            ChoiceSpan(times.first_s, times.last_s, times.num_tokens, times.finish_reason)
            for times in self._choices.values()
        ]
        span = RequestSpan(
            started_s=self._started_s,
            opened_s=self._opened_s,
            ended_s=time.monotonic(),
            queue_s=min((report.queue_ms for report in reports), default=0.0) / 1e3,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=sum(report.num_cached_tokens for report in reports),
            num_fetched_tokens=sum(p.num_tokens for report in reports for p in report.prefixes),
            sampling=self._sampling,
            choices=choices,
            is_error=self.outcome not in {OK, CANCELLED},
            transfers=[transfer for report in reports for transfer in report.transfers],
        )
        vllm.finished(self._model, span)

    def _line(self, reports: Sequence[RequestReport]) -> str:
        """Never anything that the client wrote, except its sanitised request id."""
        now = time.monotonic()
        phases = " + ".join(f"{name} {ms:.1f}" for name, ms in self._phases_ms.items())
        ttft_ms = sum(self._phases_ms.values())
        parts = [
            f"{self._endpoint} {self.outcome} {self._ids}",
            f"prompt {self._num_prompt_tokens}",
            f"cached {sum(report.num_cached_tokens for report in reports)}",
            f"output {self._num_output_tokens}",
            f"ttft {ttft_ms:.1f} ms = {phases}" if phases else "no token",
            f"total {(now - self._started_s) * 1e3:.1f} ms",
        ]
        for report in reports:
            parts.append(_route(report))
        return ", ".join(parts)


def _moved(report: RequestReport) -> list[TransferStats]:
    return [prefix.stats for prefix in report.prefixes if prefix.stats is not None]


def _route(report: RequestReport) -> str:
    workers = " → ".join(w for w in (report.prefill_worker, report.decode_worker) if w)
    moved = "".join(
        f", {t.num_bytes} B over {t.transport} in {t.duration_ms:.1f} ms" for t in report.transfers
    )
    fetched = "".join(f", prefix of {p.num_tokens} fetched" for p in report.prefixes)
    return f"{report.path} prefill {workers}, {report.num_attempts} attempts{fetched}{moved}"
