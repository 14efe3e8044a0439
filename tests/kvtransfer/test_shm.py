"""What is particular to shared memory: who may connect, what is mapped, and what is left behind."""

import asyncio
import fcntl
import mmap
import os
import socket
import stat
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import BatonError, Cause
from baton.kvtransfer.exporter import Exporter
from baton.kvtransfer.frames import MAX_FRAME_BYTES
from baton.kvtransfer.importer import Importer
from baton.kvtransfer.pump import MAX_CREDIT
from baton.kvtransfer.shm import ShmTransport
from baton.kvtransfer.shm_inlet import Inlet
from baton.kvtransfer.shm_ring import Ring, RingReader, RingWriter
from baton.kvtransfer.shm_socket import POSTED, TOKEN_BYTES, Place, listen, remove
from baton.types import KVRange, TransportAddress
from tests.kvtransfer.support import (
    NUM_LAYERS,
    Gate,
    Pair,
    RecordingSink,
    ScriptedSource,
    connected,
    frames_script,
    make_fetch,
    make_pool,
)


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with connected("shm") as transports:
        yield transports


def producer(pair: Pair) -> ShmTransport:
    assert isinstance(pair.producer, ShmTransport)
    return pair.producer


async def closed(connection: socket.socket) -> None:
    """Waits until the other side has hung up."""
    loop = asyncio.get_running_loop()
    assert await asyncio.wait_for(loop.sock_recv(connection, 100), 30) == b""


