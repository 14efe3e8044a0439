"""One UCX worker driven by the asyncio event loop: tagged messages in and out, nothing polled.

It stands on `ucxx`'s binding of the UCX worker rather than on its asyncio layer, which waits for a
message by yielding to the loop until it is there (all of a core while a fetch waits for a prefill),
patches the loop's `close`, and has no way to give up one message.

Between two events the worker is *armed* and the loop sleeps on its file descriptor. On an event it
is progressed until there is nothing left to do and it can be armed again.

UCX may write to a buffer until its request has completed, whatever happens to the fetch. Each
request is therefore kept here, with its buffer, until it has; such buffers are never part of a KV
pool.

Endpoints handle errors: when their peer dies, every request completes with one. UCX can do that
over TCP and RDMA and leaves its shared-memory transports out, also between two processes of one
host. Where the user allows nothing but those (UCX_TLS=posix,sysv,self), endpoints do without: that
works as long as no peer dies. (Measured with UCX 1.21: killing the producer ends the reader with a
segmentation fault if cma is allowed, and leaves requests that never complete if it is not.)
"""

import asyncio
import logging
import os
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from baton.errors import BatonError
from baton.kvtransfer.ucx_api import as_array, ucx
from baton.kvtransfer.ucx_messages import Inbox, M, Request, transport_failed

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

# 1 MiB segments and 4 MiB socket buffers: twice the rate of the defaults over TCP.
_TUNING = {
    "TCP_TX_SEG_SIZE": "1m",
    "TCP_RX_SEG_SIZE": "1m",
    "TCP_SNDBUF": "4m",
    "TCP_RCVBUF": "4m",
}
_SHARED_MEMORY = frozenset(
    ("posix", "sysv", "cma", "xpmem", "knem", "shm", "sm", "mm", "self", "loopback")
)
_ROUNDS_PER_TURN = 8  # of progress, before other work of the loop has its turn
_DISCARD_S = 5.0  # how long the late messages of a fetch that was given up are thrown away


def settings_for(is_loopback: bool, on_device: bool = False) -> dict[str, str]:
    """UCX settings for this process; what the user has set in the environment wins."""
    wanted = dict(_TUNING)
    if on_device:
        wanted["MEMTYPE_CACHE"] = "n"  # it misses what was allocated before UCX was loaded
    if is_loopback:
        wanted["NET_DEVICES"] = "lo"
    return {key: value for key, value in wanted.items() if f"UCX_{key}" not in os.environ}


def handles_errors() -> bool:
    """Can endpoints handle the death of a peer with the transports that the user allows?"""
    allowed = os.environ.get("UCX_TLS", "all").removesuffix(",").split(",")
    return not _SHARED_MEMORY.issuperset(allowed)


class Endpoint:
    """A way to one peer's worker. Messages are sent in order; used by one sender at a time."""

    def __init__(self, worker: "UcxWorker", handle: Any, handles_errors: bool) -> None:
        self._worker = worker
        self._handle = handle
        self._handles_errors = handles_errors
        self._sending: deque[Request] = deque()
        self._sent = asyncio.Event()
        self._sent.set()
        self._error: BatonError | None = None

    @property
    def is_usable(self) -> bool:
        return self._error is None and bool(self._handle.alive)

    def send(self, message: "memoryview | Tensor", tag: int) -> None:
        """Begin to send; the message must not change any more.

        Raises:
            BatonError: TRANSPORT_FAILED; this message, or one before.
        """
        if self._error is not None:
            raise self._error
        try:
            handle = self._handle.tag_send(as_array(message), ucx.UCXXTag(tag))
        except ucx.UCXError as error:
            raise transport_failed(error) from error
        self._sent.clear()
        self._sending.append(self._worker.keep(Request(handle, message, self._reap)))

    def _reap(self) -> None:
        while self._sending and self._sending[0].is_completed:
            self._error = self._sending.popleft().error() or self._error
        if not self._sending:
            self._sent.set()

    async def sent(self) -> None:
        """Everything has left, or failed."""
        await self._sent.wait()

    def close(self) -> None:
        """Give up what has not been sent. Idempotent."""
        if self._sending and not self._handles_errors:
            logger.error("UCX cannot close an endpoint over shared memory: its peer has stopped")
            return  # it would wait for the peer
        self._handle.close_blocking()
        self._worker.wake()


