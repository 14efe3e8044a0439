"""The memory through which frames of one producer reach one consumer on the same host.

A ring is a memfd of as many slots as there can be frames of credit, each large enough for any
frame; pages that no frame has touched cost nothing. It has no name: when both processes are gone,
however they ended, so is the memory. Its size is sealed, so neither side can take pages away from
under the other. The producer writes, the consumer maps it read-only.

Slot k holds frames k, k + n, k + 2n, … where n is the fetch's credit: a frame is put together only
when there is credit for it, and credit for it means that the consumer is through with the one n
frames before.
"""

import fcntl
import mmap
import os
import socket

from baton.errors import BatonError, Cause
from baton.kvtransfer.base import Buffers
from baton.kvtransfer.frames import MAX_FRAME_BYTES
from baton.kvtransfer.pump import MAX_CREDIT

_NUM_BYTES = MAX_CREDIT * MAX_FRAME_BYTES
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Ring:
    """The producer's end."""

    def __init__(self) -> None:
        """
        Raises:
            OSError: there is no memfd here, or no file descriptor left.
        """
        fd = os.memfd_create("baton-kv-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, _NUM_BYTES)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            # Never closed by hand: it goes with the last frame that is in it.
            self._memory = memoryview(mmap.mmap(fd, _NUM_BYTES, mmap.MAP_SHARED))
            self._fd = fd
        except OSError:
            os.close(fd)
            raise

    def hand_over(self, connection: socket.socket) -> None:
        """To the consumer at the other end, once.

        Raises:
            OSError: it has gone.
        """
        try:
            socket.send_fds(connection, [b"ring"], [self._fd])
        finally:
            os.close(self._fd)

    def slot(self, index: int, num_bytes: int) -> memoryview:
        """The first bytes of a slot, writable.

        Raises:
            BatonError: UNSUPPORTED; larger than a frame can be.
        """
        if num_bytes > MAX_FRAME_BYTES:
            raise BatonError(Cause.UNSUPPORTED, f"a frame of {num_bytes} bytes")
        start = index * MAX_FRAME_BYTES
        return self._memory[start : start + num_bytes]


class RingWriter:
    """Puts the frames of one fetch into a ring."""

    def __init__(self, ring: Ring, num_slots: int) -> None:
        self._ring = ring
        self._num_slots = num_slots
        self._num_taken = 0
        # Slots by the identity of their buffer, which is kept so that it stays the only one.
        self._staged: dict[int, tuple[int, memoryview]] = {}

    def buffer(self, num_bytes: int) -> memoryview:
        """The next slot's memory. On any thread; see `base.Staging.buffer`."""
        index = self._next_slot()
        view = self._ring.slot(index, num_bytes)
        self._staged[id(view)] = index, view
        return view

    def put(self, frame: Buffers) -> tuple[int, int]:
        """(slot, length) of a frame; one that is not in the ring yet is copied there."""
        length = sum(len(part) for part in frame)
        staged = self._staged.pop(id(frame[0]), None)
        if staged is not None:
            return staged[0], length
        index, at = self._next_slot(), 0
        slot = self._ring.slot(index, length)
        for part in frame:
            slot[at : at + len(part)] = part
            at += len(part)
        return index, length

    def _next_slot(self) -> int:
        self._num_taken += 1
        return (self._num_taken - 1) % self._num_slots


class RingReader:
    """The consumer's end."""

    def __init__(self, fd: int) -> None:
        """Maps and closes `fd`.

        Raises:
            BatonError: PROTOCOL; this is no ring, or one that could shrink.
        """
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            if not seals & fcntl.F_SEAL_SHRINK or os.fstat(fd).st_size != _NUM_BYTES:
                raise BatonError(Cause.PROTOCOL, "not a ring of this version")
            memory = mmap.mmap(fd, _NUM_BYTES, mmap.MAP_SHARED, mmap.PROT_READ)
        except OSError as error:
            raise BatonError(Cause.PROTOCOL, f"not a ring: {error}") from error
        finally:
            os.close(fd)
        self._memory = memoryview(memory)

    def frame(self, index: int, length: int) -> memoryview:
        """
        Raises:
            BatonError: PROTOCOL; there can be no such frame.
        """
        if index >= MAX_CREDIT or length > MAX_FRAME_BYTES:
            raise BatonError(Cause.PROTOCOL, f"a frame of {length} bytes in slot {index}")
        start = index * MAX_FRAME_BYTES
        return self._memory[start : start + length]
