"""`baton serve` without its processes; with them: tests/e2e."""

import asyncio
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.config import ServeConfig
from baton.errors import BatonError, InvalidRequest
from baton.fleet import Fleet, render_curl, render_table, serve
from baton.redis_server import RedisFolder, redis_command
from baton.supervisor import BAD_SETTINGS, ChildSpec

CLUSTER = {
    "ready": True,
    "workers": [
        {
            "worker_id": f"{role}-0",
            "role": role,
            "state": "up",
            "pid": 7,
            "address": "127.0.0.1:9",
            "kv_blocks": {"total": 64},
            "device": "cpu",
        }
        for role in ("prefill", "decode")
    ],
    "links": [{"source": "prefill-0", "target": "decode-0", "transport": "shm"}],
}


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the fleets of a test have theirs; none is left behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    assert not list(tmp_path.iterdir())


async def test_a_taken_port_is_said_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidRequest, match=f"cannot listen on 127.0.0.1:{port}: Address"):
            await serve(ServeConfig(port=port))


async def test_no_workers_at_all_is_said_before_anything_starts() -> None:
    with pytest.raises(InvalidRequest, match="0 for --prefill-workers, --decode-workers"):
        await serve(ServeConfig(prefill_workers=0, decode_workers=0))


async def test_a_process_that_its_settings_keep_from_starting_ends_the_fleet(
    caplog, monkeypatch
) -> None:
    def start(fleet: Fleet) -> None:
        command = [sys.executable, "-c", f"raise SystemExit({BAD_SETTINGS})"]
        fleet.supervisor.start(ChildSpec("prefill-0", command, dict(os.environ), 5))
        fleet.supervisor.start(ChildSpec("gateway", ["sleep", "60"], dict(os.environ), 5))

    monkeypatch.setattr(Fleet, "start", start)
    async with asyncio.timeout(20):
        assert await serve(ServeConfig(port=0)) == BAD_SETTINGS
    assert "prefill-0 cannot start like this; stopping" in caplog.text
    assert "restarting" not in caplog.text


async def test_what_dies_once_the_fleet_is_up_is_restarted(until, caplog) -> None:
    fleet = Fleet(ServeConfig(port=0))
    fleet.is_up = True
    command = [sys.executable, "-c", f"raise SystemExit({BAD_SETTINGS})"]
    child = fleet.supervisor.start(ChildSpec("prefill-0", command, dict(os.environ), 5))
    await until(lambda: child.num_restarts == 1)
    assert "prefill-0 exited with 2; restarting in 0.5 s" in caplog.text
    assert not fleet.stopping.is_set()
    await fleet.stop()
    await fleet.supervisor.stop()
    fleet.clean()


def test_the_folder_of_a_killed_owner_goes_with_the_next_start(folders: Path) -> None:
    dead, alive = RedisFolder(), RedisFolder()
    dead._lock.close()  # as the kernel does
    RedisFolder().remove()
    assert set(folders.iterdir()) == {dead.path, alive.path}, "one that is being made is left alone"
    for folder in (dead, alive):
        os.utime(folder.path, (0, 0))
    RedisFolder().remove()
    assert set(folders.iterdir()) == {alive.path}
    alive.remove()


@pytest.mark.parametrize("place", ["nowhere", "long"])
async def test_no_place_for_a_private_redis_is_one_line(
    place: str, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folders / ("x" * 60) / ("y" * 60) if place == "long" else folders / "none"
    if place == "long":
        folder.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with pytest.raises(BatonError, match=r"private Redis.* TMPDIR") as error:
        await serve(ServeConfig(port=0))
    assert "\n" not in error.value.message
    if place == "long":
        assert not list(folder.iterdir())
        shutil.rmtree(folder.parent)


async def test_why_redis_does_not_start_is_said(until, caplog) -> None:
    fleet = Fleet(ServeConfig(port=0))
    (fleet._folder.path / "redis.sock").mkdir()  # in its place
    command = redis_command(fleet._folder.path)
    child = fleet.supervisor.start(ChildSpec("redis", command, dict(os.environ), 5))
    await until(lambda: child.num_restarts == 1)
    assert "redis exited with 1; restarting" in caplog.text
    assert "the last that redis said: " in caplog.text
    assert "Unix socket" in caplog.text
    await fleet.supervisor.stop()
    fleet.clean()


@pytest.mark.parametrize(
    ("host", "shown"),
    [("0.0.0.0", "127.0.0.1"), ("::1", "[::1]"), ("::", "[::1]"), ("127.0.0.1", "127.0.0.1")],
)
async def test_table_and_command_name_what_can_be_pasted(host: str, shown: str) -> None:
    try:
        fleet = Fleet(ServeConfig(host=host, port=0, api_key=("secret",)))
    except InvalidRequest:
        pytest.skip("no IPv6 here")
    fleet.supervisor.start(ChildSpec("gateway", ["sleep", "60"], dict(os.environ), 5))
    table = render_table(fleet, CLUSTER)
    base = f"http://{shown}:{fleet.port}"
    assert [line.split()[0] for line in table.split("\n")[1:]] == [
        *("ROLE", "gateway", "prefill", "decode")
    ]
    assert base in table
    assert table.count(" shm ") == 2
    curl = render_curl(fleet, {"data": [{"id": "demo"}]})
    assert f"curl -N {base}/v1/completions -H 'Authorization: Bearer '$BATON_API_KEY" in curl
    assert "secret" not in curl
    await fleet.supervisor.stop()
    fleet.clean()
