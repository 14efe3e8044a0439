"""The one thread that touches an engine."""

import logging
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue

from baton.engine.commands import AddDecode, AddLocal, AddPrefill, Command
from baton.engine.core import EngineCore, OnKVReady
from baton.engine.events import StepOutput
from baton.errors import BatonError, Cause

log = logging.getLogger(__name__)

MAX_PENDING_ADDS = 8192  # commands not yet applied, beyond which new legs are refused


class EngineThread:
    """Runs steps while there is work and sleeps on its queue while there is none.

    `on_output` is called on this thread, once per StepOutput; it must not block. Nor must
    `on_kv_ready`, see `EngineCore`. A fault of the
    engine itself (not of a request, which is contained) ends the thread: `on_failure` is called
    with it, `failure` keeps it, and every later `post` raises.
    """

    def __init__(
        self,
        core: EngineCore,
        on_output: Callable[[StepOutput], None],
        *,
        on_kv_ready: OnKVReady | None = None,
        on_failure: Callable[[Exception], None] | None = None,
        name: str = "engine",
    ) -> None:
        self._core = core
        core.on_kv_ready = on_kv_ready
        self._on_output = on_output
        self._on_failure = on_failure
        self._commands: SimpleQueue[Command | None] = SimpleQueue()  # None = stop
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._is_stopping = False
        self.failure: Exception | None = None
        self.step_started_at: float | None = None  # time.monotonic(); None between steps

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def post(self, *commands: Command) -> None:
        """Apply `commands` before the next step, in order. From any thread; never blocks.

        Raises:
            BatonError: OVERLOADED for a new leg while too much is unapplied; INTERNAL once the
            engine has failed or is stopping.
        """
        if self.failure is not None or self._is_stopping:
            raise BatonError(Cause.INTERNAL, "the engine is not running")
        for command in commands:
            is_add = isinstance(command, AddPrefill | AddDecode | AddLocal)
            if is_add and self._commands.qsize() >= MAX_PENDING_ADDS:
                raise BatonError(Cause.OVERLOADED, "too many commands are waiting for the engine")
            self._commands.put(command)

    def stop(self, timeout_s: float = 10.0) -> bool:
        """End after the current step; whether the thread has ended. Idempotent."""
        self._is_stopping = True
        self._commands.put(None)
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while self._apply_commands():
                self.step_started_at = time.monotonic()
                self._tell(self._core.begin())
                output = self._core.compute()
                self.step_started_at = None
                self._tell(output)
        except Exception as error:
            log.exception("the engine has failed")
            self.failure = error
            self.step_started_at = None
            if self._on_failure is not None:
                self._on_failure(error)

    def _tell(self, output: StepOutput | None) -> None:
        if output is not None:
            self._on_output(output)

    def _apply_commands(self) -> bool:
        """Whatever was posted, waiting for it when there is nothing else to do. False: stop."""
        try:
            command = self._commands.get(block=not self._core.has_work)
            while command is not None:
                self._core.apply(command)
                command = self._commands.get_nowait()
        except Empty:
            return True
        return False
