"""A request's span at the gateway: below the client's, above the workers'."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from baton.gateway.app import create_app
from baton.gateway.context import Context
from baton.tracing import Tracer
from tests.gateway.fakes import FakeBackend

COMPLETIONS = "/v1/completions"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def context(context: Context, exporter: InMemorySpanExporter) -> Iterator[Context]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = Tracer(provider)
    yield replace(context, tracer=tracer)
    tracer.close()


@pytest.mark.parametrize(
    ("headers", "is_below"), [({"traceparent": PARENT}, True), ({"traceparent": "x"}, False)]
)
async def test_a_request_is_a_span(
    context: Context,
    backend: FakeBackend,
    exporter: InMemorySpanExporter,
    headers: dict[str, str],
    is_below: bool,
) -> None:
    transport = httpx.ASGITransport(create_app(context))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        body: dict[str, Any] = {"prompt": "secret words"}
        assert (await client.post(COMPLETIONS, json=body, headers=headers)).status_code == 200
    (span,) = exporter.get_finished_spans()
    assert span.name == "request"
    trace_id = format(span.context.trace_id, "032x")
    assert (trace_id == PARENT.split("-")[1]) == is_below
    span_id = format(span.context.span_id, "016x")
    assert backend.request.traceparent.split("-")[:3] == ["00", trace_id, span_id]
    assert span.attributes["baton.outcome"] == "ok"
    assert span.attributes["baton.output_tokens"] > 0
    assert "secret" not in span.to_json()
