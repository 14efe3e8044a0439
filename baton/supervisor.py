"""Keeps a set of child processes running: restarts with back-off, drains in order, leaves nothing.

Children get their own session, so that the terminal's Ctrl-C reaches only the supervisor, and the
kernel's parent-death signal, so that none outlives it even when it is killed.
"""

import asyncio
import ctypes
import logging
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
STABLE_S = 30.0  # a child that lived this long starts over with the first back-off
BAD_SETTINGS = 2  # exit status of a process of ours that its settings keep from starting

MayRestart = Callable[[str, int], bool]  # name and exit status of a child that ended by itself


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """One process to keep alive. `env` is the whole environment; `stop_s` how long it may drain."""

    name: str
    command: Sequence[str]
    env: Mapping[str, str]
    stop_s: float


def bind_to_parent() -> Callable[[], None]:
    libc = ctypes.CDLL(None, use_errno=True)  # loaded before fork: dlopen after it may deadlock

    def in_child() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    return in_child


class Child:
    """One supervised process; owned by `Supervisor`."""

    def __init__(self, spec: ChildSpec, may_restart: MayRestart) -> None:
        self.spec = spec
        self._may_restart = may_restart
        self.process: asyncio.subprocess.Process | None = None
        self.num_restarts = 0
        self._backoff_s = FIRST_BACKOFF_S
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process and self.process.returncode is None else None

    def start(self) -> None:
        self._task = asyncio.create_task(self._keep_running())

    async def _keep_running(self) -> None:
        bind = bind_to_parent()
        while True:
            started = time.monotonic()
            self.process = await asyncio.create_subprocess_exec(
                *self.spec.command,
                env=dict(self.spec.env),
                stdin=asyncio.subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=bind,
            )
            code = await self.process.wait()
            if not self._may_restart(self.spec.name, code):
                return
            if time.monotonic() - started > STABLE_S:
                self._backoff_s = FIRST_BACKOFF_S
            log.warning("%s %s; restarting in %.1f s", self.spec.name, _how(code), self._backoff_s)
            await asyncio.sleep(self._backoff_s)
            self._backoff_s = min(self._backoff_s * 2, MAX_BACKOFF_S)
            self.num_restarts += 1

    async def stop(self) -> None:
        """SIGTERM, wait for the drain, SIGKILL. No restart happens any more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        process = self.process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            async with asyncio.timeout(self.spec.stop_s):
                await process.wait()
        except TimeoutError:
            log.warning("%s did not stop within %.0f s; killed", self.spec.name, self.spec.stop_s)
            process.kill()
            await process.wait()

    def kill(self) -> None:
        if self._task is not None:
            self._task.cancel()
        if self.pid is not None and self.process is not None:
            self.process.kill()


def _how(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"


class Supervisor:
    """Starts children in order, stops those that it is told to, side by side."""

    def __init__(self, may_restart: MayRestart = lambda _name, _status: True) -> None:
        self.children: dict[str, Child] = {}
        self._may_restart = may_restart

    def start(self, spec: ChildSpec) -> Child:
        child = Child(spec, self._may_restart)
        self.children[spec.name] = child
        child.start()
        return child

    async def stop(self, *names: str) -> None:
        """Stop these children side by side; all that are left when none is named."""
        chosen = names or tuple(self.children)
        await asyncio.gather(*(self.children[name].stop() for name in chosen))
        for name in chosen:  # only now: `kill_all` also ends what drains
            del self.children[name]

    def kill_all(self) -> None:
        for child in self.children.values():
            child.kill()
