"""gRPC as every room uses it: channels, servers, the cluster token, and the one mapping between
`Cause` and gRPC status.

    connection = connect("10.0.0.5:9000", token)
    call = KVStub(connection.channel).Inventory(request, metadata=connection.metadata)

    server = RpcServer(token)
    add_KVServicer_to_server(servicer, server.grpc)
    port = server.bind("127.0.0.1", 0)
    await server.start(services=["baton.v1.KV"])
    ...
    await server.stop(grace_s=5)

A handler raises BatonError; the caller turns grpc.aio.AioRpcError back with `to_baton_error`.
"""

import hmac
import inspect
import ipaddress
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
from grpc.aio import ServicerContext
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from baton.errors import BatonError, Cause

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 32 << 20
_CAUSE_KEY = "baton-cause"
_TOKEN_KEY = "authorization"
_HEALTH_PREFIX = f"/{health.SERVICE_NAME}/"

Metadata = Sequence[tuple[str, str | bytes]]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"
Context: TypeAlias = "ServicerContext[Any, Any]"

# A peer that was stopped or cut off answers no ping: its calls end 3 s after its last sign of life.
# Liveness proper is the heartbeat of a session; this is for calls beside it. The pings by which
# gRPC measures bandwidth would be in the way (one of them unanswered holds keepalive's back for a
# minute); without them windows do not grow, so they begin large.
_KEEPALIVE = (
    ("grpc.keepalive_time_ms", 1_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.ping_timeout_ms", 2_000),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 8 << 20),
)
_LIMITS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
)
_CHANNEL_OPTIONS = (
    *_KEEPALIVE,
    *_LIMITS,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),  # also the time a connection attempt may take
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_retries", 0),  # what may be tried again is decided by the gateway
    ("grpc.use_local_subchannel_pool", 1),
)
_SERVER_OPTIONS = (
    *_KEEPALIVE,
    *_LIMITS,
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.so_reuseport", 0),  # a port in use is an error, not a shared port
)

_STATUS = {
    Cause.INVALID_REQUEST: grpc.StatusCode.INVALID_ARGUMENT,
    Cause.CONTEXT_LENGTH_EXCEEDED: grpc.StatusCode.INVALID_ARGUMENT,
    Cause.MODEL_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Cause.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    Cause.NEVER_FITS: grpc.StatusCode.INVALID_ARGUMENT,
    Cause.NO_ROOM: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Cause.OVERLOADED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Cause.DRAINING: grpc.StatusCode.UNAVAILABLE,
    Cause.NO_WORKER: grpc.StatusCode.UNAVAILABLE,
    Cause.WORKER_LOST: grpc.StatusCode.UNAVAILABLE,
    Cause.SESSION_LOST: grpc.StatusCode.UNAVAILABLE,
    Cause.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
    Cause.CANCELLED: grpc.StatusCode.CANCELLED,
    Cause.STEP_FAILED: grpc.StatusCode.INTERNAL,
    Cause.NON_FINITE_LOGITS: grpc.StatusCode.INTERNAL,
    Cause.TICKET_FORGED: grpc.StatusCode.PERMISSION_DENIED,
    Cause.TICKET_EXPIRED: grpc.StatusCode.FAILED_PRECONDITION,
    Cause.EPOCH_MISMATCH: grpc.StatusCode.FAILED_PRECONDITION,
    Cause.TENANT_MISMATCH: grpc.StatusCode.PERMISSION_DENIED,
    Cause.MODEL_MISMATCH: grpc.StatusCode.FAILED_PRECONDITION,
    Cause.TOKENS_MISMATCH: grpc.StatusCode.FAILED_PRECONDITION,
    Cause.LEASE_UNKNOWN: grpc.StatusCode.NOT_FOUND,
    Cause.LAYOUT_INCOMPATIBLE: grpc.StatusCode.FAILED_PRECONDITION,
    Cause.FRAME_CORRUPT: grpc.StatusCode.DATA_LOSS,
    Cause.FRAME_ORDER: grpc.StatusCode.DATA_LOSS,
    Cause.FRAME_TRUNCATED: grpc.StatusCode.DATA_LOSS,
    Cause.TRANSPORT_FAILED: grpc.StatusCode.UNAVAILABLE,
    Cause.TRANSFER_STALLED: grpc.StatusCode.DEADLINE_EXCEEDED,
    Cause.PROTOCOL: grpc.StatusCode.INVALID_ARGUMENT,
    Cause.UNSUPPORTED: grpc.StatusCode.UNIMPLEMENTED,
    Cause.INTERNAL: grpc.StatusCode.INTERNAL,
}

