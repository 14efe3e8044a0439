"""The one thread that touches an engine."""

from collections.abc import Callable

from baton.engine.commands import AddDecode, AddLocal, AddPrefill, Command
from baton.engine.core import EngineCore, OnKVReady
from baton.engine.events import StepOutput
from baton.engine.step_thread import StepThread
from baton.errors import BatonError, Cause

MAX_PENDING_ADDS = 8192  # commands not yet applied, beyond which new legs are refused


class EngineThread(StepThread[Command]):
    """See `StepThread`. `on_output` is called on this thread, once per StepOutput; it must not
    block. Nor must `on_kv_ready`, see `EngineCore`."""

    def __init__(
        self,
        core: EngineCore,
        on_output: Callable[[StepOutput], None],
        *,
        on_kv_ready: OnKVReady | None = None,
        on_failure: Callable[[Exception], None] | None = None,
        name: str = "engine",
    ) -> None:
        super().__init__(core, name, on_failure)
        self._core = core
        core.on_kv_ready = on_kv_ready
        self._on_output = on_output

    def post(self, *commands: Command) -> None:
        """See `StepThread.post`.

        Raises:
            BatonError: OVERLOADED for a new leg while too much is unapplied; INTERNAL once the
                engine has failed or is stopping.
        """
        for command in commands:
            is_add = isinstance(command, AddPrefill | AddDecode | AddLocal)
            if is_add and self._commands.qsize() >= MAX_PENDING_ADDS:
                raise BatonError(Cause.OVERLOADED, "too many commands are waiting for the engine")
            super().post(command)

    def _step(self) -> None:
        self._tell(self._core.begin())
        output = self._core.compute()
        self.step_started_at = None
        self._tell(output)

    def _tell(self, output: StepOutput | None) -> None:
        if output is not None:
            self._on_output(output)
