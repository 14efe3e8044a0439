"""The one thread that touches a pooling engine."""

from collections.abc import Callable

from baton.engine.pooling_core import PoolingCommand, PoolingCore, PoolingOutput
from baton.engine.step_thread import StepThread


class PoolingThread(StepThread[PoolingCommand]):
    """See `StepThread`. `on_output` is called on this thread, once per step; it must not block."""

    def __init__(
        self,
        core: PoolingCore,
        on_output: Callable[[PoolingOutput], None],
        on_failure: Callable[[Exception], None],
    ) -> None:
        super().__init__(core, "pooling", on_failure)
        self._core = core
        self._on_output = on_output

    def _step(self) -> None:
        output = self._core.step()
        self.step_started_at = None
        if output is not None:
            self._on_output(output)
