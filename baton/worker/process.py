"""What a worker process consists of around its loaded model."""

import asyncio
import logging
from contextlib import suppress

from baton.build import engine_config
from baton.config import WorkerConfig
from baton.engine.core import EngineCore
from baton.engine.runner import ModelRunner
from baton.failpoints import Failpoints
from baton.grants import GrantKeys
from baton.kvtransfer.memory import KVMemory
from baton.rpc import ClusterToken, RpcServer
from baton.tracing import make_tracer
from baton.types import WorkerInfo
from baton.worker.data_plane import DataPlane, make_data_plane
from baton.worker.engine import FailingRunner, StepWatch
from baton.worker.identity import advertised_host, describe_worker
from baton.worker.metrics import MetricsServer
from baton.worker.policy import WorkerPolicy
from baton.worker.probing import probe_first_peers, probe_links
from baton.worker.registration import Registration
from baton.worker.runtime import Observer
from baton.worker.service import SERVICES, WorkerService
from baton.worker.spans import LegSpans
from baton.worker.worker import Worker

log = logging.getLogger(__name__)

SERVER_GRACE_S = 1.0


class WorkerProcess:
    """`start` once; then `drain` (or not); `close` ends everything, in any state."""

    def __init__(
        self,
        config: WorkerConfig,
        policy: WorkerPolicy,
        failpoints: Failpoints,
        runner: ModelRunner,
        server: RpcServer,
        port: int,
    ) -> None:
        """
        Args:
            server: bound to `port`, not started.
        """
        self._config = config
        self._policy = policy
        self._failpoints = failpoints
        self._runner = runner
        self._server = server
        self._address = f"{advertised_host(config)}:{port}"
        self._metrics = MetricsServer(config.worker_host, config.metrics_port)
        self._tracer = make_tracer(config.otlp_traces_endpoint, f"baton-{policy.role}")
        self._plane: DataPlane | None = None
        self._worker: Worker | None = None
        self._service: WorkerService | None = None
        self._registration: Registration | None = None
        self._watching: asyncio.Task[None] | None = None
        self._probing: asyncio.Task[None] | None = None

    async def start(self, token: ClusterToken, redis_url: str) -> asyncio.Future[Exception]:
        """Serve and register; the result is set when the worker breaks.

        Raises:
            ValueError: the settings contradict each other.
        """
        runner = self._runner
        memory = KVMemory(runner.kv_cache.tensor, runner.kv_cache.layout)
        self._plane = plane = make_data_plane(
            memory,
            self._config.transports,
            self._server.grpc,
            token,
            self._address,
            self._config.kv_staging_memory_bytes,
        )
        transports = await plane.start()
        info = describe_worker(self._config, self._policy.role, runner, self._address, transports)
        self._registration = Registration(self._config, redis_url, info)
        keys = GrantKeys(self._config.cluster, token.secrets)
        self._worker = worker = self._make_worker(info, plane, keys, self._registration)
        self._service = WorkerService(worker.runtime, self._registration.inventory, worker.score)
        self._service.add_to(self._server.grpc)
        worker.start()
        await self._server.start(SERVICES)
        self._watching = asyncio.create_task(
            StepWatch(worker.engine, worker.latency, self._config).run(self._server.set_serving)
        )
        await self._join(info, plane, worker, self._registration)
        log.info(
            "%s: %s at %s, %d KV blocks on %s, metrics on port %d",
            info.worker_id,
            info.model,
            info.address,
            info.num_blocks,
            info.device,
            self._metrics.port,
        )
        return worker.runtime.failed

    def _make_worker(
        self, info: WorkerInfo, plane: DataPlane, keys: GrantKeys, registration: Registration
    ) -> Worker:
        """The engine and what goes on around it; the metrics and spans watch it."""
        runner = self._runner
        failing = FailingRunner(runner, self._failpoints) if self._failpoints else runner
        core = EngineCore(engine_config(self._config, runner, self._policy.role), failing)
        observers: list[Observer] = [self._metrics.observer, registration]
        plane.exports.tracer = self._tracer
        if self._tracer is not None:
            observers.append(LegSpans(self._tracer, info.worker_id))
        worker = Worker(
            info, self._policy, core, plane, keys, observers, self._failpoints, runner.grammars
        )
        runtime = worker.runtime
        self._metrics.observer.watch(
            runtime.machine.producer, runtime.exports, worker.fetches, plane.staging
        )
        return worker

    async def _join(
        self, info: WorkerInfo, plane: DataPlane, worker: Worker, registration: Registration
    ) -> None:
        """Measure the links to whoever is there, and be found from now on."""
        await probe_links(await registration.peers(), info, plane.transports, worker.links)
        registration.start()
        self._probing = asyncio.create_task(
            probe_first_peers(registration.peers, info, plane.transports, worker.links)
        )

    async def drain(self, timeout_s: float) -> None:
        """Admit nothing more, finish what is here, hand over the rest at the deadline."""
        assert self._worker is not None, "started"
        assert self._registration is not None
        await _cancelled(self._probing)
        # A Redis that does not answer holds up nothing: gateways hear it from the session.
        await asyncio.gather(self._registration.close(), self._worker.drain(timeout_s))

    async def close(self) -> None:
        """Idempotent."""
        await _cancelled(self._probing)
        if self._watching is not None:
            await _cancelled(self._watching)
            await self._server.set_serving(False)
        if self._registration is not None:
            await self._registration.close()
        if self._service is not None:
            await self._service.close()
        if self._worker is not None:
            await self._worker.close()
        elif self._plane is not None:
            await self._plane.close()
        await self._server.stop(SERVER_GRACE_S)
        self._metrics.close()
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)


async def _cancelled(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
