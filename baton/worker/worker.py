"""One worker in this process: machine, engine thread and data plane, wired together.

It has no server: sessions come in through `runtime`, over gRPC (`baton.worker.process`) or from
code in the same process.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence

from baton.engine.commands import Command
from baton.engine.core import EngineCore
from baton.engine.events import StepOutput
from baton.engine.thread import EngineThread
from baton.errors import BatonError, Cause
from baton.failpoints import Failpoints
from baton.grammar import Grammars
from baton.grammar_pool import GrammarPool
from baton.grants import GrantKeys
from baton.kvtransfer.ticket import TicketKeyring
from baton.latency import LatencyModel
from baton.messages import GatewayMessage, WorkerMessage
from baton.types import Request, WorkerInfo
from baton.worker.data_plane import DataPlane
from baton.worker.fetches import FetchDesk
from baton.worker.layer_marks import LayerMarks
from baton.worker.link_table import LinkTable
from baton.worker.machine import WorkerMachine
from baton.worker.policy import WorkerPolicy
from baton.worker.runtime import Observer, WorkerRuntime
from baton.worker.scores import Scored, ScoreDesk
from baton.worker.totals import TotalsCounter

log = logging.getLogger(__name__)

IDLE_LOOK_S = 0.05
LAST_WORDS_S = 2.0  # for readers and writers to stop once every leg was handed over


class Worker:
    """Owns its parts. `start` before the first session; `close` ends everything, in any state."""

    def __init__(
        self,
        info: WorkerInfo,
        policy: WorkerPolicy,
        core: EngineCore,
        plane: DataPlane,
        grant_keys: GrantKeys,
        observers: Sequence[Observer] = (),
        failpoints: Failpoints | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        """
        Args:
            plane: started already, so that `info` names its addresses.
            grammars: those that the core's runner samples with.
        """
        self.info = info
        self.core = core
        self.latency = LatencyModel()
        self.links = LinkTable()
        totals = TotalsCounter()
        machine = WorkerMachine(
            info,
            policy,
            TicketKeyring.random(),
            self.latency,
            grant_keys,
            step_age_ms=self._step_age_ms,
            link_rates=self.links.rates,
            totals=totals.read,
        )
        totals.watch(machine.producer.leases.counts)
        self.scores = ScoreDesk(info, self._post)
        watching: tuple[Observer, ...] = (_Learner(self.latency), self.scores, totals, *observers)
        self.runtime = WorkerRuntime(machine, plane.exports, watching, failpoints)
        marks = LayerMarks(info.layout, self.runtime.layers_ready)
        self.engine = EngineThread(
            core,
            self.runtime.post_output,
            on_kv_ready=marks.mark,
            on_failure=self.runtime.post_failure,
        )
        self.fetches = FetchDesk(
            self.runtime,
            plane.memory,
            plane.transports,
            info.host_id,
            self.links,
            plane.staging.max_bytes,
        )
        pool = None if grammars is None else GrammarPool(grammars)
        self.runtime.connect(self.engine, self.fetches, pool)
        self._plane = plane
        self._timers: asyncio.Task[None] | None = None

    def start(self) -> None:
        self.engine.start()
        self._timers = asyncio.create_task(self.runtime.run_timers())

    def score(self, request: Request) -> AsyncGenerator[Scored]:
        """See `ScoreDesk.score`.

        Raises:
            BatonError: DRAINING.
        """
        if self.runtime.machine.is_draining:
            raise BatonError(Cause.DRAINING, "the worker is shutting down")
        return self.scores.score(request)

    def _post(self, command: Command) -> None:
        self.engine.post(command)

    def _step_age_ms(self) -> float:
        started_at = self.engine.step_started_at
        return 0.0 if started_at is None else max(time.monotonic() - started_at, 0.0) * 1e3

    @property
    def is_idle(self) -> bool:
        """No leg, lease or transfer is open."""
        transfers = self.fetches or self.runtime.exports
        return self.runtime.machine.is_idle and not transfers and not self.scores

    async def drain(self, timeout_s: float) -> None:
        """Admit nothing more; return when all is finished, or handed over at the deadline."""
        self.runtime.drain()
        if not await self._idle_within(timeout_s):
            log.warning("not drained within %.0f s: what is left goes to other workers", timeout_s)
            self.runtime.hand_over()
            await self._idle_within(LAST_WORDS_S)

    async def _idle_within(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                while not self.is_idle:  # noqa: ASYNC110 - a state of several parts
                    await asyncio.sleep(IDLE_LOOK_S)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Idempotent; legs that are still here end without a word."""
        if self._timers is not None:
            self._timers.cancel()
        self.runtime.close()
        await self.fetches.close()
        await self._plane.close()
        # The engine may be waiting for this loop to read its outputs.
        await asyncio.to_thread(self.engine.stop)


class _Learner:
    """An observer that teaches the model behind the predictions."""

    def __init__(self, model: LatencyModel) -> None:
        self._model = model

    def stepped(self, output: StepOutput) -> None:
        if output.timing is not None:
            self._model.observe(output.timing)

    def received(self, message: GatewayMessage) -> None:
        pass

    def sent(self, message: WorkerMessage) -> None:
        pass
