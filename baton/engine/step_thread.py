"""A thread that alone touches an engine."""

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Generic, Protocol, TypeVar

from baton.errors import BatonError, Cause

log = logging.getLogger(__name__)

Command = TypeVar("Command")
Command_contra = TypeVar("Command_contra", contravariant=True)


class Core(Protocol[Command_contra]):
    """An engine without a thread."""

    @property
    def has_work(self) -> bool: ...

    def apply(self, command: Command_contra) -> None: ...


class StepThread(ABC, Generic[Command]):
    """Runs steps while there is work and sleeps on its queue while there is none.

    A fault of the engine itself (not of a request, which is contained) ends the thread:
    `on_failure` is called with it on this thread, `failure` keeps it, and every later `post`
    raises.
    """

    def __init__(
        self, core: Core[Command], name: str, on_failure: Callable[[Exception], None] | None
    ) -> None:
        self._receiver: Core[Command] = core
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
            BatonError: INTERNAL once the engine has failed or is stopping.
        """
        if self.failure is not None or self._is_stopping:
            raise BatonError(Cause.INTERNAL, "the engine is not running")
        for command in commands:
            self._commands.put(command)

    def stop(self, timeout_s: float = 10.0) -> bool:
        """End after the current step; whether the thread has ended. Idempotent."""
        self._is_stopping = True
        self._commands.put(None)
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @abstractmethod
    def _step(self) -> None:
        """One step, and what it gave to whoever waits for it."""

    def _run(self) -> None:
        try:
            while self._apply_commands():
                self.step_started_at = time.monotonic()
                self._step()
        except Exception as error:
            log.exception("the engine has failed")
            self.failure = error
            self.step_started_at = None
            if self._on_failure is not None:
                self._on_failure(error)

    def _apply_commands(self) -> bool:
        """Whatever was posted, waiting for it when there is nothing else to do. False: stop."""
        try:
            command = self._commands.get(block=not self._receiver.has_work)
            while command is not None:
                self._receiver.apply(command)
                command = self._commands.get_nowait()
        except Empty:
            return True
        return False