def connect(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.setblocking(False)
    connection.connect(path)
    return connection


# ── the ring ─────────────────────────────────────────────────────────────────────────────────────


def mapped(ring: Ring) -> RingReader:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ring.hand_over(ours)
        _, (fd,), _, _ = socket.recv_fds(theirs, 64, 1)
    return RingReader(fd)


@settings(deadline=None)
@given(st.integers(1, 4), st.lists(st.tuples(st.booleans(), st.binary(max_size=50)), max_size=20))
def test_what_is_put_is_read_until_credit_comes_round(
    num_slots: int, frames: list[tuple[bool, bytes]]
) -> None:
    ring = Ring()
    reader, writer = mapped(ring), RingWriter(ring, num_slots)
    unread: list[tuple[memoryview, bytes]] = []
    for is_staged, data in frames:
        if len(unread) == num_slots:  # no more credit
            view, expected = unread.pop(0)
            assert view == expected
        frame = memoryview(data)
        if is_staged:
            frame = writer.buffer(len(data))
            frame[:] = data
        unread.append((reader.frame(*writer.put((frame,))), data))
    assert all(view == expected for view, expected in unread)


def test_the_consumer_cannot_write() -> None:
    ring = Ring()
    view = mapped(ring).frame(0, 10)
    assert view.readonly


@pytest.mark.parametrize("where", [(MAX_CREDIT, 1), (0, MAX_FRAME_BYTES + 1)])
def test_a_frame_outside_the_ring(where: tuple[int, int]) -> None:
    reader = mapped(Ring())
    with pytest.raises(BatonError) as caught:
        reader.frame(*where)
    assert caught.value.cause is Cause.PROTOCOL


@pytest.mark.parametrize(
    ("num_bytes", "seals"),
    [(MAX_CREDIT * MAX_FRAME_BYTES, 0), (mmap.PAGESIZE, fcntl.F_SEAL_SHRINK)],
)
def test_memory_that_could_be_taken_away_is_not_mapped(num_bytes: int, seals: int) -> None:
    fd = os.memfd_create("x", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, num_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    with pytest.raises(BatonError, match="not a ring"):
        RingReader(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_file_that_is_no_memfd() -> None:
    reading, writing = os.pipe()
    os.close(writing)
    with pytest.raises(BatonError, match="not a ring"):
        RingReader(reading)


# ── who may connect ──────────────────────────────────────────────────────────────────────────────


async def test_only_the_user_of_the_worker_can_see_the_socket(pair: Pair) -> None:
    path = Place.parse((await pair.producer.start(ScriptedSource(frames_script([])))).address).path
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o700


async def test_a_connection_without_a_fetch_gets_nothing(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.kvtransfer.shm_outlet._STRANGER_S", 0.05)
    peer = await pair.producer.start(ScriptedSource(frames_script([b"frame"])))
    with connect(Place.parse(peer.address).path) as stranger:
        stranger.send(bytes(TOKEN_BYTES))
        await closed(stranger)
    with connect(Place.parse(peer.address).path) as stranger:
        stranger.send(b"GET / HTTP/1.1\r\n\r\n")
        await closed(stranger)


async def test_a_fetch_whose_connection_never_comes(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another token came, as from somebody who guesses."""
    monkeypatch.setattr("baton.kvtransfer.shm_outlet._CLAIM_S", 0.05)
    monkeypatch.setattr(
        "baton.kvtransfer.shm_inlet.Inlet.open",
        lambda self, token, _: self._connection.send(bytes(TOKEN_BYTES)),
    )
    source = ScriptedSource(frames_script([b"frame"]))
    peer = await pair.producer.start(source)
    with pytest.raises(BatonError, match="does not connect") as caught:
        await pair.consumer.fetch(peer, make_fetch(1), RecordingSink(1))
    assert caught.value.cause is Cause.TRANSPORT_FAILED
    assert source.attachments == []


@pytest.mark.parametrize("part", [1, 2, 3])
async def test_another_kernel_or_another_file_is_out_of_reach(pair: Pair, part: int) -> None:
    peer = await pair.producer.start(ScriptedSource(frames_script([])))
    assert pair.consumer.reaches(peer)
    parts = peer.address.split("/", 3)
    parts[part] += "0"
    assert not pair.consumer.reaches(TransportAddress("shm", "/".join(parts)))
    assert not pair.consumer.reaches(TransportAddress("shm", "127.0.0.1:1"))


# ── what is kept, and what is left ───────────────────────────────────────────────────────────────


async def test_the_next_fetch_uses_the_same_ring_unless_one_failed(pair: Pair) -> None:
    source = ScriptedSource(frames_script([b"one", b"two"]))
    peer = await pair.producer.start(source)
    outlets = producer(pair)._listener._outlets
    seen = []
    for reject_at in (-1, -1, 1, -1):
        sink = RecordingSink(2, reject_at=reject_at)
        if reject_at < 0:
            await pair.consumer.fetch(peer, make_fetch(1), sink)
            assert sink.frames == [b"one", b"two"]
        else:
            with pytest.raises(BatonError, match="rejected by the sink"):
                await pair.consumer.fetch(peer, make_fetch(1), sink)
        await source.attachments[-1].closed.wait()
        while len(outlets) > 1 or (reject_at > 0 and outlets):
            await asyncio.sleep(0.001)
        seen.append(next(iter(outlets), None))
    assert seen[0] is seen[1] is not None
    assert seen[2] is None
    assert seen[3] not in {seen[0], None}


async def test_frames_are_packed_into_the_ring(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one copy is the packing itself."""
    source, target = make_pool(16, range(7), seed=1), make_pool(16, range(7), seed=2)
    copied = []
    put = RingWriter.put

    def watched(writer: RingWriter, frame: list[bytes]) -> tuple[int, int]:
        copied.append(id(frame[0]) not in writer._staged)
        return put(writer, frame)

    monkeypatch.setattr(RingWriter, "put", watched)
    where = KVRange(0, NUM_LAYERS, 0, 100)
    peer = await pair.producer.start(Exporter(source.memory, Gate(source, 100, b"end"), 2000))
    importer = Importer(target.memory, target.block_ids, where)
    await pair.consumer.fetch(peer, make_fetch(100), importer)
    assert target.content(where) == source.content(where)
    assert len(copied) > 5
    assert copied == [False] * (len(copied) - 1) + [True]  # the end frame
    source.memory.close()
    target.memory.close()


def folders() -> set[str]:
    return {path.name for path in Path(tempfile.gettempdir()).glob("baton-kv-*")}


def segments() -> set[str]:
    """Without those of UCX and the semaphores of tests beside this one."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith(("ucx_", "sem."))}


async def test_a_killed_worker_leaves_a_folder_that_the_next_one_removes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.kvtransfer.peer", "produce", "shm", "16"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    address = (await process.stdout.readline()).decode().strip()
    assert Place.parse(address).is_here()
    async with connected("shm"):
        assert len(folders()) == 3  # it is alive
    process.kill()
    await process.wait()
    assert len(folders()) == 1
    before = segments()
    async with connected("shm"):
        assert len(folders()) == 2
    assert folders() == set()
    assert segments() <= before


async def test_more_frames_than_there_is_credit_for() -> None:
    listening, path = listen()
    inlet, ring, frames = Inlet(path), Ring(), []
    connection, _ = listening.accept()
    inlet.open(bytes(TOKEN_BYTES), num_allowed=1)
    inlet.allow(1)
    ring.hand_over(connection)
    for index in range(3):
        connection.send(POSTED.pack(index, 1))
    async with asyncio.timeout(30):
        while len(frames) < 2:
            frames += await inlet.take(8)
        with pytest.raises(BatonError) as caught:
            await inlet.take(8)
    assert caught.value.cause is Cause.PROTOCOL
    assert len(frames) == 2
    for end in (connection, listening):
        end.close()
    remove(path)
