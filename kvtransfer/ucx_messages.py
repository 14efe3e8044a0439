"""Messages over UCX on their way: requests, and what has arrived for one tag."""

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from baton.errors import BatonError, Cause
from baton.kvtransfer.pump import Arrivals
from baton.kvtransfer.ucx_api import ucx

if TYPE_CHECKING:
    from torch import Tensor

M = TypeVar("M")  # host memory, or a device's
_NOTHING = memoryview(bytearray())


class Request:
    """A message on its way, and its bytes, which UCX uses until `is_completed`."""

    def __init__(
        self, handle: Any, buffer: "memoryview | Tensor", on_completed: Callable[[], None]
    ) -> None:
        self._handle = handle
        self._buffer = buffer
        self.on_completed = on_completed

    @property
    def is_completed(self) -> bool:
        return bool(self._handle.completed)

    def error(self) -> BatonError | None:
        """Of a completed request."""
        try:
            self._handle.check_error()
        except ucx.UCXError as error:
            return transport_failed(error)
        return None


class Inbox(Generic[M]):
    """The messages of one tag, in the order in which they were sent."""

    def __init__(
        self, tag: int, max_bytes: int, num_allowed: int, buffer: Callable[[int], M]
    ) -> None:
        """
        Args:
            tag: 64 random bits.
            max_bytes: of one message; a larger one is an error and never stored.
            num_allowed: messages that may come before `allow` is called.
            buffer: memory for a message of so many bytes.
        """
        self.tag = ucx.UCXXTag(tag)
        self._max_bytes = max_bytes
        self._buffer = buffer
        self._num_allowed = num_allowed
        self._is_closed = False
        self._arriving: deque[tuple[Request, M | memoryview]] = deque()
        self._arrivals: Arrivals[M] = Arrivals()

    def allow(self, num_messages: int) -> None:
        self._num_allowed += num_messages

    def fail(self, error: BatonError) -> None:
        """Raised to whoever reads, after what has arrived."""
        self._arrivals.fail(error)

    def room_for(self, num_bytes: int) -> M | memoryview:
        """Memory for a message that has begun to arrive; or none, so that UCX drops it, and whoever
        reads is told why."""
        self._num_allowed -= 1
        if self._num_allowed < 0:
            self.fail(BatonError(Cause.PROTOCOL, "more frames than there was credit for"))
        if num_bytes > self._max_bytes:
            self.fail(BatonError(Cause.PROTOCOL, f"a frame of {num_bytes} bytes"))
            return _NOTHING
        try:
            return self._buffer(num_bytes)
        except (MemoryError, RuntimeError) as error:  # torch raises the latter
            self.fail(BatonError(Cause.NO_ROOM, f"no memory for {num_bytes} bytes: {error}"))
            return _NOTHING

    def expect(self, request: Request, buffer: M | memoryview) -> None:
        """A message arrives in `buffer`, which `room_for` has given."""
        self._arriving.append((request, buffer))

    def deliver(self) -> None:
        """Hand over what has arrived."""
        while self._arriving and self._arriving[0][0].is_completed:
            request, buffer = self._arriving.popleft()
            if self._is_closed:
                continue
            error = request.error()
            if error is not None:
                self.fail(error)
            elif buffer is not _NOTHING:
                self._arrivals.put(cast("M", buffer))

    async def take(self, max_messages: int) -> list[M]:
        """The next messages, at least one.

        Raises:
            BatonError: see `fail`.
        """
        return await self._arrivals.take(max_messages)

    def close(self) -> None:
        """Nobody reads any more: what is here and what comes is dropped."""
        self._is_closed = True
        self._arrivals.clear()


def transport_failed(error: Exception) -> BatonError:
    return BatonError(Cause.TRANSPORT_FAILED, f"UCX: {error}")
