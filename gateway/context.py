"""What every endpoint works with; made once by `create_app`."""

from dataclasses import dataclass, field

from baton.config import GatewaySettings, LimitSettings
from baton.errors import BatonError, Cause, InvalidRequest
from baton.gateway.backend import Backend, ServedModel
from baton.gateway.defaults import SamplingDefaults
from baton.gateway.inflight import InFlight
from baton.gateway.structured import GrammarChecks
from baton.telemetry import GatewayMetrics
from baton.text import TokenizerPool
from baton.tracing import Span, Tracer, checked_traceparent


@dataclass(frozen=True, slots=True)
class Context:
    backend: Backend
    tokenizers: TokenizerPool
    settings: GatewaySettings
    metrics: GatewayMetrics
    limits: LimitSettings
    defaults: SamplingDefaults
    inflight: InFlight = field(default_factory=InFlight)
    grammars: GrammarChecks = field(default_factory=GrammarChecks)
    tracer: Tracer | None = None

    def begin_span(self, traceparent: str | None, endpoint: str) -> Span | None:
        """Of a request; below the client's own, if its header names one."""
        if self.tracer is None:
            return None
        parent = checked_traceparent(traceparent)
        return self.tracer.begin("request", parent, endpoint=endpoint)

    def find_model(self, name: str | None) -> ServedModel:
        """The model that a request means; without a name, the one that is served.

        Raises:
            InvalidRequest: MODEL_NOT_FOUND.
            BatonError: NO_WORKER, so nothing is served yet.
        """
        models = self.backend.models()
        if not models:
            raise BatonError(Cause.NO_WORKER, "No worker is up yet.")
        for model in models:
            if name in (model.name, None, ""):
                return model
        names = ", ".join(model.name for model in models)
        raise InvalidRequest(
            f"The model does not exist. Served: {names}.", "model", Cause.MODEL_NOT_FOUND
        )
