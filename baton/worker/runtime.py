"""A worker at run time: the machine, and everything that carries its effects out.

    gateways ── SessionPort ──►                 ──► engine (its own thread)
    consumers ── ExportDesk ──►  WorkerMachine  ──► sessions, exports, fetches
    fetches  ── FetchDesk ───►                  ──► metrics, locality

All of it lives on one event loop; the engine posts its outputs there and is never waited for.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from baton.engine.commands import (
    AddDecode,
    AddLocal,
    AddPrefill,
    Command,
    PinPrefix,
    UnpinPrefix,
)
from baton.engine.events import StepOutput
from baton.errors import BatonError, Cause
from baton.failpoints import Failpoints
from baton.grammar_pool import GrammarPool
from baton.kvtransfer.base import FetchOpen
from baton.kvtransfer.effects import (
    AttachGranted,
    AttachmentReady,
    AttachmentSampled,
    AttachRefused,
    CancelFetch,
    CutAttachment,
)
from baton.messages import GatewayMessage, Heartbeat, StepBatch, WorkerMessage
from baton.types import KVRange, LegId, TokenChunk, TransferStats
from baton.worker.effects import CloseSession, Effect, FetchKV, Post, Send, SessionId
from baton.worker.exports import ExportDesk
from baton.worker.grammar_desk import GrammarDesk
from baton.worker.machine import WorkerMachine

log = logging.getLogger(__name__)

TICK_S = 0.1
MAX_UNREAD_OUTPUTS = 64  # steps that the engine may be ahead of the event loop


class SessionPort(Protocol):
    """The way to one gateway. Neither call blocks; after `close` nothing is sent any more."""

    def send(self, message: WorkerMessage) -> None:
        """Put into a bounded buffer; a gateway that does not empty it is closed."""
        ...

    def close(self, cause: Cause, detail: str) -> None: ...


class Engine(Protocol):
    """What is asked of `baton.engine.thread.EngineThread`."""

    def post(self, *commands: Command) -> None: ...


class Fetches(Protocol):
    """What is asked of `baton.worker.fetches.FetchDesk`."""

    def start(self, order: FetchKV) -> None: ...

    def cancel(self, leg: LegId) -> None: ...


class Observer(Protocol):
    """Told of what happens, for metrics and locality; never asked."""

    def stepped(self, output: StepOutput) -> None: ...

    def received(self, message: GatewayMessage) -> None: ...

    def sent(self, message: WorkerMessage) -> None: ...


class WorkerRuntime:
    """Wires one worker. `connect` completes it; then events may come."""

    engine: Engine
    fetches: Fetches

    def __init__(
        self,
        machine: WorkerMachine,
        exports: ExportDesk,
        observers: Sequence[Observer] = (),
        failpoints: Failpoints | None = None,
    ) -> None:
        self.machine = machine
        self.exports = exports
        exports.connect(self)
        self.failed: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        self._observers = observers
        self._failpoints = failpoints or Failpoints()
        self._loop = asyncio.get_running_loop()
        self._grammars: GrammarDesk | None = None
        self._ports: dict[SessionId, SessionPort] = {}
        self._num_sessions = 0
        self._unread = threading.BoundedSemaphore(MAX_UNREAD_OUTPUTS)
        self._effects: deque[Effect] = deque()
        self._is_carrying_out = False

    def connect(
        self, engine: Engine, fetches: Fetches, grammars: GrammarPool | None = None
    ) -> None:
        """They need this runtime to be built, hence the second step. `grammars`: the engine's; None
        when it has none, so that it compiles nothing."""
        self.engine = engine
        self.fetches = fetches
        if grammars is not None:
            self._grammars = GrammarDesk(grammars, self._post_to_engine, self._refused)

    def close(self) -> None:
        """Nothing is posted to the engine any more that waits here."""
        if self._grammars is not None:
            self._grammars.close()

    @staticmethod
    def now_ms() -> int:
        return time.monotonic_ns() // 1_000_000

    # ── sessions ─────────────────────────────────────────────────────────────────────────────────

    def session_opened(self, port: SessionPort) -> SessionId:
        self._num_sessions += 1
        session = SessionId(self._num_sessions)
        self._ports[session] = port
        self._do(lambda: self.machine.session_opened(session, self.now_ms()))
        return session

    def session_lost(self, session: SessionId) -> None:
        if self._ports.pop(session, None) is not None:
            self._do(lambda: self.machine.session_lost(session, self.now_ms()))

    def receive(self, session: SessionId, message: GatewayMessage) -> None:
        try:
            self._failpoints.hit(type(message).__name__.lower())
        except BatonError as error:
            if not isinstance(message, Heartbeat):
                self.reject(session, message.leg, error)
            return
        for observer in self._observers:
            observer.received(message)
        self._do(lambda: self.machine.receive(session, message, self.now_ms()))

    def reject(self, session: SessionId, leg: LegId, error: BatonError) -> None:
        """A message about this leg cannot be handled."""
        self._do(lambda: self.machine.reject(session, leg, error, self.now_ms()))

    # ── the engine ───────────────────────────────────────────────────────────────────────────────

    def post_output(self, output: StepOutput) -> None:
        """On the engine's thread. Waits only when the event loop is many steps behind."""
        self._unread.acquire()
        self._loop.call_soon_threadsafe(self._on_output, output)

    def post_failure(self, error: Exception) -> None:
        """On the engine's thread: it is over."""
        self._loop.call_soon_threadsafe(self.fail, error)

    def _on_output(self, output: StepOutput) -> None:
        self._unread.release()
        for observer in self._observers:
            observer.stepped(output)
        self._do(lambda: self.machine.step(output, self.now_ms()))

    def layers_ready(self, leg: LegId, where: KVRange) -> None:
        self._do(lambda: self.machine.layers_ready(leg, where, self.now_ms()))

    # ── exports ──────────────────────────────────────────────────────────────────────────────────

    def attach(self, key: int, fetch: FetchOpen) -> None:
        try:
            self._failpoints.hit("attach")
        except BatonError as error:
            self.exports.refused(AttachRefused(key, error.cause, error.message))
            return
        self._do(lambda: self.machine.attach(key, fetch, self.now_ms()))

    def cancel_attach(self, key: int) -> None:
        self.machine.cancel_attach(key)

    def attachment_progress(self, epoch: int, num_sent_tokens: int) -> None:
        self._failpoints.hit("frame-sent")
        self.machine.attachment_progress(epoch, num_sent_tokens, self.now_ms())

    def attachment_done(self, epoch: int) -> None:
        self._failpoints.hit("done")
        self.machine.attachment_done(epoch)

    def attachment_closed(self, epoch: int) -> None:
        self._do(lambda: self.machine.attachment_closed(epoch, self.now_ms()))

    # ── fetches ──────────────────────────────────────────────────────────────────────────────────

    def fetch_progress(self, leg: LegId) -> None:
        self._failpoints.hit("frame")
        self.machine.fetch_progress(leg, self.now_ms())

    def fetch_ended(
        self, leg: LegId, stats: TransferStats, first_tokens: Sequence[TokenChunk]
    ) -> None:
        try:
            self._failpoints.hit("fetched")
        except BatonError as error:
            self.fetch_failed(leg, 0, error.cause, error.message)
            return
        self._do(lambda: self.machine.fetch_ended(leg, stats, first_tokens, self.now_ms()))

    def fetch_failed(self, leg: LegId, valid_tokens: int, cause: Cause, detail: str) -> None:
        self._do(lambda: self.machine.fetch_failed(leg, valid_tokens, cause, detail, self.now_ms()))

    # ── time ─────────────────────────────────────────────────────────────────────────────────────

    async def run_timers(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            self._do(lambda: self.machine.tick(self.now_ms()))

    def drain(self) -> None:
        self._do(lambda: self.machine.drain(self.now_ms()))

    def hand_over(self) -> None:
        self._do(lambda: self.machine.hand_over(self.now_ms()))

    # ── effects ──────────────────────────────────────────────────────────────────────────────────

    def fail(self, error: Exception) -> None:
        """The worker itself is broken: whoever awaits `failed` ends the process."""
        if not self.failed.done():
            self.failed.set_result(error)

    def _do(self, event: Callable[[], Iterable[Effect]]) -> None:
        """Let the machine handle an event and carry out what it asks for. A defect in here is no
        request's fault and leaves nothing to rely on."""
        try:
            self._effects.extend(event())
            if self._is_carrying_out:
                return  # an effect caused this event: its own effects come after those before it
            self._is_carrying_out = True
            while self._effects:
                self._carry_out(self._effects.popleft())
        except Exception as error:
            log.exception("the worker has failed")
            self.fail(error)
        self._is_carrying_out = False

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Send(session, message):
                self._send(session, message)
            case Post(command):
                self._post(command)
            case FetchKV():
                self.fetches.start(effect)
            case CancelFetch(leg):
                self.fetches.cancel(leg)
            case AttachGranted():
                self.exports.granted(effect)
            case AttachRefused():
                self.exports.refused(effect)
            case AttachmentReady():
                self.exports.ready(effect)
            case AttachmentSampled():
                self.exports.sampled(effect)
            case CutAttachment():
                self.exports.cut(effect)
            case CloseSession(session, cause, detail):
                port = self._ports.pop(session, None)
                if port is not None:
                    port.close(cause, detail)

    def _send(self, session: SessionId, message: WorkerMessage) -> None:
        port = self._ports.get(session)
        if port is None:
            return
        try:
            self._pass_failpoints(message)
        except BatonError as error:
            port.close(error.cause, error.message)
            self.session_lost(session)
            return
        for observer in self._observers:
            observer.sent(message)
        port.send(message)

    def _pass_failpoints(self, message: WorkerMessage) -> None:
        if self._failpoints and isinstance(message, StepBatch):
            for item in message.messages:
                if isinstance(item, TokenChunk):
                    self._failpoints.hit(
                        "sampled" if item.leg in self.machine.producer else "token"
                    )
                else:
                    self._failpoints.hit(type(item).__name__.lower())

    def _post(self, command: Command) -> None:
        if self._grammars is None or isinstance(command, PinPrefix | UnpinPrefix):
            self._post_to_engine(command)
        else:
            self._grammars.post(command)

    def _post_to_engine(self, command: Command) -> None:
        try:
            self.engine.post(command)
        except BatonError as error:
            if self.failed.done():
                return  # the process is about to end
            if not isinstance(command, AddPrefill | AddDecode | AddLocal):
                raise
            self._refused(command.leg, error)

    def _refused(self, leg: LegId, error: BatonError) -> None:
        self._do(lambda: self.machine.engine_refused(leg, error, self.now_ms()))
