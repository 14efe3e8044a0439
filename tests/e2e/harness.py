"""A fleet of real processes on free ports, whose members a test may kill, stop and start one by
one.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from baton.redis_server import redis_command, redis_url

START_TIMEOUT_S = 150.0
MAX_SILENCE_S = 3.0  # of a stream, whatever happens: a silent worker counts as dead after 2.5 s
SLACK_S = 4.0  # two cores for everything


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {timeout_s:.0f} s: {what}")


def bearable_silence_s(slack_s: float = SLACK_S) -> float:
    """Of a stream. A machine that has n times as much to do as it can do is n times as slow."""
    return (MAX_SILENCE_S + slack_s) * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


@contextmanager
def slowed(pid: int, share: float = 0.1) -> Iterator[None]:
    """The process gets this share of its time, in turns of about a step: a few long steps among
    many short ones would pass for outliers, and it would not be taken to be slow."""
    is_over = threading.Event()

    def take_turns() -> None:
        while not is_over.is_set():
            os.kill(pid, signal.SIGSTOP)
            is_over.wait(0.02 * (1 - share))
            os.kill(pid, signal.SIGCONT)
            is_over.wait(0.02 * share)

    thread = threading.Thread(target=take_turns)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


@dataclass
class Completion:
    """What a streamed completion gave: token ids per choice, and whether it ended well."""

    token_ids: dict[int, list[int]] = field(default_factory=dict)
    finish_reasons: dict[int, str] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    done: bool = False
    longest_silence_s: float = 0.0  # without a token, from the request to the end


class FleetUnderTest:
    """Gateway, workers and Redis. `env` is added to every process, `worker_env[name]` to one."""

    def __init__(self, directory: Path, model: str, env: dict[str, str]) -> None:
        self.directory = directory
        self.env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        self.env |= {"PYTHONSAFEPATH": "1", "BATON_MODEL": model, "BATON_THREADS": "1"}
        self.env |= {"BATON_REDIS_URL": redis_url(directory), **env}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.logs: dict[str, Path] = {}
        self.port = free_port()
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60.0)

    # ── processes ────────────────────────────────────────────────────────────────────────────

    def start_redis(self) -> None:
        self._spawn("redis", redis_command(self.directory), {})

    def start_gateway(self, **env: str) -> None:
        self._baton("gateway", "gateway", {"BATON_PORT": str(self.port), **env})

    def start_worker(self, name: str, **env: str) -> None:
        """`name` is "prefill-0", "decode-1", …; its start decides the role."""
        self._baton(name, f"{name.partition('-')[0]}-worker", {"BATON_WORKER_ID": name, **env})

    def start(self, *workers: str) -> "FleetUnderTest":
        self.start_redis()
        for name in workers:
            self.start_worker(name)
        self.start_gateway()
        self.wait_ready()
        return self

    def _baton(self, name: str, command: str, env: dict[str, str]) -> None:
        self._spawn(name, [sys.executable, "-m", "baton.cli", command], env)

    def _spawn(self, name: str, command: list[str], env: dict[str, str]) -> None:
        self.logs[name] = self.directory / f"{name}.log"
        with self.logs[name].open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, env=self.env | env, stdout=log, stderr=log, start_new_session=True
            )

    def pid(self, name: str) -> int:
        return self.processes[name].pid

    def kill(self, name: str) -> None:
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def stop(self, name: str) -> None:
        """SIGSTOP, proven."""
        os.kill(self.pid(name), signal.SIGSTOP)
        wait_until(
            lambda: psutil.Process(self.pid(name)).status() == psutil.STATUS_STOPPED, 5, "stopped"
        )

    def cont(self, name: str) -> None:
        os.kill(self.pid(name), signal.SIGCONT)

    def terminate(self, name: str, timeout_s: float = 40.0) -> int:
        """SIGTERM; the exit status."""
        process = self.processes.pop(name)
        process.terminate()
        return process.wait(timeout_s)

    def close(self) -> None:
        self.client.close()
        for name in ("gateway", *(n for n in self.processes if n not in ("gateway", "redis"))):
            if name in self.processes:
                self.processes[name].send_signal(signal.SIGCONT)
                self.kill(name)
        if "redis" in self.processes:
            self.kill("redis")

    def log_tail(self, name: str, num_chars: int = 3000) -> str:
        return self.logs[name].read_text(errors="replace")[-num_chars:]

    @contextmanager
    def expect_log(self, name: str, text: str) -> Iterator[None]:
        """By the end of the block, or soon after, the process writes `text` to its log."""
        start = len(self.logs[name].read_text(errors="replace"))
        yield
        wait_until(
            lambda: text in self.logs[name].read_text(errors="replace")[start:],
            START_TIMEOUT_S,
            f"{name} says {text!r}",
        )

    # ── state ────────────────────────────────────────────────────────────────────────────────

    def wait_ready(self) -> None:
        try:
            wait_until(self._healthy, START_TIMEOUT_S, "the fleet is ready")
        except AssertionError as error:
            tails = "\n".join(f"── {name}\n{self.log_tail(name)}" for name in self.logs)
            raise AssertionError(f"{error}\n{tails}") from None

    def _healthy(self) -> bool:
        for name, process in self.processes.items():
            if process.poll() is not None:
                raise AssertionError(f"{name} exited with {process.returncode}")
        try:
            return self.client.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def cluster(self) -> dict[str, Any]:
        return dict(self.client.get("/v1/cluster").raise_for_status().json())

    def wait_workers(self, *names: str) -> None:
        wait_until(
            lambda: (
                {w["worker_id"] for w in self.cluster()["workers"] if w["state"] == "up"}
                >= set(names)
            ),
            START_TIMEOUT_S,
            f"{names} up",
        )

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a series of the gateway over all label sets that contain `labels`."""
        total = 0.0
        for line in self.client.get("/metrics").text.splitlines():
            series, _, value = line.rpartition(" ")
            if series.split("{")[0] == name and all(
                f'{k}="{v}"' in series for k, v in labels.items()
            ):
                total += float(value)
        return total

    def assert_no_leak(self, timeout_s: float = 15.0) -> None:
        """At idle every block of every worker that is up is free and no lease is open."""

        def clean() -> bool:
            workers = [w for w in self.cluster()["workers"] if w["state"] == "up"]
            return all(
                w["kv_blocks"]["free"] == w["kv_blocks"]["total"]
                and w["load"]["leases"] == 0
                and w["load"]["running"] == 0
                and w["load"]["waiting"] == 0
                and w["load"]["waiting_for_kv"] == 0
                for w in workers
            )

        try:
            wait_until(clean, timeout_s, "no leak")
        except AssertionError:
            raise AssertionError(f"leak: {json.dumps(self.cluster(), indent=1)}") from None

    # ── requests ─────────────────────────────────────────────────────────────────────────────

    def complete(
        self, body: dict[str, Any], on_token: Callable[[int], None] | None = None
    ) -> Completion:
        """Stream /v1/completions to its end; `on_token(count)` runs after chunks with tokens."""
        result = Completion()
        body = {"model": self.model_name(), "stream": True, "return_token_ids": True, **body}
        body.setdefault("stream_options", {"include_usage": True})
        count = 0
        last = time.monotonic()
        for event in self._events(body):
            if event == "[DONE]":
                result.done = True
                result.longest_silence_s = max(result.longest_silence_s, time.monotonic() - last)
                break
            data = json.loads(event)
            if "error" in data:
                result.error = data["error"]
                break
            result.usage = data.get("usage") or result.usage
            for choice in data.get("choices", []):
                ids = choice.get("token_ids") or []
                result.token_ids.setdefault(choice["index"], []).extend(ids)
                if choice.get("finish_reason"):
                    result.finish_reasons[choice["index"]] = choice["finish_reason"]
                if ids:
                    now = time.monotonic()
                    result.longest_silence_s = max(result.longest_silence_s, now - last)
                    last = now
                    count += len(ids)
                    if on_token is not None:
                        on_token(count)
        return result

    def _events(self, body: dict[str, Any]) -> Iterator[str]:
        with self.client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                yield json.dumps({"error": response.json().get("error", {})})
                return
            for line in response.iter_lines():
                if line.startswith("data: "):
                    yield line.removeprefix("data: ")

    def model_name(self) -> str:
        return str(self.client.get("/v1/models").json()["data"][0]["id"])


def new_directory() -> tempfile.TemporaryDirectory[str]:
    # pytest's own tmp_path can be longer than a unix socket's name may be.
    return tempfile.TemporaryDirectory(prefix="bt-")
