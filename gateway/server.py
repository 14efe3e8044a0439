"""`baton gateway`: tokenizer, routing side and HTTP in one process, and its orderly end.

The first signal drains: /health turns red, the listening socket closes, open answers go on until
`--drain-timeout-s` and are then told so. A second one ends the process at once.
"""

import asyncio
import gc
import logging
import math
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import FrameType

import uvicorn
import uvloop
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from baton.config import GatewayConfig
from baton.errors import BatonError, Cause
from baton.gateway.app import create_app
from baton.gateway.context import Context
from baton.gateway.defaults import SamplingDefaults
from baton.gateway.orchestrate import Orchestrator
from baton.gateway.protocol import http_protocol
from baton.gateway.responses.service import ResponseService
from baton.gateway.responses.store import ResponseStore
from baton.settings import LimitSettings
from baton.telemetry import GatewayMetrics
from baton.text import Tokenizer, TokenizerPool
from baton.tracing import make_tracer
from baton.vllm_metrics import VllmMetrics

log = logging.getLogger(__name__)

IDLE_CONNECTION_S = 60
BACKLOG = 2048
LAST_WORDS_S = 2  # for answers that the drain cut to say so


def run(config: GatewayConfig) -> int:
    """Serve until a signal; returns the exit status."""
    if config.enable_auto_tool_choice and config.tool_call_parser is None:
        log.error("--enable-auto-tool-choice needs --tool-call-parser")
        return 2
    try:
        tokenizer = Tokenizer.from_pretrained(config.tokenizer_source, revision=config.revision)
        defaults = SamplingDefaults.load(config, tokenizer)
        listener = listen(config.host, config.port, config.slow_client_timeout_s)
    except (ValueError, OSError) as error:
        log.error("%s", error)
        return 2
    with listener, event_loop() as runner:
        return runner.run(serve(config, tokenizer, defaults, listener))


def event_loop() -> asyncio.Runner:
    """Of uvloop, on which a token costs less than on asyncio's own (docs/performance.md)."""
    return asyncio.Runner(loop_factory=uvloop.new_event_loop)


def listen(host: str, port: int, slow_client_s: float) -> socket.socket:
    """
    Raises:
        OSError: the address cannot be used; the message says which.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]
        raise OSError(f"cannot listen on {host}:{port}: {reason}") from error
    # Inherited by every connection; asyncio sets it only on sockets with a protocol number. Without
    # it the first chunk waits behind the headers for the client's delayed acknowledgement, 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # Inherited by every connection: the kernel drops one whose peer takes nothing, which the
        # event loop cannot do while data waits to be flushed.
        timeout_ms = int(slow_client_s * 1e3)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)
    return listener


async def serve(
    config: GatewayConfig,
    tokenizer: Tokenizer,
    defaults: SamplingDefaults,
    listener: socket.socket,
) -> int:
    pool = TokenizerPool(
        tokenizer,
        num_threads=config.tokenizer_threads,
        max_pending=config.max_pending_requests + config.max_choices,
    )
    try:
        orchestrator = Orchestrator(config)
        tracer = make_tracer(config.otlp_traces_endpoint, "baton-gateway")
    except ValueError as error:
        log.error("%s", error)
        return 2

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        await orchestrator.start()
        try:
            yield
        finally:
            await responses.close()
            await orchestrator.close()
            pool.close()
            if tracer is not None:
                await asyncio.to_thread(tracer.close)

    responses = _responses(config)
    registry = CollectorRegistry()
    vllm = VllmMetrics(registry) if config.metrics_compat == "vllm" else None
    metrics = GatewayMetrics(registry, vllm)
    context = Context(orchestrator, pool, config, metrics, config, defaults, tracer=tracer)
    server = Server(
        create_app(context, lifespan, responses),
        config,
        config.drain_timeout_s,
        on_drain=lambda: _drain(context, orchestrator),
        on_deadline=lambda: context.inflight.fail_all(_CUT),
    )
    host, port = listener.getsockname()[:2]
    log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    # What start-up has made stays. A full collection that looks at all of it is a stall of 70 ms.
    gc.collect()
    gc.freeze()
    await server.serve([listener])
    return 0


def _responses(config: GatewayConfig) -> ResponseService:
    url = config.response_redis_url or config.redis_url
    if url is None or config.response_ttl_s == 0:
        return ResponseService()
    store = ResponseStore(
        url,
        config.cluster,
        [secret.get_secret_value() for secret in config.cluster_token],
        ttl_s=config.response_ttl_s,
        max_bytes=config.response_store_bytes,
        max_item_bytes=config.max_response_bytes,
    )
    return ResponseService(store, max_background=config.max_background_responses)


_CUT = BatonError(Cause.DRAINING, "The gateway was shut down before the answer was complete.")


def _drain(context: Context, orchestrator: Orchestrator) -> None:
    orchestrator.drain()
    context.inflight.drains_until(time.monotonic() + context.settings.drain_timeout_s)


class Server(uvicorn.Server):
    """uvicorn with our signals: the first drains, the second ends at once."""

    def __init__(
        self,
        app: FastAPI,
        limits: LimitSettings,
        drain_timeout_s: float,
        *,
        on_drain: Callable[[], None],
        on_deadline: Callable[[], None],
    ) -> None:
        """`on_deadline` ends what is still open after `drain_timeout_s`."""
        super().__init__(
            uvicorn.Config(
                app,
                http=http_protocol(limits),
                ws="none",
                lifespan="on",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=IDLE_CONNECTION_S,
                timeout_graceful_shutdown=math.ceil(drain_timeout_s + LAST_WORDS_S),
            )
        )
        self._drain_timeout_s = drain_timeout_s
        self._on_drain = on_drain
        self._on_deadline = on_deadline
        self._serving: asyncio.Task[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._serving = asyncio.current_task()
        try:
            await super().serve(sockets)
        except asyncio.CancelledError:
            if not self.force_exit:
                raise
            self._hang_up()
        finally:
            if self._deadline is not None:
                self._deadline.cancel()

    def _hang_up(self) -> None:
        """uvicorn leaves everything open when it is cancelled."""
        for server in self.servers if self.started else ():
            server.close()
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        name = signal.Signals(sig).name
        if not self.should_exit:
            log.info("%s: draining", name)
            self.should_exit = True
            self._on_drain()
            loop = asyncio.get_running_loop()
            self._deadline = loop.call_later(self._drain_timeout_s, self._on_deadline)
        elif not self.force_exit:
            log.info("%s again: ending now", name)
            self.force_exit = True
            assert self._serving is not None, "signals are handled while serving"
            self._serving.cancel()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Unlike uvicorn's, does not raise the signal again at the end: a drained exit is good."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM)
        for number in signals:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)