# What a status without a cause means: it came from gRPC itself or from something that is not Baton.
_CAUSE = {
    grpc.StatusCode.UNAUTHENTICATED: Cause.UNAUTHENTICATED,
    # Who cancels a call of its own gets asyncio's CancelledError; this is the peer, or its end.
    grpc.StatusCode.CANCELLED: Cause.TRANSPORT_FAILED,
    grpc.StatusCode.DEADLINE_EXCEEDED: Cause.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED: Cause.UNSUPPORTED,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Cause.PROTOCOL,  # a message beyond the limits
    grpc.StatusCode.INTERNAL: Cause.TRANSPORT_FAILED,  # a broken stream, by gRPC's own words
    grpc.StatusCode.UNAVAILABLE: Cause.TRANSPORT_FAILED,
    grpc.StatusCode.UNKNOWN: Cause.TRANSPORT_FAILED,
}
_CAUSE_BY_NUMBER = {str(int(cause)): cause for cause in Cause}


def status_of(cause: Cause) -> grpc.StatusCode:
    return _STATUS[cause]


def to_baton_error(error: grpc.aio.AioRpcError) -> BatonError:
    """What a failed call means: the peer's own cause if it sent one."""
    detail = error.details() or error.code().name
    for key, value in error.trailing_metadata() or ():
        if key == _CAUSE_KEY and str(value) in _CAUSE_BY_NUMBER:
            return BatonError(_CAUSE_BY_NUMBER[str(value)], detail)
    return BatonError(_CAUSE.get(error.code(), Cause.INTERNAL), detail)


# ── the cluster token ────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class ClusterToken:
    """The secret that gateways and workers share. Two are valid while it is being changed: the
    first is sent, each is accepted. No secrets = nothing is sent or asked for."""

    secrets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.secrets) > 2 or not all(self.secrets):
            raise ValueError("a cluster token is one or two non-empty secrets")

    def __bool__(self) -> bool:
        return bool(self.secrets)

    def __repr__(self) -> str:
        return f"ClusterToken({len(self.secrets)} secrets)"

    @property
    def metadata(self) -> Metadata:
        """What a caller sends along."""
        return ((_TOKEN_KEY, f"Bearer {self.secrets[0]}"),) if self.secrets else ()

    def accepts(self, metadata: Metadata | None) -> bool:
        """Does a caller's metadata carry a valid secret? Takes the same time for any wrong one."""
        if not self.secrets:
            return True
        given = next((v for k, v in metadata or () if k == _TOKEN_KEY), b"")
        given = given.encode() if isinstance(given, str) else given
        valid = [hmac.compare_digest(given, f"Bearer {s}".encode()) for s in self.secrets]
        return any(valid)


def is_loopback(host: str) -> bool:
    """Can only this machine reach what listens on `host`?"""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


# ── caller's side ────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Connection:
    """A channel and the metadata that each call on it needs."""

    channel: grpc.aio.Channel
    metadata: Metadata

    async def close(self) -> None:
        """Ends its calls at once."""
        await self.channel.close()


def connect(address: str, token: ClusterToken) -> Connection:
    """A connection to host:port; connects in the background, and again after a loss."""
    channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
    return Connection(channel, token.metadata)


