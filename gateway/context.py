"""What every endpoint works with; made once by `create_app`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from baton.errors import BatonError, Cause, InvalidRequest
from baton.gateway.backend import Backend, ServedModel
from baton.gateway.defaults import SamplingDefaults
from baton.gateway.inflight import InFlight
from baton.gateway.structured import GrammarChecks
from baton.pooling import PoolingInfo, PoolingTask
from baton.settings import GatewaySettings, LimitSettings
from baton.telemetry import GatewayMetrics
from baton.text import TokenizerPool
from baton.tracing import Span, Tracer, checked_traceparent

_DOES: Mapping[PoolingTask, str] = {PoolingTask.EMBED: "embed", PoolingTask.SCORE: "score"}


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
        return self._find(name, self.backend.models())

    def find_generator(self, name: str | None) -> ServedModel:
        """As `find_model`, of those that generate.

        Raises:
            InvalidRequest: also when it does not; UNSUPPORTED.
        """
        models = self.backend.models()
        able = [model for model in models if model.pooling is None]
        found = self._find(name, able if able and not name else models)
        if found.pooling is not None:
            raise _unable(found, "generate text")
        return found

    def find_pooler(self, name: str | None, *tasks: PoolingTask) -> tuple[ServedModel, PoolingInfo]:
        """As `find_model`, of those that do one of `tasks`.

        Raises:
            InvalidRequest: also when it does not; UNSUPPORTED.
        """
        models = self.backend.models()
        able = [m for m in models if m.pooling is not None and m.pooling.task in tasks]
        found = self._find(name, able if able and not name else models)
        if found.pooling is None or found.pooling.task not in tasks:
            raise _unable(found, " or ".join(_DOES[task] for task in tasks))
        return found, found.pooling

    @staticmethod
    def _find(name: str | None, models: Sequence[ServedModel]) -> ServedModel:
        if not models:
            raise BatonError(Cause.NO_WORKER, "No worker is up yet.")
        for model in models:
            if name in (model.name, None, ""):
                return model
        names = ", ".join(model.name for model in models)
        raise InvalidRequest(
            f"The model does not exist. Served: {names}.", "model", Cause.MODEL_NOT_FOUND
        )


def _unable(model: ServedModel, what: str) -> InvalidRequest:
    does = "generates text" if model.pooling is None else _DOES[model.pooling.task] + "s"
    return InvalidRequest(
        f"The model {model.name} does not {what}: it {does}.", "model", Cause.UNSUPPORTED
    )
