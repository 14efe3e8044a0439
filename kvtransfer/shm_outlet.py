"""The producer's end of shared-memory fetches; see `baton.kvtransfer.shm_socket`."""

import asyncio
import errno
import logging
import socket

from baton.errors import BatonError, Cause
from baton.kvtransfer.base import DeviceFrame, DeviceMemory, Outgoing
from baton.kvtransfer.shm_ring import Ring, RingWriter
from baton.kvtransfer.shm_socket import POSTED, TOKEN_BYTES, is_same_user, listen, remove

logger = logging.getLogger(__name__)

_MAX_STRANGERS = 64  # connections whose fetch has not been heard of yet
_STRANGER_S = 10.0  # how long one may stay
_NO_FILES_S = 1.0  # how long to wait for file descriptors when there are none
_CLAIM_S = 5.0  # how long a fetch waits for its connection, which was made before it


class Listener:
    """Takes connections in and hands each to the fetch whose token it presents."""

    def __init__(self) -> None:
        """
        Raises:
            OSError: there can be no such socket here.
        """
        self._loop = asyncio.get_running_loop()
        self._socket, self.path = listen()
        self._outlets: set[Outlet] = set()
        self._strangers: dict[Outlet, asyncio.TimerHandle] = {}
        self._presented: dict[bytes, Outlet] = {}
        self._claims: dict[bytes, asyncio.Future[Outlet]] = {}
        self._listen()

    async def claim(self, token: bytes) -> "Outlet":
        """The connection that presents this token.

        Raises:
            BatonError: TRANSPORT_FAILED; nobody does.
        """
        if token in self._presented:
            return self._known(self._presented.pop(token))
        claim: asyncio.Future[Outlet] = self._loop.create_future()
        self._claims[token] = claim
        try:
            async with asyncio.timeout(_CLAIM_S):
                return self._known(await claim)
        except TimeoutError:
            raise BatonError(Cause.TRANSPORT_FAILED, "the consumer does not connect") from None
        finally:
            del self._claims[token]

    def _known(self, outlet: "Outlet") -> "Outlet":
        """It belongs to a fetch, and stays for the next ones."""
        timer = self._strangers.pop(outlet, None)
        if timer is not None:
            timer.cancel()
        return outlet

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except OSError as error:  # it is gone again, perhaps
            if error.errno in (errno.EMFILE, errno.ENFILE):
                logger.warning("no file descriptor is left for shared memory: %s", error)
                self._loop.remove_reader(self._socket)
                self._loop.call_later(_NO_FILES_S, self._listen)
            return
        if len(self._strangers) >= _MAX_STRANGERS or not is_same_user(connection):
            connection.close()
            return
        outlet = Outlet(self, connection)
        self._outlets.add(outlet)
        self._strangers[outlet] = self._loop.call_later(_STRANGER_S, outlet.close)

    def _listen(self) -> None:
        if self._socket.fileno() >= 0:
            self._loop.add_reader(self._socket, self._accept)

    def presented(self, outlet: "Outlet", token: bytes) -> None:
        claim = self._claims.get(token)
        if claim is not None and not claim.done():
            claim.set_result(outlet)
        elif len(token) != TOKEN_BYTES or len(self._presented) >= _MAX_STRANGERS:
            outlet.close()
        else:
            self._presented[token] = outlet
            self._loop.call_later(_STRANGER_S, self._expire, token)

    def _expire(self, token: bytes) -> None:
        outlet = self._presented.pop(token, None)
        if outlet is not None:
            outlet.close()

    def forget(self, outlet: "Outlet") -> None:
        self._outlets.discard(outlet)
        self._known(outlet)
        for token in [token for token, other in self._presented.items() if other is outlet]:
            del self._presented[token]

    def close(self) -> None:
        """Idempotent."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._socket.close()
            remove(self.path)
        for outlet in list(self._outlets):
            outlet.close()


class Outlet:
    """The producer's end of one connection, and the ring behind it."""

    def __init__(self, listener: Listener, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._listener = listener
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._ring: Ring | None = None
        self._loop.add_reader(connection, self._read)

    def writer(self, num_slots: int) -> RingWriter:
        """For the next fetch. The ring is made for the first one.

        Raises:
            BatonError: TRANSPORT_FAILED.
        """
        try:
            if self._ring is None:
                ring = Ring()
                ring.hand_over(self._connection)
                self._ring = ring
        except OSError as error:
            raise BatonError(Cause.TRANSPORT_FAILED, f"shared memory: {error}") from error
        return RingWriter(self._ring, num_slots)

    def post(self, index: int, length: int) -> None:
        """
        Raises:
            BatonError: TRANSPORT_FAILED; the consumer has gone, or reads nothing.
        """
        try:
            self._connection.send(POSTED.pack(index, length))
        except OSError as error:
            raise BatonError(Cause.TRANSPORT_FAILED, f"shared memory: {error}") from error

    def _read(self) -> None:
        try:
            token = self._connection.recv(TOKEN_BYTES + 1)
        except BlockingIOError:
            return
        except OSError:
            token = b""
        if token:
            self._listener.presented(self, token)
        else:
            self.close()

    def close(self) -> None:
        """Idempotent."""
        if self._connection.fileno() >= 0:
            self._loop.remove_reader(self._connection)
            self._connection.close()
        self._listener.forget(self)


class ShmLane:
    """The producer's end of one fetch; a `calls.Lane`."""

    def __init__(self, outlet: Outlet, num_slots: int) -> None:
        self.device: DeviceMemory | None = None
        self._outlet = outlet
        self._writer = outlet.writer(num_slots)

    def buffer(self, num_bytes: int) -> memoryview:
        return self._writer.buffer(num_bytes)

    async def send(self, frame: Outgoing) -> None:
        assert not isinstance(frame, DeviceFrame), "there is no device"
        self._outlet.post(*self._writer.put(frame))

    async def close(self, is_complete: bool) -> None:
        """The connection stays for the next fetch, unless the consumer hangs up."""
