"""The life of a worker process.

    load → start → serve … signal → drain → hand over what is left → exit 0

The first signal drains, a second one ends the process at once. A broken engine or machine ends it
with status 1, so that whoever supervises it starts another.
"""

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any, Protocol

import torch

from baton.build import load_tokenizer, runner_config
from baton.config import WorkerConfig
from baton.engine.loader import load_runner
from baton.engine.pooling_loader import load_pooling_runner
from baton.failpoints import Failpoints
from baton.kvtransfer.memory import keep_freed_memory
from baton.rpc import ClusterToken, RpcServer
from baton.worker.policy import WorkerPolicy
from baton.worker.pooling_process import PoolingProcess
from baton.worker.process import WorkerProcess

log = logging.getLogger(__name__)


class Process(Protocol):
    """What a worker process consists of: `start` once; then `drain` (or not); `close` ends
    everything, in any state."""

    async def start(self, token: ClusterToken, redis_url: str) -> asyncio.Future[Exception]:
        """Serve and register; the result is set when the worker breaks."""
        ...

    async def drain(self, timeout_s: float) -> None: ...

    async def close(self) -> None: ...


Load = Callable[[RpcServer, int, Failpoints, AsyncExitStack], Process]


def run(config: WorkerConfig, policy: WorkerPolicy) -> int:
    """Serve until a signal; returns the exit status."""

    def load(
        server: RpcServer, port: int, failpoints: Failpoints, stack: AsyncExitStack
    ) -> Process:
        runner = load_runner(runner_config(config, config), lambda: load_tokenizer(config))
        stack.callback(runner.close)
        return WorkerProcess(config, policy, failpoints, runner, server, port)

    return _run(config, load)


def run_pooling(config: WorkerConfig) -> int:
    """Serve a pooling model until a signal; returns the exit status."""

    def load(server: RpcServer, port: int, failpoints: Failpoints, _: AsyncExitStack) -> Process:
        runner = load_pooling_runner(runner_config(config, config))
        return PoolingProcess(config, failpoints, runner, server, port)

    return _run(config, load)


def _run(config: WorkerConfig, load: Load) -> int:
    assert config.redis_url is not None, "the command line sees to it"
    if config.failpoint and not config.test_hooks:
        log.error("--failpoint is for tests and needs --test-hooks")
        return 2
    keep_freed_memory()
    try:
        failpoints = Failpoints(config.failpoint)
        return asyncio.run(_serve(config, load, failpoints, config.redis_url))
    except (ValueError, OSError) as error:
        log.error("%s", error)
        return 2


async def _serve(config: WorkerConfig, load: Load, failpoints: Failpoints, redis_url: str) -> int:
    token = ClusterToken(tuple(secret.get_secret_value() for secret in config.cluster_token))
    server = RpcServer(token)
    port = server.bind(config.worker_host, config.worker_port)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    async with AsyncExitStack() as stack:
        # Blocks the loop on purpose: nothing is served yet, and a signal ends the load at once.
        process = load(server, port, failpoints, stack)
        told_to_stop = _listen_to_signals()
        stack.push_async_callback(process.close)
        failed = await process.start(token, redis_url)
        if failpoints:
            asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, failpoints.count)
        # What is here stays: a collection that walks all of torch's modules would pause the steps.
        gc.collect()
        gc.freeze()
        ends: set[asyncio.Future[Any]] = {told_to_stop, failed}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if failed.done():
            log.error("the worker is broken: %r", failed.result())
            return 1
        log.info("draining; a second signal ends at once")
        await process.drain(config.worker_drain_timeout_s)
    log.info("drained")
    return 0


def _listen_to_signals() -> asyncio.Future[None]:
    """Set by the first signal; the second ends the process."""
    loop = asyncio.get_running_loop()
    told: asyncio.Future[None] = loop.create_future()

    def on_signal() -> None:
        if told.done():
            log.warning("second signal: ending at once")
            os._exit(1)
        told.set_result(None)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    return told
