"""A request's spans over the gateway's context and two workers, and what is not in them."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from baton.errors import BatonError, Cause
from baton.kvtransfer.base import FetchOpen
from baton.kvtransfer.effects import AttachGranted
from baton.kvtransfer.fetch_wire import fetch_open_from_pb, fetch_open_to_pb
from baton.kvtransfer.progress import KVReady
from baton.messages import (
    Abort,
    Admitted,
    Bind,
    Bound,
    Failed,
    Imported,
    KvFailed,
    Rebind,
    StepBatch,
    Submit,
)
from baton.tracing import Tracer, checked_traceparent, make_tracer
from baton.types import (
    LegId,
    Request,
    Role,
    SamplingParams,
    TokenChunk,
    TransferStats,
    WorkerSnapshot,
)
from baton.worker import spans as spans_module
from baton.worker.exports import ExportDesk
from baton.worker.spans import LegSpans
from tests.kvtransfer.support import make_fetch

SNAPSHOT = WorkerSnapshot(Role.BOTH)
P_LEG, D_LEG = LegId("r", 1), LegId("r", 2)
TICKET: Any = None


class Traced:
    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = Tracer(provider)
        self.root = self.tracer.begin("request", "")
        self.request = Request(
            "r", (11, 22, 33), SamplingParams(seed=1), traceparent=self.root.traceparent
        )

    def finished(self) -> list[Any]:
        return list(self._exporter.get_finished_spans())

    def names(self) -> list[str]:
        return [span.name for span in self.finished()]


@pytest.fixture
def traced() -> Iterator[Traced]:
    made = Traced()
    yield made
    made.tracer.close()


def say(spans: LegSpans, *messages: Any) -> None:
    spans.sent(StepBatch(messages, SNAPSHOT))


def test_a_hand_over_is_one_trace(traced: Traced) -> None:
    p, d = LegSpans(traced.tracer, "p0"), LegSpans(traced.tracer, "d0")
    p.received(Submit(P_LEG, traced.request))
    say(p, Admitted(P_LEG, 1, TICKET))
    d.received(Bind(D_LEG, traced.request, TICKET, (), "h"))
    say(d, Bound(D_LEG, 2))
    say(p, TokenChunk(P_LEG, 0, 0, (5,)))
    say(d, Imported(D_LEG, TransferStats("ucx", num_bytes=77)))
    say(d, TokenChunk(D_LEG, 0, 1, (6,)))
    say(d, TokenChunk(D_LEG, 0, 2, (7,)))
    traced.root.end()
    assert traced.names() == ["queue", "bind", "prefill", "fetch", "first_decode_step", "request"]
    *phases, root = traced.finished()
    for span in phases:
        assert span.parent.span_id == root.context.span_id
        assert span.context.trace_id == root.context.trace_id
        assert span.attributes["baton.worker"] in ("p0", "d0")
    fetch = phases[3]
    assert (fetch.attributes["baton.transport"], fetch.attributes["baton.bytes"]) == ("ucx", 77)
    assert not p._legs
    assert not d._legs
    text = "".join(span.to_json() for span in traced.finished())
    assert not any(f"{token_id}," in text for token_id in (11, 22, 33)), "prompts are in no span"


def test_a_failed_fetch_says_why_and_another_begins(traced: Traced) -> None:
    d = LegSpans(traced.tracer, "d0")
    d.received(Bind(D_LEG, traced.request, TICKET, (), "h"))
    say(d, Bound(D_LEG, 0), KvFailed(D_LEG, 1, Cause.FRAME_CORRUPT, "x"))
    d.received(Rebind(D_LEG, TICKET, (), "h"))
    say(d, Failed(D_LEG, Cause.STEP_FAILED, "x"))
    status = [(span.name, span.status.description) for span in traced.finished()]
    assert status == [("bind", None), ("fetch", "frame_corrupt"), ("fetch", "step_failed")]
    assert not d._legs


def test_an_aborted_leg_leaves_nothing_open(traced: Traced) -> None:
    p = LegSpans(traced.tracer, "p0")
    p.received(Submit(P_LEG, traced.request))
    p.received(Abort(P_LEG, 0))
    assert p._legs
    p.received(Abort(P_LEG))
    assert not p._legs
    assert traced.names() == ["queue"]


def test_legs_whose_end_nobody_told_are_bounded(
    traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spans_module, "MAX_LEGS", 3)
    p = LegSpans(traced.tracer, "p0")
    for attempt in range(10):
        p.received(Submit(LegId("r", attempt), traced.request))
    assert len(p._legs) == 3


def test_untraced_requests_cost_nothing(traced: Traced) -> None:
    p = LegSpans(traced.tracer, "p0")
    p.received(Submit(P_LEG, Request("r", (1,), SamplingParams(seed=1))))
    assert not p._legs
    assert make_tracer(None, "x") is None


@pytest.mark.parametrize(
    ("header", "kept"),
    [
        ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", True),
        ("00-0AF7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", False),
        ("nonsense", False),
        ("", False),
        (None, False),
    ],
)
def test_a_clients_context_is_taken_if_it_is_one(header: str | None, kept: bool) -> None:
    assert checked_traceparent(header) == (header if kept else "")


def test_a_client_may_be_the_parent(traced: Traced) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    span = traced.tracer.begin("request", parent)
    assert span.traceparent.split("-")[1] == parent.split("-")[1]
    assert span.traceparent != parent
    span.end()


async def test_the_producer_of_a_fetch_is_in_the_trace(traced: Traced) -> None:
    desk = ExportDesk()
    desk.tracer = traced.tracer
    desk.connect(Granting(desk))
    for traceparent in (traced.root.traceparent, ""):
        feed = await desk.attach(replace(make_fetch(8), traceparent=traceparent))
        desk.closed(feed.epoch)
    (span,) = traced.finished()
    assert span.name == "serve_fetch"
    assert format(span.parent.span_id, "016x") in traced.root.traceparent
    assert not desk._spans


def test_the_context_goes_along_with_a_fetch() -> None:
    fetch = replace(make_fetch(8), traceparent="00-" + "a" * 32 + "-" + "b" * 16 + "-01")
    message = fetch_open_to_pb(fetch, "grpc", b"")
    assert fetch_open_from_pb(message)[0].traceparent == fetch.traceparent
    message.traceparent = "x" * 65
    with pytest.raises(BatonError, match="traceparent"):
        fetch_open_from_pb(message)


class Granting:
    """Everybody may read."""

    def __init__(self, desk: ExportDesk) -> None:
        self._desk = desk
        self.attachment_done = self.cancel_attach = lambda *_: None

    def attach(self, key: int, fetch: FetchOpen) -> None:
        self._desk.granted(AttachGranted(key, 10 + key, P_LEG, (), 8, KVReady(8), None))

    def attachment_progress(self, epoch: int, num_sent_tokens: int) -> None: ...

    def attachment_closed(self, epoch: int) -> None: ...
