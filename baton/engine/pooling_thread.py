"""The one thread that touches a pooling engine."""

import logging
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue

from baton.engine.pooling_core import PoolingCommand, PoolingCore, PoolingOutput
from baton.errors import BatonError, Cause

log = logging.getLogger(__name__)


class PoolingThread:
    """Runs steps while there is work and sleeps on its queue while there is none.

    `on_output` is called on this thread, once per step; it must not block. A fault of the engine
    itself (not of an input, which is contained) ends the thread: `on_failure` is called with it,
    and every later `post` raises.
    """

    def __init__(
        self,
        core: PoolingCore,
        on_output: Callable[[PoolingOutput], None],
        on_failure: Callable[[Exception], None],
    ) -> None:
        self._core = core
        self._on_output = on_output
        self._on_failure = on_failure
        self._commands: SimpleQueue[PoolingCommand | None] = SimpleQueue()  # None = stop
        self._thread = threading.Thread(target=self._run, name="pooling", daemon=True)
        self._is_over = False
        self.step_started_at: float | None = None  # time.monotonic(); None between steps

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def post(self, command: PoolingCommand) -> None:
        """Apply it before the next step. From any thread; never blocks.

        Raises:
            BatonError: INTERNAL once the engine has failed or is stopping.
        """
        if self._is_over:
            raise BatonError(Cause.INTERNAL, "the engine is not running")
        self._commands.put(command)

    def stop(self, timeout_s: float = 10.0) -> None:
        """End after the current step. Idempotent."""
        self._is_over = True
        self._commands.put(None)
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            while self._apply_commands():
                self.step_started_at = time.monotonic()
                output = self._core.step()
                self.step_started_at = None
                if output is not None:
                    self._on_output(output)
        except Exception as error:
            log.exception("the engine has failed")
            self._is_over = True
            self.step_started_at = None
            self._on_failure(error)

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