async def is_serving(address: str, timeout_s: float = 5.0) -> bool:
    """What the health service of the worker at host:port answers; False if nothing does."""
    async with grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.aio.AioRpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


# ── server's side ────────────────────────────────────────────────────────────────────────────────


class RpcServer:
    """A grpc.aio server with the cluster token, error mapping, health and reflection.

    Add servicers to `grpc`, then `bind`, then `start`.
    """

    def __init__(self, token: ClusterToken) -> None:
        self._token = token
        self._health = health.aio.HealthServicer()
        self.grpc = grpc.aio.server(interceptors=[_Guard(token)], options=_SERVER_OPTIONS)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)

    def bind(self, host: str, port: int) -> int:
        """Listen on host:port (0 = any free port); returns the port.

        Raises:
            ValueError: others could reach `host` and there is no cluster token.
            OSError: the port is taken, or the host is none of this machine's.
        """
        if not self._token and not is_loopback(host):
            raise ValueError(f"listening on {host} needs a cluster token (--cluster-token)")
        address = f"[{host.strip('[]')}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            return self.grpc.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}") from error

    async def start(self, services: Sequence[str] = ()) -> None:
        """Serve. `services`: full names, for reflection and health; all NOT_SERVING at first."""
        self._services = ("", *services)
        reflection.enable_server_reflection(
            (*services, health.SERVICE_NAME, reflection.SERVICE_NAME), self.grpc
        )
        await self.set_serving(False)
        await self.grpc.start()

    async def set_serving(self, is_serving: bool) -> None:
        """What the standard health service answers."""
        status = health_pb2.HealthCheckResponse
        for service in self._services:
            await self._health.set(service, status.SERVING if is_serving else status.NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls; end running ones when they end by themselves, at the latest after
        `grace_s`."""
        await self._health.enter_graceful_shutdown()
        await self.grpc.stop(grace_s)


class _Guard(grpc.aio.ServerInterceptor):
    """Asks every call for the token (health excepted) and turns exceptions into statuses."""

    def __init__(self, token: ClusterToken) -> None:
        self._token = token

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        method = handler_call_details.method
        metadata = handler_call_details.invocation_metadata
        if not method.startswith(_HEALTH_PREFIX) and not self._token.accepts(metadata):
            logger.warning("refused %s: no valid cluster token", method)
            # Streaming on both sides, so that it answers before it has read anything.
            return grpc.stream_stream_rpc_method_handler(_refuse)
        handler = await continuation(handler_call_details)
        return None if handler is None else _guarded(handler, method)


async def _refuse(_requests: AsyncIterator[Any], context: Context) -> None:
    await _abort(context, BatonError(Cause.UNAUTHENTICATED, "no valid cluster token"))


async def _abort(context: Context, error: BatonError) -> None:
    trailing = ((_CAUSE_KEY, str(int(error.cause))),)
    await context.abort(status_of(error.cause), error.message, trailing)


def _guarded(handler: Any, method: str) -> Handler:
    """The same handler, its exceptions told with their cause."""
    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    behavior: Any = next(
        found
        for found in (
            handler.unary_unary,
            handler.unary_stream,
            handler.stream_unary,
            handler.stream_stream,
        )
        if found is not None
    )

    async def call(request: Any, context: Context) -> Any:
        try:
            return await behavior(request, context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001 - told to the caller, and logged
            await _abort(context, _as_baton_error(error, method))

    async def generate(request: Any, context: Context) -> AsyncIterator[Any]:
        try:
            async for response in behavior(request, context):
                yield response
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001 - told to the caller, and logged
            await _abort(context, _as_baton_error(error, method))

    wrapped = generate if inspect.isasyncgenfunction(behavior) else call
    return make(wrapped, handler.request_deserializer, handler.response_serializer)


def _as_baton_error(error: Exception, method: str) -> BatonError:
    if isinstance(error, BatonError):
        return error
    logger.error("%s failed", method, exc_info=error)
    return BatonError(Cause.INTERNAL, f"{type(error).__name__} in {method}")
