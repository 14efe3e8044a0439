"""`baton serve`: a whole fleet on this host, under one supervisor.

Order of start: Redis, workers and gateway side by side. Order of stop: gateway (it drains its
streams while the workers still serve them), workers, Redis. A process whose settings cannot work
ends the fleet while it starts; once the fleet is up, whatever dies is started again.
"""

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import urllib.error
import urllib.request
from typing import Any

from baton.config import ServeConfig, to_env
from baton.engine.pooling_config import is_pooling
from baton.errors import InvalidRequest
from baton.gpus import assign_gpus, visible_gpus
from baton.redis_server import RedisFolder, redis_command, redis_url
from baton.supervisor import BAD_SETTINGS, ChildSpec, Supervisor

log = logging.getLogger(__name__)

POLL_S = 0.25
GRACE_S = 5.0
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # how this host reaches "everywhere"
# An idle OpenMP thread must sleep, not spin: an idle fleet costs next to nothing.
_OWN_SETTINGS = {"BATON_PREFILL_WORKERS", "BATON_DECODE_WORKERS", "BATON_POOLING_WORKERS"}
_PASSIVE_WAIT = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "GOMP_SPINCOUNT": "0"}


class Fleet:
    """Builds the children's command lines and environments from one ServeConfig."""

    def __init__(self, config: ServeConfig, *, is_pooling: bool = False) -> None:
        """
        Args:
            is_pooling: the model embeds or scores: it has pooling workers and no others.

        Raises:
            InvalidRequest: there are to be no workers, or the port is taken.
            BatonError: there is no place for a private Redis.
        """
        self.config = config
        self.is_pooling = is_pooling
        self.is_up = False  # set by `announce`
        self.stopping = asyncio.Event()
        self.supervisor = Supervisor(self._may_restart)
        self.worker_names = _worker_names(config, is_pooling)
        self.port = free_port(config.host, config.port)
        self._folder = RedisFolder()
        self.redis_url = config.redis_url or redis_url(self._folder.path)
        gpus = [] if config.device == "cpu" else visible_gpus(os.environ)
        self._gpu_env = assign_gpus(self.worker_names, gpus, config.gpu_memory_utilization)

    @property
    def base_url(self) -> str:
        host = _LOOPBACK.get(self.config.host, self.config.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def start(self) -> None:
        if self.config.redis_url is None:
            command = redis_command(self._folder.path)
            self.supervisor.start(ChildSpec("redis", command, dict(os.environ), GRACE_S))
        for name in self.worker_names:
            self.supervisor.start(self._worker(name))
        self.supervisor.start(self._gateway())

    def _worker(self, name: str) -> ChildSpec:
        threads = self.config.threads or max(1, _num_cores() // max(1, len(self.worker_names)))
        env = self._env() | _PASSIVE_WAIT
        env |= {"BATON_WORKER_ID": name, "BATON_THREADS": str(threads)}
        env |= {"OMP_NUM_THREADS": str(threads)} | self._gpu_env.get(name, {})
        command = f"{name.rsplit('-', 1)[0]}-worker"
        return self._spec(name, command, env, self.config.worker_drain_timeout_s)

    def _gateway(self) -> ChildSpec:
        env = self._env() | {"BATON_PORT": str(self.port)}
        return self._spec("gateway", "gateway", env, self.config.drain_timeout_s)

    @staticmethod
    def _spec(name: str, command: str, env: dict[str, str], drain_s: float) -> ChildSpec:
        return ChildSpec(name, [sys.executable, "-m", "baton.cli", command], env, drain_s + GRACE_S)

    def _env(self) -> dict[str, str]:
        env = {k: v for k, v in os.environ.items() if not k.startswith("BATON_")}
        own = {
            name: value for name, value in to_env(self.config).items() if name not in _OWN_SETTINGS
        }
        own |= {"BATON_REDIS_URL": self.redis_url, "BATON_PRINT_CONFIG": "false"}
        # TMPDIR: what a killed worker leaves goes with the fleet.
        return env | own | {"PYTHONSAFEPATH": "1", "TMPDIR": str(self._folder.path)}

    def _may_restart(self, name: str, status: int) -> bool:
        ended_by_itself = status > 0
        if name == "redis" and ended_by_itself and (words := self._folder.last_words()):
            log.warning("the last that redis said: %s", words)
        if self.is_up or status != BAD_SETTINGS:
            return True
        log.error("%s cannot start like this; stopping", name)
        self.stopping.set()
        return False

    async def stop(self) -> None:
        for names in (("gateway",), tuple(self.worker_names), ("redis",)):
            present = [name for name in names if name in self.supervisor.children]
            if present:
                await self.supervisor.stop(*present)

    def clean(self) -> None:
        self._folder.remove()

    def get(self, path: str) -> Any | None:
        """JSON from the gateway; None while it does not answer 200."""
        request = urllib.request.Request(self.base_url + path)
        if self.config.api_key:
            key = self.config.api_key[0].get_secret_value()
            request.add_header("Authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return json.loads(answer.read() or b"null") or {}
        except (urllib.error.URLError, OSError, ValueError):
            return None


def _worker_names(config: ServeConfig, is_pooling: bool) -> list[str]:
    if is_pooling:
        flags, names = "--pooling-workers", [f"pooling-{i}" for i in range(config.pooling_workers)]
    else:
        flags = "--prefill-workers, --decode-workers"
        names = [f"prefill-{i}" for i in range(config.prefill_workers)]
        names += [f"decode-{i}" for i in range(config.decode_workers)]
    if not names:
        raise InvalidRequest(f"nothing to serve with: 0 for {flags}", flags)
    return names


def free_port(host: str, port: int = 0) -> int:
    """`port` if it can be listened on, any free one if it is 0."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family) as probe:
            return int(probe.getsockname()[1])
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]
        raise InvalidRequest(f"cannot listen on {host}:{port}: {reason}", "port") from error


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


async def serve(config: ServeConfig) -> int:
    """Run the fleet until a signal; returns the exit status. A second signal kills at once.

    Raises:
        InvalidRequest: it cannot be started with these settings.
    """
    source, revision = config.model_source, config.revision
    pools = await asyncio.to_thread(is_pooling, source, revision, config.runner)
    fleet = Fleet(config, is_pooling=pools)
    is_told = False

    def on_signal() -> None:
        nonlocal is_told
        if fleet.stopping.is_set():
            fleet.supervisor.kill_all()
        else:
            log.info("draining; press Ctrl-C again to stop at once")
            is_told = True
            fleet.stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    try:
        fleet.start()
        announced = asyncio.create_task(announce(fleet))
        await fleet.stopping.wait()
        announced.cancel()
        await fleet.stop()
    finally:
        fleet.supervisor.kill_all()
        fleet.clean()
    return 0 if is_told else BAD_SETTINGS


async def announce(fleet: Fleet) -> None:
    """Once everybody is there and a route is proven: one table and a command to paste."""
    cluster: dict[str, Any] = {}
    while not _is_complete(fleet, cluster):
        await asyncio.sleep(POLL_S)
        answer = await asyncio.to_thread(fleet.get, "/v1/cluster")
        cluster = answer or {}
    models = await asyncio.to_thread(fleet.get, "/v1/models")
    fleet.is_up = True
    print(render_table(fleet, cluster), flush=True)
    print(render_curl(fleet, models or {}), flush=True)


def _is_complete(fleet: Fleet, cluster: dict[str, Any]) -> bool:
    up = {w["worker_id"] for w in cluster.get("workers", []) if w["state"] == "up"}
    roles = {name.partition("-")[0] for name in fleet.worker_names}
    # A link appears with the first KV that travelled: until then no transport is in use.
    is_linked = bool(cluster.get("links")) or not roles >= {"prefill", "decode"}
    return bool(cluster.get("ready")) and is_linked and up >= set(fleet.worker_names)


def render_table(fleet: Fleet, cluster: dict[str, Any]) -> str:
    """role, pid, address, transport in use, KV blocks, device; a row per process."""
    transports: dict[str, str] = {}
    for link in cluster.get("links", []):
        transports[link["source"]] = transports[link["target"]] = link["transport"]
    rows = [("ROLE", "PID", "ADDRESS", "TRANSPORT", "KV BLOCKS", "DEVICE")]
    gateway = fleet.supervisor.children["gateway"]
    rows.append(("gateway", str(gateway.pid), fleet.base_url, "-", "-", "-"))
    for worker in cluster.get("workers", []):
        rows.append(
            (
                worker["role"],
                str(worker["pid"]),
                worker["address"],
                transports.get(worker["worker_id"], "-"),
                str(worker["kv_blocks"]["total"]),
                worker["device"],
            )
        )
    if "redis" in fleet.supervisor.children:
        redis = fleet.supervisor.children["redis"]
        rows.append(("redis", str(redis.pid), fleet.redis_url, "-", "-", "-"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n" + "\n".join(line.rstrip() for line in lines)


def render_curl(fleet: Fleet, models: dict[str, Any]) -> str:
    data = models.get("data") or [{"id": "default"}]
    task = data[0].get("task")
    body: dict[str, Any] = {"model": data[0]["id"]}
    if task is None:
        path, body = "v1/completions", body | {"prompt": "def ", "max_tokens": 64}
        body |= {"temperature": 0, "stream": True}
    elif task == "embed":
        path, body = "v1/embeddings", body | {"input": "A relay race"}
    else:
        path, body = "score", body | {"text_1": "relay race", "text_2": "Four runners, a baton."}
    auth = " -H 'Authorization: Bearer '$BATON_API_KEY" if fleet.config.api_key else ""
    return (
        f"\nReady. Try:\n\n  curl -N {fleet.base_url}/{path}{auth}"
        f" -H 'Content-Type: application/json' \\\n    -d '{json.dumps(body)}'\n"
    )
