"""`baton serve` as a newcomer has it: a table, a command to paste, nothing left after Ctrl-C."""

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from harness import START_TIMEOUT_S, free_port, wait_until

pytestmark = pytest.mark.timeout(400)


class Serve:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.out, self.log = folder / "out", folder / "log"
        command = [sys.executable, "-m", "baton.cli", "serve", "--port", str(self.port)]
        command += ["--dtype", "float32", "--kv-cache-memory-bytes", "32MiB"]
        env = {name: value for name, value in os.environ.items() if name[:6] != "BATON_"}
        env |= {"TMPDIR": str(folder), "PYTHONSAFEPATH": "1"}
        with self.out.open("wb") as out, self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=log, env=env, start_new_session=True
            )

    def printed(self) -> str:
        assert self.process.poll() is None, self.log.read_text()
        return self.out.read_text()

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    with tempfile.TemporaryDirectory(prefix="bt-") as folder:
        serve = Serve(Path(folder))
        try:
            wait_until(lambda: "Ready. Try:" in serve.printed(), START_TIMEOUT_S, "ready")
            yield serve
        finally:
            for process in (
                [*serve.children(), serve.process] if serve.process.poll() is None else []
            ):
                process.kill()
            serve.process.wait()


def test_the_table_and_the_command_to_paste(serve: Serve) -> None:
    header, *rows = serve.printed().split("\n\n")[0].strip().splitlines()
    assert header.split() == ["ROLE", "PID", "ADDRESS", "TRANSPORT", "KV", "BLOCKS", "DEVICE"]
    found = {row.split()[0]: row.split()[1:] for row in rows}
    assert set(found) == {"gateway", "prefill", "decode", "redis"}
    pids = {child.pid for child in serve.children()}
    assert {int(columns[0]) for columns in found.values()} <= pids
    for role in ("prefill", "decode"):
        assert found[role][2] in {"shm", "ucx", "grpc"}, "shown once KV has travelled over it"
        assert int(found[role][3]) > 0
    command = re.search(r"curl .*\\\n.*", serve.printed())
    assert command is not None
    done = subprocess.run(
        command[0], shell=True, capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode == 127:
        pytest.skip("no curl")
    assert done.stdout.rstrip().endswith("data: [DONE]"), done


def test_what_dies_is_started_again_and_ctrl_c_leaves_nothing(serve: Serve) -> None:
    url = f"http://127.0.0.1:{serve.port}"
    children = {child.pid: child for child in serve.children()}
    workers = httpx.get(f"{url}/v1/cluster").json()["workers"]
    (victim,) = (worker["pid"] for worker in workers if worker["role"] == "prefill")
    children[victim].kill()

    def is_back() -> bool:
        found = httpx.get(f"{url}/v1/cluster").json()["workers"]
        up = {worker["role"]: worker["pid"] for worker in found if worker["state"] == "up"}
        return set(up) == {"prefill", "decode"} and up["prefill"] != victim

    wait_until(is_back, START_TIMEOUT_S, "another prefill worker is up")
    assert "prefill-0 killed by SIGKILL; restarting in 0.5 s" in serve.log.read_text()
    children |= {child.pid: child for child in serve.children()}
    serve.process.send_signal(signal.SIGINT)
    assert serve.process.wait(60) == 0
    assert not [child for child in children.values() if child.is_running()]
    assert {path.name for path in serve.folder.iterdir()} == {"out", "log"}
