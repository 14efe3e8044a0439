"""What a pooling worker's process consists of around its loaded model."""

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import suppress

from baton.config import WorkerConfig
from baton.engine.pooling_core import AddJob, PoolingCore, PoolingOutput, PoolingRow
from baton.engine.pooling_runner import PoolingRunner
from baton.engine.pooling_thread import PoolingThread
from baton.errors import Cause
from baton.failpoints import Failpoints
from baton.latency import LatencyModel
from baton.pooling import PoolingInput
from baton.rpc import ClusterToken, RpcServer
from baton.types import WorkerSnapshot
from baton.worker.engine import StepWatch
from baton.worker.identity import describe_pooling_worker
from baton.worker.metrics import MetricsServer
from baton.worker.pooling_desk import PoolingDesk
from baton.worker.pooling_service import PoolingService
from baton.worker.process import SERVER_GRACE_S
from baton.worker.registration import Registration
from baton.worker.service import SERVICES

log = logging.getLogger(__name__)

IDLE_LOOK_S = 0.05
WARM_UP_STEPS = 8
WARM_UP_TOKENS = 32


class _FailingRunner:
    """With a failpoint in front of every step."""

    def __init__(self, runner: PoolingRunner, failpoints: Failpoints) -> None:
        self._runner = runner
        self._failpoints = failpoints

    def run(self, rows: Sequence[PoolingRow]) -> list[bytes | None]:
        self._failpoints.hit("engine-step")
        return self._runner.run(rows)


class PoolingProcess:
    """See `baton.worker.main.Process`."""

    def __init__(
        self,
        config: WorkerConfig,
        failpoints: Failpoints,
        runner: PoolingRunner,
        server: RpcServer,
        port: int,
    ) -> None:
        """
        Args:
            server: bound to `port`, not started.
        """
        self._config = config
        self._failpoints = failpoints
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._failed: asyncio.Future[Exception] = self._loop.create_future()
        self._info = describe_pooling_worker(config, runner, port)
        failing = _FailingRunner(runner, failpoints) if failpoints else runner
        core = PoolingCore(failing, config.max_num_batched_tokens, config.max_num_seqs)
        self._latency = LatencyModel()
        _warm_up(core, self._latency, runner.info.vocab_size, runner.info.max_model_len)
        self._engine = PoolingThread(core, self._post_output, self._post_failure)
        self._desk = PoolingDesk(self._info, self._engine.post)
        self._metrics = MetricsServer(config.worker_host, config.metrics_port)
        self._registration: Registration | None = None
        self._watching: asyncio.Task[None] | None = None

    async def start(self, token: ClusterToken, redis_url: str) -> asyncio.Future[Exception]:
        """Serve and register; the result is set when the worker breaks."""
        config, info = self._config, self._info
        service = PoolingService(info, self._desk, self._snapshot, self._failpoints)
        service.add_to(self._server.grpc)
        self._engine.start()
        await self._server.start(SERVICES)
        watch = StepWatch(self._engine, self._latency, config, info.max_model_len)
        self._watching = asyncio.create_task(watch.run(self._set_well))
        self._registration = Registration(config, redis_url, info)
        self._registration.start()
        log.info(
            "%s: %s at %s, %s on %s, metrics on port %d",
            info.worker_id,
            info.model,
            info.address,
            ", ".join(info.capabilities),
            info.device,
            self._metrics.port,
        )
        return self._failed

    async def _set_well(self, is_well: bool) -> None:
        self._desk.tell_stuck(not is_well)
        await self._server.set_serving(is_well)

    def _snapshot(self) -> WorkerSnapshot:
        started_at = self._engine.step_started_at
        age_s = 0.0 if started_at is None else max(time.monotonic() - started_at, 0.0)
        return self._desk.snapshot(age_s * 1e3)

    def _post_output(self, output: PoolingOutput) -> None:
        """On the engine's thread."""
        self._loop.call_soon_threadsafe(self._on_output, output)

    def _on_output(self, output: PoolingOutput) -> None:
        self._latency.observe(output.timing)
        self._desk.on_output(output)
        self._metrics.observer.pooled(output, self._snapshot())

    def _post_failure(self, error: Exception) -> None:
        """On the engine's thread: it is over."""
        self._loop.call_soon_threadsafe(self._failed.set_result, error)

    async def drain(self, timeout_s: float) -> None:
        """Take nothing more; return when all is answered, or at the deadline."""
        self._desk.is_draining = True
        if self._registration is not None:
            await self._registration.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._desk:  # noqa: ASYNC110 - looked at rarely
                    await asyncio.sleep(IDLE_LOOK_S)

    async def close(self) -> None:
        """Idempotent."""
        if self._watching is not None:
            self._watching.cancel()
            with suppress(asyncio.CancelledError):
                await self._watching
            await self._server.set_serving(False)
        if self._registration is not None:
            await self._registration.close()
        await self._server.stop(SERVER_GRACE_S)
        await asyncio.to_thread(self._engine.stop)
        self._metrics.close()


def _warm_up(core: PoolingCore, latency: LatencyModel, vocab_size: int, longest: int) -> None:
    """Steps before the first request, which teach how long one may take.

    Raises:
        ValueError: the model does not work.
    """
    num_tokens = min(WARM_UP_TOKENS, vocab_size, longest)
    row = PoolingRow(PoolingInput(tuple(range(num_tokens))))
    for _ in range(WARM_UP_STEPS):
        core.apply(AddJob(0, (row,)))
        output = core.step()
        assert output is not None, "there was a job"
        (result,) = output.results
        if isinstance(result.value, Cause):
            raise ValueError(f"the model does not work: {result.value.name.lower()}")
        latency.observe(output.timing)
