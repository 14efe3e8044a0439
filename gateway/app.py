"""The ASGI application: routes, the one exception handler, the layer of limits in front."""

import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_fastapi_instrumentator.middleware import PrometheusInstrumentatorMiddleware
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp

import baton
from baton.errors import BatonError, Cause
from baton.gateway import (
    anthropic,
    chat,
    cluster,
    completions,
    embeddings,
    invocations,
    models,
    scoring,
    token_io,
    tokenization,
)
from baton.gateway.accounting import outcome_of
from baton.gateway.body import json_route
from baton.gateway.context import Context
from baton.gateway.errors import ERROR_RESPONSES, api_error
from baton.gateway.limits import Guard
from baton.gateway.link_metrics import LinkMetrics
from baton.gateway.responses.routes import responses_router
from baton.gateway.responses.service import ResponseService

_METHODS = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
Lifespan = Callable[[], AbstractAsyncContextManager[None]]


@asynccontextmanager
async def _nothing() -> AsyncIterator[None]:
    yield


def create_app(
    context: Context, lifespan: Lifespan = _nothing, responses: ResponseService | None = None
) -> FastAPI:
    """`lifespan` is entered before the first request and left after the last; `responses`, if there
    is a store for them, is whoever made it to close."""

    @asynccontextmanager
    async def run(app: FastAPI) -> AsyncIterator[None]:
        async with lifespan():
            yield

    # No redirects: their Location would be made of the client's Host header.
    app = FastAPI(
        title="Baton",
        version=baton.__version__,
        lifespan=run,
        redirect_slashes=False,
        redoc_url=None,
        responses=ERROR_RESPONSES,
    )
    route_class = json_route(context.limits, _refusal_counter(context))
    for router in (
        completions.completions_router(context, route_class),
        chat.chat_router(context, route_class),
        anthropic.messages_router(context, route_class),
        embeddings.embeddings_router(context, route_class),
        scoring.scoring_router(context, route_class),
        responses_router(context, responses or ResponseService(), route_class),
        invocations.invocations_router(context, route_class),
        tokenization.tokenization_router(context, route_class),
        token_io.token_io_router(context, route_class),
        models.models_router(context),
        cluster.cluster_router(context),
    ):
        # As they are: an included router is searched, with its context, for every request.
        app.router.routes.extend(router.routes)
    _add_probes(app, context)
    context.metrics.registry.register(LinkMetrics(lambda: context.backend.topology().links))
    on_exception = _exception_handler(context)
    for kind in (BatonError, RequestValidationError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, on_exception)
    if context.settings.metrics_compat == "vllm":
        app.add_middleware(
            _HttpMetrics,
            routes=app.routes,
            excluded_handlers=["/health", "/load", "/metrics", "/ping", "/version"],
            registry=context.metrics.registry,
        )
    keys = [key.get_secret_value() for key in context.settings.api_key]
    app.add_middleware(Guard, limits=context.limits, keys=keys)
    return app


def _refusal_counter(context: Context) -> Callable[[str, Exception], None]:
    def count(path: str, error: Exception) -> None:
        refused = error if isinstance(error, BatonError) else BatonError(Cause.INVALID_REQUEST, "")
        context.metrics.requests.labels(path, outcome_of(refused)).inc()

    return count


class _HttpMetrics(PrometheusInstrumentatorMiddleware):
    """http_requests_total and its like, as vLLM has them and by the same library, which tries every
    route for every request. Nearly all of those name one without parameters."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        routes: Sequence[BaseRoute],
        excluded_handlers: Sequence[str],
        registry: CollectorRegistry,
    ) -> None:
        super().__init__(app, excluded_handlers=excluded_handlers, registry=registry)
        paths = (route.path for route in routes if isinstance(route, Route))
        self._plain_paths = frozenset(path for path in paths if "{" not in path)

    def _get_handler(self, request: Request) -> tuple[str, bool]:
        path = request.scope["path"]
        return (path, True) if path in self._plain_paths else super()._get_handler(request)


def _exception_handler(
    context: Context,
) -> Callable[[Request, Exception], Coroutine[None, None, Response]]:
    async def on_exception(request: Request, error: Exception) -> Response:
        request_id = request.state.request_id
        response = api_error(error, request_id).response()
        # A 500 is sent from outside the layer of limits.
        response.headers["X-Request-Id"] = request_id
        if response.status_code == 405:
            response.headers["Allow"] = ", ".join(_allowed(request))
        if isinstance(error, BatonError) and response.status_code in (429, 503):
            wait_s = context.inflight.retry_after_s(error.cause, time.monotonic())
            response.headers["Retry-After"] = str(wait_s)
        return response

    return on_exception


def _allowed(request: Request) -> list[str]:
    """The methods of a path, each of which has a route of its own."""
    routes = request.app.router.routes
    return [
        method
        for method in _METHODS
        if any(r.matches({**request.scope, "method": method})[0] is Match.FULL for r in routes)
    ]


def _add_probes(app: FastAPI, context: Context) -> None:
    async def health() -> Response:
        """200 once a route from prompt to tokens has been proven, and while one is up."""
        if not context.backend.ready():
            raise BatonError(Cause.NO_WORKER, "No route is ready.")
        return Response()

    app.get("/health", tags=["Operations"], response_class=Response)(health)
    app.api_route("/ping", methods=["GET", "POST"], include_in_schema=False)(health)

    @app.get("/load", tags=["Operations"])
    async def load() -> dict[str, int]:
        """Answers that are under way."""
        return {"server_load": len(context.inflight)}

    @app.get("/version", tags=["Operations"])
    async def version() -> dict[str, str]:
        return {"version": baton.__version__}

    @app.get("/metrics", tags=["Operations"], response_class=Response)
    async def metrics() -> Response:
        cluster.refresh_fleet_gauges(context.metrics, context.backend.topology())
        body = generate_latest(context.metrics.registry)
        return Response(body, media_type=CONTENT_TYPE_LATEST)
