"""What all transports share: the producer's half of a fetch, the consumer's half, and a scope that
ends a transport's fetches when it closes."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from baton.errors import BatonError, Cause
from baton.kvtransfer.base import Buffers, FetchOpen, FrameSink, FrameSource

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_CREDIT = 64  # frames; a consumer that grants more is not believed
_ANSWER_PATIENCE_S = 10.0  # attaching may wait for one engine step, never for a prefill
_PACK_AHEAD = 1  # frames packed while another is being sent


# ── producer ─────────────────────────────────────────────────────────────────────────────────────


class Credits:
    """How many more frames the consumer takes: given by the consumer, used up by the producer."""

    def __init__(self, num_frames: int) -> None:
        """
        Raises:
            BatonError: as `give`.
        """
        self._num_frames = 0
        self._given = asyncio.Event()
        self.give(num_frames)

    def give(self, num_frames: int) -> None:
        """
        Raises:
            BatonError: PROTOCOL; none, or more than any consumer can mean.
        """
        if num_frames <= 0 or self._num_frames + num_frames > MAX_CREDIT:
            raise BatonError(Cause.PROTOCOL, f"credit of {num_frames} frames")
        self._num_frames += num_frames
        self._given.set()

    async def take(self) -> None:
        """Wait for one and use it up. For one taker."""
        while not self._num_frames:
            self._given.clear()
            await self._given.wait()
        self._num_frames -= 1


class Consumer(Protocol):
    """The consumer of one fetch as the producer sees it."""

    credits: Credits
    done: asyncio.Event  # it has verified everything

    async def opened(self, epoch: int, num_ready_tokens: int) -> None: ...

    async def send(self, frame: Buffers) -> None: ...


async def serve(source: FrameSource, fetch: FetchOpen, consumer: Consumer) -> None:
    """The producer's half of a fetch, from attaching to the consumer's last word.

    Returns or raises when nothing reads the producer's blocks any more.

    Raises:
        BatonError: refused, or the lease is lost (also while the consumer gives no credit), or
            INTERNAL for anything unexpected.
    """
    try:
        await _serve(source, fetch, consumer)
    except BatonError:
        raise
    except Exception as error:
        logger.exception("a fetch by %s failed", fetch.consumer)
        raise BatonError(Cause.INTERNAL, f"{type(error).__name__} in the producer") from error


async def _serve(source: FrameSource, fetch: FetchOpen, consumer: Consumer) -> None:
    attachment = await source.attach(fetch)

    async def send_all() -> None:
        await consumer.opened(attachment.epoch, attachment.num_ready_tokens)
        async for frame in ahead(attachment.frames(), _PACK_AHEAD):
            await consumer.credits.take()
            await consumer.send(frame)

    sending = asyncio.create_task(send_all())
    failing = asyncio.create_task(attachment.failed())
    finishing = asyncio.create_task(consumer.done.wait())
    waiting = {sending, failing, finishing}
    try:
        while not finishing.done():
            _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if failing.done() and not finishing.done():
                raise failing.result()
            if sending.done():
                sending.result()
        attachment.done()
    finally:
        await settle(sending, failing, finishing)
        await uninterrupted(attachment.close())


# ── consumer ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class Received:
    """What a fetch has moved."""

    num_frames: int = 0
    num_bytes: int = 0


async def answer_in_time(answer: Awaitable[tuple[int, int]]) -> tuple[int, int]:
    """(epoch, num_ready_tokens) of the producer's answer to opening a fetch.

    Raises:
        BatonError: what the producer says, or TRANSFER_STALLED if it says nothing.
    """
    try:
        async with asyncio.timeout(_ANSWER_PATIENCE_S):
            return await answer
    except TimeoutError:
        raise BatonError(Cause.TRANSFER_STALLED, "the producer does not answer") from None


async def take_frames(
    frames: AsyncGenerator[bytes | memoryview, None],
    sink: FrameSink,
    initial_credit: int,
    give_credit: Callable[[int], Awaitable[None]],
) -> Received:
    """The consumer's half: frames into the sink until it has everything.

    Credit goes back in batches of half of what was given at first, so that it costs few messages
    and rarely runs dry. `frames` should fetch up to that many frames ahead of what is asked for.

    Raises:
        BatonError: what `frames` or the sink raise; TRANSFER_STALLED; FRAME_TRUNCATED if `frames`
            ends before the sink has everything.
    """
    received, owed = Received(), 0
    async with aclosing(frames):
        while True:
            data = await _next_frame(frames, sink.patience_s())
            received.num_frames += 1
            received.num_bytes += len(data)
            if await sink.frame(data):
                return received
            owed += 1
            if owed >= max(1, initial_credit // 2):
                await give_credit(owed)
                owed = 0


async def _next_frame(
    frames: AsyncIterator[bytes | memoryview], patience_s: float | None
) -> bytes | memoryview:
    try:
        async with asyncio.timeout(patience_s):
            return await anext(frames)
    except TimeoutError:
        raise BatonError(
            Cause.TRANSFER_STALLED, f"no frame came within {patience_s:.1f} s"
        ) from None
    except StopAsyncIteration:
        raise BatonError(Cause.FRAME_TRUNCATED, "the frames ended too early") from None


# ── tasks ────────────────────────────────────────────────────────────────────────────────────────


async def ahead(items: AsyncGenerator[T, None], depth: int) -> AsyncGenerator[T, None]:
    """The same items, up to `depth` of them fetched before they are asked for.

    When it is closed, or whoever iterates it is cancelled, nothing fetches any more.
    """
    slots = asyncio.Semaphore(depth)
    queue: asyncio.Queue[tuple[T] | Exception] = asyncio.Queue()  # bounded by the slots

    async def fill() -> None:
        try:
            async with aclosing(items):
                while True:
                    await slots.acquire()
                    queue.put_nowait((await anext(items),))
        except Exception as error:  # noqa: BLE001 - raised where the items are read
            queue.put_nowait(error)

    filling = asyncio.create_task(fill())
    try:
        while True:
            item = await queue.get()
            slots.release()
            if isinstance(item, StopAsyncIteration):
                return
            if isinstance(item, Exception):
                raise item
            yield item[0]
    finally:
        await settle(filling)


async def settle(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait until each has ended, however; their results are dropped. Being
    cancelled meanwhile does not cut the wait short."""
    for task in tasks:
        task.cancel()
    if tasks:
        await uninterrupted(asyncio.wait(tasks))
    for task in tasks:
        if not task.cancelled():
            task.exception()  # retrieved, so that asyncio does not warn


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is always run to its end; a cancellation that came meanwhile is
    raised after it."""
    task = asyncio.create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    return task.result()


class FetchScope:
    """The fetches of one transport, in either direction; closing ends them."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_closed = False

    async def run(self, fetch: Coroutine[Any, Any, T]) -> T:
        """
        Raises:
            BatonError: TRANSPORT_FAILED if the scope is closed, before or meanwhile; what `fetch`
                raises.
        """
        if self._is_closed:
            fetch.close()
            raise BatonError(Cause.TRANSPORT_FAILED, "the transport is closed")
        task = asyncio.create_task(fetch)
        self._tasks.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if self._is_closed and caller is not None and not caller.cancelling():
                raise BatonError(Cause.TRANSPORT_FAILED, "the transport was closed") from None
            raise
        finally:
            self._tasks.discard(task)

    async def close(self) -> None:
        """Cancel every fetch and wait for their ends. Idempotent."""
        self._is_closed = True
        await settle(*self._tasks)