class UcxWorker:
    """A UCX worker of this process; event loop only."""

    def __init__(self, settings: dict[str, str]) -> None:
        """
        Raises:
            OSError: UCX cannot run here.
        """
        features = (ucx.Feature.TAG, ucx.Feature.WAKEUP)
        try:
            self._context = ucx.UCXContext(settings, feature_flags=features)
            self._worker = ucx.UCXWorker(self._context)
            self._worker.init_blocking_progress_mode()
        except ucx.UCXError as error:
            raise OSError(f"UCX cannot run: {error}") from error
        self._handles_errors = handles_errors()
        if not self._handles_errors:
            logger.warning("UCX over shared memory alone: the death of a peer is not handled")
        self.address: bytes = self._worker.address.tobytes()
        self._inboxes: dict[int, Inbox[Any]] = {}
        self._discarded: dict[int, asyncio.TimerHandle] = {}
        self._requests: set[Request] = set()
        self._turn: asyncio.Handle | None = None
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._worker.epoll_file_descriptor, self._progress)
        self.wake()

    def connect(self, address: bytes) -> Endpoint:
        """An endpoint to the worker that has this address; connects when it is used.

        Raises:
            BatonError: TRANSPORT_FAILED; it cannot be reached from here.
        """
        try:
            target = ucx.UCXAddress.create_from_buffer(address)
            handle = ucx.UCXEndpoint.create_from_worker_address(
                self._worker, target, self._handles_errors
            )
        except (ucx.UCXError, ValueError) as error:
            raise transport_failed(error) from error
        return Endpoint(self, handle, self._handles_errors)

    def open_inbox(
        self, tag: int, max_bytes: int, num_allowed: int, buffer: Callable[[int], M]
    ) -> Inbox[M]:
        inbox = self._inboxes[tag] = Inbox(tag, max_bytes, num_allowed, buffer)
        self.wake()
        return inbox

    def close_inbox(self, tag: int, is_drained: bool) -> None:
        """Nobody reads these messages any more.

        Args:
            is_drained: nothing more comes. Else what comes in the next seconds is thrown away, so
                that it neither stays in UCX nor holds up its sender.
        """
        self._inboxes[tag].close()
        if is_drained:
            del self._inboxes[tag]
        else:
            self._discarded[tag] = self._loop.call_later(_DISCARD_S, self._forget, tag)

    def _forget(self, tag: int) -> None:
        del self._discarded[tag], self._inboxes[tag]

    def keep(self, request: Request) -> Request:
        """Hold a request until it has completed."""
        self._requests.add(request)
        self.wake()
        return request

    def wake(self) -> None:
        """Something was posted: progress it in the loop's next turn."""
        if self._turn is None:
            self._turn = self._loop.call_soon(self._progress)

    def _progress(self) -> None:
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        for _ in range(_ROUNDS_PER_TURN):
            is_busy = self._worker.progress_once()
            is_busy |= self._receive()
            is_busy |= self._complete()
            if not is_busy and self._worker.arm():
                return
        self.wake()

    def _receive(self) -> bool:
        """Take in every message that has begun to arrive."""
        received = False
        for inbox in self._inboxes.values():
            while (found := self._worker.tag_probe(inbox.tag, remove=True)).matched:
                buffer = inbox.room_for(found.length)
                handle = self._worker.tag_recv_with_handle(as_array(buffer), found)
                request = Request(handle, buffer, inbox.deliver)
                inbox.expect(self.keep(request), buffer)
                received = True
        return received

    def _complete(self) -> bool:
        """Let go of what has completed."""
        completed = [request for request in self._requests if request.is_completed]
        self._requests.difference_update(completed)
        for request in completed:
            request.on_completed()
        return bool(completed)

    def close(self) -> None:
        """Give up everything that is on its way. Endpoints are closed before. Idempotent."""
        if self._worker is None:
            return
        self._loop.remove_reader(self._worker.epoll_file_descriptor)
        for timer in self._discarded.values():
            timer.cancel()
        if self._turn is not None:
            self._turn.cancel()
        self._inboxes.clear()
        self._worker.cancel_inflight_requests()
        self._worker.progress()
        self._requests.clear()
        self._worker = self._context = None
