import asyncio
import os
import signal
import sys
from pathlib import Path

import psutil

from baton.supervisor import BAD_SETTINGS, ChildSpec, Supervisor


def _spec(name: str, code: str, stop_s: float = 5.0) -> ChildSpec:
    return ChildSpec(name, [sys.executable, "-c", code], dict(os.environ), stop_s)


async def test_a_child_that_dies_is_restarted_and_said_so(tmp_path: Path, caplog, until) -> None:
    marker = tmp_path / "starts"
    code = f"open({str(marker)!r}, 'a').write('x'); import time; time.sleep(60)"
    supervisor = Supervisor()
    child = supervisor.start(_spec("worker", code))
    await until(lambda: marker.exists() and child.pid is not None)
    first = child.pid
    os.kill(first, signal.SIGKILL)
    await until(lambda: child.num_restarts == 1 and child.pid not in (None, first))
    assert "worker killed by SIGKILL; restarting" in caplog.text
    await supervisor.stop()
    assert child.pid is None
    assert not supervisor.children


async def test_stop_drains_then_kills(tmp_path: Path, until) -> None:
    drained = tmp_path / "drained"
    polite = (
        "import signal, sys, time\n"
        f"def bye(*_): open({str(drained)!r}, 'w').close(); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, bye)\n"
        "print('up', flush=True); time.sleep(60)"
    )
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    supervisor = Supervisor()
    children = [
        supervisor.start(_spec("polite", polite)),
        supervisor.start(_spec("stubborn", stubborn, stop_s=0.5)),
    ]
    await until(lambda: all(child.pid for child in children))
    await asyncio.sleep(0.5)  # let both install their handlers
    pids = [child.pid for child in children]
    await supervisor.stop()
    assert drained.exists()
    assert not any(psutil.pid_exists(pid) for pid in pids)


async def test_who_owns_it_decides_whether_a_child_that_ended_is_restarted(until) -> None:
    asked = []

    def may_restart(name: str, status: int) -> bool:
        asked.append((name, status))
        return False

    supervisor = Supervisor(may_restart)
    child = supervisor.start(_spec("worker", f"raise SystemExit({BAD_SETTINGS})"))
    await until(lambda: asked)
    await asyncio.sleep(0)
    assert asked == [("worker", BAD_SETTINGS)]
    assert child.pid is None
    assert child.num_restarts == 0
    await supervisor.stop()


async def test_kill_all_also_ends_what_drains(until) -> None:
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('up', flush=True); time.sleep(60)"
    )
    supervisor = Supervisor()
    child = supervisor.start(_spec("stubborn", stubborn, stop_s=60))
    await until(lambda: child.pid)
    await asyncio.sleep(0.5)  # until it ignores SIGTERM
    stopping = asyncio.create_task(supervisor.stop("stubborn"))
    await asyncio.sleep(0.05)
    assert not stopping.done()
    supervisor.kill_all()
    async with asyncio.timeout(20):
        await stopping


async def test_children_die_with_the_supervisor(tmp_path: Path, until) -> None:
    pid_file = tmp_path / "pid"
    code = (
        "import asyncio, os, sys\n"
        "from baton.supervisor import ChildSpec, Supervisor\n"
        "async def main():\n"
        f"    c = Supervisor().start(ChildSpec('c', ['sleep', '60'], dict(os.environ), 1))\n"
        "    while c.pid is None: await asyncio.sleep(0.01)\n"
        f"    open({str(pid_file)!r}, 'w').write(str(c.pid))\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())"
    )
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    await until(lambda: pid_file.exists() and pid_file.read_text())
    pid = int(pid_file.read_text())
    parent.kill()
    await parent.wait()
    await until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie")
