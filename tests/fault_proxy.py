"""A TCP proxy that misbehaves on purpose, between a client and a server that do not know of it.

    async with FaultProxy(("127.0.0.1", server_port)) as proxy:
        toxic = proxy.add(BitFlip(DOWN, after_bytes=10_000))
        ...                       # connect to ("127.0.0.1", proxy.port) instead of the server
        assert toxic.hits         # a toxic that never fired proves nothing

`UP` is what clients send, `DOWN` what the server sends. Toxics may come and go at any time; each
applies to every connection that `only` (if given) accepts.
"""

import asyncio
import random
import socket
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from enum import Enum

READ_BYTES = 1 << 16
_LINGER_0 = struct.pack("ii", 1, 0)


class Direction(Enum):
    UP = "up"
    DOWN = "down"


UP, DOWN = Direction.UP, Direction.DOWN


class Connection:
    """One client and the server's connection made for it."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.client = client
        self.server = server
        self.peer: tuple[str, int] = client.get_extra_info("peername")[:2]
        self.num_bytes = {UP: 0, DOWN: 0}  # that came in
        self.swallows: set[Direction] = set()  # what was lost once breaks the stream for good
        self.is_poisoned = True

    def reset(self) -> None:
        """Both ends get a RST, and nothing that is still buffered here."""
        for writer in (self.client, self.server):
            sock = writer.get_extra_info("socket")
            with suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_0)
            writer.transport.abort()

    def close(self) -> None:
        for writer in (self.client, self.server):
            with suppress(OSError, RuntimeError):
                writer.close()


class Toxic:
    """Does nothing yet. `hits` counts how often it did something."""

    def __init__(self, *directions: Direction) -> None:
        self.directions = directions or (UP, DOWN)
        self.hits = 0
        self._before: dict[Connection, dict[Direction, int]] = {}

    def added(self, connections: Iterable[Connection]) -> None:
        """Bytes are counted from now on, on these too."""
        self._before.update({one: dict(one.num_bytes) for one in connections})

    def num_passed(self, connection: Connection, way: Direction) -> int:
        return connection.num_bytes[way] - self._before.get(connection, {way: 0})[way]

    def delay_s(self, num_bytes: int) -> float:
        """How much later these bytes arrive; what comes after them is not held up by it."""
        return 0.0

    def cost_s(self, num_bytes: int) -> float:
        """How long the wire is busy with these bytes."""
        return 0.0

    def apply(self, parts: list[bytes], connection: Connection, way: Direction) -> list[bytes]:
        """What arrives instead. Its first byte is number `num_passed(connection, way)`."""
        return parts


class Latency(Toxic):
    def __init__(self, *directions: Direction, latency_s: float, jitter_s: float = 0.0) -> None:
        super().__init__(*directions)
        self._latency_s, self._jitter_s = latency_s, jitter_s
        self._rng = random.Random(1)

    def delay_s(self, num_bytes: int) -> float:
        self.hits += 1
        return self._latency_s + self._rng.random() * self._jitter_s


class Bandwidth(Toxic):
    def __init__(self, *directions: Direction, bytes_per_s: float) -> None:
        super().__init__(*directions)
        self._bytes_per_s = bytes_per_s

    def cost_s(self, num_bytes: int) -> float:
        self.hits += 1
        return num_bytes / self._bytes_per_s


class Slicer(Toxic):
    """Small pieces, each in a packet of its own."""

    def __init__(self, *directions: Direction, size: int, seed: int = 1) -> None:
        super().__init__(*directions)
        self._size = size
        self._rng = random.Random(seed)

    def apply(self, parts: list[bytes], connection: Connection, way: Direction) -> list[bytes]:
        sliced = []
        for part in parts:
            at = 0
            while at < len(part):
                size = self._rng.randint(1, 2 * self._size)
                sliced.append(part[at : at + size])
                at += size
        self.hits += len(sliced) > len(parts)
        return sliced


class _After(Toxic):
    """Strikes once per connection, when `after_bytes` have passed."""

    def __init__(self, *directions: Direction, after_bytes: int, times: int = 10**9) -> None:
        super().__init__(*directions)
        self._after_bytes = after_bytes
        self._times = times  # connections in all

    def apply(self, parts: list[bytes], connection: Connection, way: Direction) -> list[bytes]:
        begin = self.num_passed(connection, way)
        data = b"".join(parts)
        if begin + len(data) <= self._after_bytes or self.hits >= self._times:
            return parts
        self.hits += 1
        connection.swallows.update((UP, DOWN))
        return self.strike(data, max(self._after_bytes - begin, 0), connection)

    def strike(self, data: bytes, at: int, connection: Connection) -> list[bytes]:
        raise NotImplementedError


class Reset(_After):
    """RST after so many bytes, to both."""

    def strike(self, data: bytes, at: int, connection: Connection) -> list[bytes]:
        connection.reset()
        return []


class Cut(_After):
    """FIN after so many bytes, to both: an orderly end in the middle of something."""

    def strike(self, data: bytes, at: int, connection: Connection) -> list[bytes]:
        asyncio.get_running_loop().call_later(0.01, connection.close)
        return [data[:at]]


class Drop(Toxic):
    """After so many bytes, nothing arrives any more and nobody is told; the other way works. What
    was lost is lost: the connection stays silent that way when the toxic is gone."""

    def __init__(self, *directions: Direction, after_bytes: int = 0) -> None:
        super().__init__(*directions)
        self._after_bytes = after_bytes

    def apply(self, parts: list[bytes], connection: Connection, way: Direction) -> list[bytes]:
        if self.num_passed(connection, way) < self._after_bytes:
            return parts
        connection.swallows.add(way)
        self.hits += 1
        return []


class BitFlip(Toxic):
    """One bit of every so many bytes, at random places."""

    def __init__(
        self,
        *directions: Direction,
        every_bytes: int,
        after_bytes: int = 0,
        times: int = 10**9,
        seed: int = 1,
    ) -> None:
        super().__init__(*directions)
        self._every_bytes = every_bytes
        self._after_bytes = after_bytes
        self._times = times
        self._rng = random.Random(seed)
        self._next: dict[tuple[Connection, Direction], int] = {}  # where to flip next

    def _draw(self) -> int:
        return self._rng.randint(1, 2 * self._every_bytes)

    def apply(self, parts: list[bytes], connection: Connection, way: Direction) -> list[bytes]:
        data, begin = bytearray(b"".join(parts)), self.num_passed(connection, way)
        at = self._next.get((connection, way), self._after_bytes + self._draw())
        while at < begin + len(data) and self.hits < self._times:
            if at >= begin:
                data[at - begin] ^= 1 << self._rng.randrange(8)
                self.hits += 1
            at += self._draw()
        self._next[connection, way] = at
        return [bytes(data)]


class FaultProxy:
    """Listens on `host`:`port` (0 = any free one) and forwards to `upstream`."""

    def __init__(
        self,
        upstream: tuple[str, int],
        host: str = "127.0.0.1",
        port: int = 0,
        only: Callable[[Connection], bool] = lambda _: True,
    ) -> None:
        """
        Args:
            only: which connections the toxics apply to; asked once, when one is made.
        """
        self.upstream = upstream
        self.host = host
        self.port = port
        self.toxics: list[Toxic] = []
        self.connections: set[Connection] = set()
        self.num_bytes = {UP: 0, DOWN: 0}  # of connections that `only` accepts
        self.num_accepted = 0
        self._only = only
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> "FaultProxy":
        self._server = await asyncio.start_server(
            self._accept, self.host, self.port, limit=READ_BYTES
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for connection in list(self.connections):
            connection.reset()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def add(self, toxic: Toxic) -> Toxic:
        """One toxic may be added to several proxies."""
        toxic.added(self.connections)
        self.toxics.append(toxic)
        return toxic

    def heal(self) -> None:
        self.toxics.clear()

    def _accept(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._forward(reader, client))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _forward(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        try:
            answers, server = await asyncio.open_connection(*self.upstream, limit=READ_BYTES)
        except OSError:
            client.transport.abort()
            return
        for writer in (client, server):
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = Connection(client, server)
        connection.is_poisoned = await asyncio.to_thread(self._only, connection)
        self.connections.add(connection)
        self.num_accepted += connection.is_poisoned
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._flow(connection, UP, reader, server))
                group.create_task(self._flow(connection, DOWN, answers, client))
        finally:
            self.connections.discard(connection)
            connection.close()

    async def _flow(
        self,
        connection: Connection,
        way: Direction,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """Reads as fast as data comes, so that latency delays and does not slow down; at most
        `_QUEUE` chunks."""
        queue: asyncio.Queue[tuple[float, list[bytes]] | None] = asyncio.Queue(256)
        writing = asyncio.create_task(_write(queue, writer))
        try:
            while data := await reader.read(READ_BYTES):
                delay_s, parts = 0.0, [data]
                if connection.is_poisoned:
                    delay_s, parts = await self._poison(data, connection, way)
                due_s = asyncio.get_running_loop().time() + delay_s
                await queue.put((due_s, parts))
            await queue.put(None)
            await writing
        except OSError:
            pass  # one side is gone; the other flow sees its end too
        finally:
            writing.cancel()
            if way not in connection.swallows:
                connection.close()

    async def _poison(
        self, data: bytes, connection: Connection, way: Direction
    ) -> tuple[float, list[bytes]]:
        delay_s, parts = 0.0, [data]
        if way in connection.swallows:
            parts = []
        for toxic in list(self.toxics):
            if way in toxic.directions and parts:
                delay_s += toxic.delay_s(len(data))
                if cost_s := toxic.cost_s(len(data)):
                    await asyncio.sleep(cost_s)
                parts = toxic.apply(parts, connection, way)
        connection.num_bytes[way] += len(data)
        self.num_bytes[way] += len(data)
        return delay_s, parts


async def _write(
    queue: "asyncio.Queue[tuple[float, list[bytes]] | None]", writer: asyncio.StreamWriter
) -> None:
    loop = asyncio.get_running_loop()
    with suppress(OSError):
        while (item := await queue.get()) is not None:
            due_s, parts = item
            if (wait_s := due_s - loop.time()) > 0:
                await asyncio.sleep(wait_s)
            for part in parts:
                writer.write(part)
                await writer.drain()
                if len(parts) > 1:
                    await asyncio.sleep(0)
        writer.write_eof()
