"""Spans of a request, across processes: OpenTelemetry where the `otel` extra is installed and
`--otlp-traces-endpoint` says where they go, and nothing at all otherwise.

A context travels as W3C traceparent: from the client's HTTP header to the gateway's span, in
`Request.traceparent` to workers, in `FetchOpen.traceparent` to the producer of a fetch. Attributes
are numbers, names of workers, transports and causes; never text or token ids.
"""

import re
from typing import Any

Attribute = str | int | float | bool
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def checked_traceparent(text: str | None) -> str:
    """What a stranger sent, or "" if it is not one: a bad header is as good as none."""
    return text if text and _TRACEPARENT.fullmatch(text) else ""


class Span:
    """An open span; `end` it once."""

    def __init__(self, span: Any, traceparent: str) -> None:
        self._span = span
        self.traceparent = traceparent

    def set(self, **attributes: Attribute) -> None:
        self._span.set_attributes({f"baton.{name}": value for name, value in attributes.items()})

    def end(self, failure: str = "") -> None:
        """failure: name of the cause it ended with."""
        if failure:
            from opentelemetry.trace import Status, StatusCode

            self._span.set_status(Status(StatusCode.ERROR, failure))
        self._span.end()


class Tracer:
    """Begins spans; `close` sends what is buffered."""

    def __init__(self, provider: Any) -> None:
        """
        Args:
            provider: an `opentelemetry.sdk.trace.TracerProvider`.
        """
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("baton")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, name: str, traceparent: str = "", **attributes: Attribute) -> Span:
        """A span that begins now, below `traceparent` or as the first of its trace."""
        from opentelemetry import trace
        from opentelemetry.context import Context

        parent = self._propagator.extract({"traceparent": traceparent}, Context())
        span = self._tracer.start_span(name, context=parent)
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, trace.set_span_in_context(span, Context()))
        made = Span(span, carrier.get("traceparent", ""))
        made.set(**attributes)
        return made

    def close(self) -> None:
        self._provider.shutdown()


def make_tracer(endpoint: str | None, process: str) -> Tracer | None:
    """
    Args:
        endpoint: of an OTLP collector over gRPC, http://host:4317; None = no tracing.
        process: name of the service in traces: "baton-gateway", "baton-prefill".

    Raises:
        ValueError: there is an endpoint, and the `otel` extra is not installed.
    """
    if endpoint is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ValueError("--otlp-traces-endpoint needs the extra: pip install baton[otel]") from (
            error
        )
    provider = TracerProvider(resource=Resource.create({"service.name": process}))
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracer(provider)
