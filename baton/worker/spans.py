"""What a worker does for a request, as spans below the gateway's.

    Submit          queue → Admitted: prefill → first tokens
    Bind            bind → Bound: fetch → Imported: first_decode_step → first tokens
    ComputeLocally  queue → Admitted: prefill → first tokens

A fetch that fails ends its span with the cause; Rebind begins another.
"""

from collections import OrderedDict
from dataclasses import dataclass

from baton.engine.events import StepOutput
from baton.messages import (
    Abort,
    Admitted,
    Bind,
    Bound,
    ComputeLocally,
    Failed,
    GatewayMessage,
    Heartbeat,
    Imported,
    KvFailed,
    LegMessage,
    NoRoom,
    Rebind,
    Release,
    StepBatch,
    Submit,
    WorkerMessage,
)
from baton.tracing import Span, Tracer
from baton.types import LegId, TokenChunk

MAX_LEGS = 4096  # more than run at once; what is older was lost with its session


@dataclass(slots=True)
class _Leg:
    traceparent: str
    span: Span | None


class LegSpans:
    """An `Observer` of the runtime."""

    def __init__(self, tracer: Tracer, worker_id: str) -> None:
        self._tracer = tracer
        self._worker_id = worker_id
        self._legs: OrderedDict[LegId, _Leg] = OrderedDict()

    def stepped(self, output: StepOutput) -> None:
        pass

    def received(self, message: GatewayMessage) -> None:
        match message:
            case Submit(leg, request) | ComputeLocally(leg, request) if leg not in self._legs:
                self._open(leg, request.traceparent, "queue")
            case Bind(leg, request):
                self._open(leg, request.traceparent, "bind")
            case Rebind(leg):
                self._next(leg, "fetch")
            case ComputeLocally(leg):
                self._next(leg, "prefill")
            case Abort(leg, None) | Release(leg):
                self._close(leg)
            case Abort() | Heartbeat():
                pass

    def sent(self, message: WorkerMessage) -> None:
        if isinstance(message, StepBatch) and self._legs:
            for item in message.messages:
                self._told(item)

    def _told(self, message: LegMessage) -> None:
        match message:
            case Admitted(leg, num_cached_tokens):
                self._next(leg, "prefill", cached_tokens=num_cached_tokens)
            case Bound(leg, num_cached_tokens):
                self._next(leg, "fetch", cached_tokens=num_cached_tokens)
            case Imported(leg, stats):
                span = self._span(leg)
                if span is not None:
                    span.set(transport=stats.transport, bytes=stats.num_bytes)
                self._next(leg, "first_decode_step")
            case KvFailed(leg, valid_tokens, cause):
                span = self._span(leg)
                if span is not None:
                    span.set(valid_tokens=valid_tokens)
                    span.end(cause.name.lower())
                    self._legs[leg].span = None
            case TokenChunk(leg):
                self._close(leg)
            case Failed(leg, cause):
                self._close(leg, cause.name.lower())
            case NoRoom(leg):
                self._close(leg, "no_room")
            case _:
                pass

    def _open(self, leg: LegId, traceparent: str, name: str) -> None:
        if traceparent:
            self._legs[leg] = _Leg(traceparent, None)
            self._next(leg, name)
            if len(self._legs) > MAX_LEGS:
                self._close(next(iter(self._legs)), "lost")

    def _span(self, leg: LegId) -> Span | None:
        record = self._legs.get(leg)
        return None if record is None else record.span

    def _next(self, leg: LegId, name: str, **attributes: int) -> None:
        record = self._legs.get(leg)
        if record is None:
            return
        if record.span is not None:
            record.span.end()
        record.span = self._tracer.begin(
            name, record.traceparent, worker=self._worker_id, attempt=leg.attempt, **attributes
        )

    def _close(self, leg: LegId, failure: str = "") -> None:
        record = self._legs.pop(leg, None)
        if record is not None and record.span is not None:
            record.span.end(failure)
