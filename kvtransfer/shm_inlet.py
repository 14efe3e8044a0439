"""The consumer's end of shared-memory fetches; see `baton.kvtransfer.shm_socket`."""

import asyncio
import socket

from baton.errors import BatonError, Cause
from baton.kvtransfer.pump import Arrivals
from baton.kvtransfer.shm_ring import RingReader
from baton.kvtransfer.shm_socket import POSTED, is_same_user, unix_socket

_EOF_S = 1.0  # the call says better why a producer is gone; this long it has for it


class Inlet:
    """The consumer's end of one connection, used by one fetch at a time."""

    def __init__(self, path: str) -> None:
        """
        Raises:
            BatonError: TRANSPORT_FAILED; nobody listens there.
        """
        self._loop = asyncio.get_running_loop()
        self._connection = unix_socket()
        try:
            self._connection.connect(path)
        except OSError as error:
            self._connection.close()
            raise BatonError(Cause.TRANSPORT_FAILED, f"shared memory: {error}") from error
        if not is_same_user(self._connection):
            self._connection.close()
            raise BatonError(Cause.TRANSPORT_FAILED, "shared memory: another user listens there")
        self._ring: RingReader | None = None
        self._arrivals: Arrivals[memoryview] = Arrivals()
        self._num_allowed = 0
        self._dying: asyncio.TimerHandle | None = None
        self._loop.add_reader(self._connection, self._read)

    @property
    def is_usable(self) -> bool:
        return self._connection.fileno() >= 0

    def open(self, token: bytes, num_allowed: int) -> None:
        """Begin a fetch.

        Raises:
            BatonError: TRANSPORT_FAILED; the producer has hung up.
        """
        self._arrivals = Arrivals()
        self._num_allowed = num_allowed
        try:
            self._connection.send(token)
        except OSError as error:
            raise BatonError(Cause.TRANSPORT_FAILED, f"shared memory: {error}") from error

    def allow(self, num_frames: int) -> None:
        self._num_allowed += num_frames

    async def take(self, max_frames: int) -> list[memoryview]:
        """The next frames, at least one; in the ring until credit is given for them."""
        return await self._arrivals.take(max_frames)

    def fail(self, error: BatonError) -> None:
        """Raised by `take` after what has arrived."""
        self._arrivals.fail(error)

    def _read(self) -> None:
        try:
            while self._receive():
                pass
        except BlockingIOError:
            pass
        except OSError as error:
            self._lost(str(error))
        except BatonError as error:
            self._arrivals.fail(error)
            self.close()

    def _receive(self) -> bool:
        """One message; False at the end of them."""
        if self._ring is None:
            data, fds, _, _ = socket.recv_fds(self._connection, 64, 1, socket.MSG_CMSG_CLOEXEC)
            if fds:
                self._ring = RingReader(fds[0])
                return True
        else:
            data = self._connection.recv(64)
        if not data:
            self._lost("the producer hung up")
            return False
        if self._ring is None or len(data) != POSTED.size:
            raise BatonError(Cause.PROTOCOL, "not a message of this version")
        self._num_allowed -= 1
        if self._num_allowed < 0:
            raise BatonError(Cause.PROTOCOL, "more frames than there was credit for")
        self._arrivals.put(self._ring.frame(*POSTED.unpack(data)))
        return True

    def _lost(self, reason: str) -> None:
        self.close()
        error = BatonError(Cause.TRANSPORT_FAILED, f"shared memory: {reason}")
        self._dying = self._loop.call_later(_EOF_S, self._arrivals.fail, error)

    def close(self) -> None:
        """Idempotent. The ring is unmapped when the last frame of it is gone."""
        if self._dying is not None:
            self._dying.cancel()
        if self._connection.fileno() >= 0:
            self._loop.remove_reader(self._connection)
            self._connection.close()
        self._ring = None
