"""What all transports share: the producer's half of a fetch, the consumer's half, and a scope that
ends a transport's fetches when it closes."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from baton.errors import BatonError, Cause
from baton.kvtransfer.base import (
    DeviceMemory,
    FetchOpen,
    FrameSink,
    FrameSource,
    Incoming,
    Outgoing,
)
from baton.kvtransfer.staging import StagingBudget

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_CREDIT = 64  # frames; a consumer that grants more is not believed
_ANSWER_PATIENCE_S = 10.0  # attaching may wait for one engine step, never for a prefill
_PACK_AHEAD = 4  # frames packed while others are being sent; credit is used up when packing


# ── producer ─────────────────────────────────────────────────────────────────────────────────────


class Credits:
    """How many more frames the consumer takes: given by the consumer, used up by the producer. A
    frame is in staging until the credit for it comes back."""

    def __init__(self, num_frames: int, budget: StagingBudget | None = None) -> None:
        """
        Args:
            budget: of the producer; shared with its other fetches.

        Raises:
            BatonError: as `give`.
        """
        self._num_frames = 0
        self._budget = budget or StagingBudget()
        self._staged: deque[int] = deque()  # bytes of each frame, oldest first
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
        self._free(num_frames)
        self._given.set()

    async def take(self, max_frames: int, frame_bytes: int = 0) -> int:
        """Wait for at least one, and for room for it unless it would be the only one; use up at
        most `max_frames`; how many. For one taker."""
        while not self._num_frames:
            self._given.clear()
            await self._given.wait()
        while self._staged and frame_bytes > self._budget.free_bytes:
            await self._budget.freed()
        num_taken = min(self._num_frames, max_frames)
        if frame_bytes:
            num_taken = min(num_taken, max(1, self._budget.free_bytes // frame_bytes))
        self._num_frames -= num_taken
        self._staged.extend([frame_bytes] * num_taken)
        self._budget.use(num_taken * frame_bytes)
        return num_taken

    def close(self) -> None:
        """Nothing of this fetch is in staging any more."""
        self._free(len(self._staged))

    def _free(self, num_frames: int) -> None:
        num_frames = min(num_frames, len(self._staged))
        self._budget.free(sum(self._staged.popleft() for _ in range(num_frames)))


class Consumer(Protocol):
    """The consumer of one fetch as the producer sees it."""

    credits: Credits
    done: asyncio.Event  # it has verified everything
    device: DeviceMemory | None  # see `Staging.device`

    async def opened(self, epoch: int, num_ready_tokens: int) -> None:
        """The answer, before any frame. May return before it has left: the first frames are packed
        meanwhile."""
        ...

    def buffer(self, num_bytes: int) -> memoryview:
        """See `Staging.buffer`."""
        ...

    async def send(self, frame: Outgoing) -> None: ...


class _Staging:
    """A `Staging` bounded by the consumer's credit and the producer's budget."""

    def __init__(self, consumer: Consumer) -> None:
        self.device = consumer.device
        self._consumer = consumer

    async def take(self, max_frames: int, frame_bytes: int = 0) -> int:
        return await self._consumer.credits.take(max_frames, frame_bytes)

    def buffer(self, num_bytes: int) -> memoryview:
        return self._consumer.buffer(num_bytes)


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
        packed = ahead(attachment.frames(_Staging(consumer)), _PACK_AHEAD)
        async with aclosing(packed):  # also when sending fails: nothing is packed then either
            async for frame in packed:
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
        try:
            await settle(sending, failing, finishing)
        finally:  # it raises when it was cancelled meanwhile
            consumer.credits.close()
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


class Arrivals(Generic[T]):
    """What has come in and was not taken yet, and what ended it. One taker; never blocks whoever
    puts, so its size must be bounded elsewhere (by the credit)."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._error: BatonError | None = None
        self._changed = asyncio.Event()

    def put(self, item: T) -> None:
        self._items.append(item)
        self._changed.set()

    def fail(self, error: BatonError) -> None:
        """Raised to the taker after what came before it. The first error stands."""
        self._error = self._error or error
        self._changed.set()

    def __len__(self) -> int:
        return len(self._items)

    @property
    def error(self) -> BatonError | None:
        return self._error

    def clear(self) -> None:
        self._items.clear()

    async def take(self, max_items: int) -> list[T]:
        """What is there, at most `max_items`; waits for one.

        Raises:
            BatonError: see `fail`.
        """
        while not self._items:
            if self._error is not None:
                raise self._error
            self._changed.clear()
            await self._changed.wait()
        return [self._items.popleft() for _ in range(min(len(self._items), max_items))]


async def take_frames(
    take: Callable[[int], Awaitable[Sequence[Incoming]]],
    sink: FrameSink,
    initial_credit: int,
    give_credit: Callable[[int], Coroutine[Any, Any, None]],
) -> Received:
    """The consumer's half: frames into the sink until it has everything.

    The sink gets together what has arrived together, up to half of the credit: while it is at that
    half, the other one is on its way. Credit goes back in such halves too, so that it costs few
    messages and rarely runs dry.

    Args:
        take: the next frames, at least one and at most as many as it is given.

    Raises:
        BatonError: what `take` or the sink raise; TRANSFER_STALLED.
    """
    received, owed, half = Received(), 0, max(1, initial_credit // 2)
    giving: asyncio.Task[None] | None = None  # beside the next frames: it waits for the network
    try:
        while True:
            frames = await _next_frames(take(half), sink.patience_s())
            received.num_frames += len(frames)
            received.num_bytes += sum(map(len, frames))
            is_complete = await sink.frame(*frames)
            owed += len(frames)
            if giving is not None and (is_complete or owed >= half):
                await giving
            if is_complete:
                return received
            if owed >= half:
                giving = asyncio.create_task(give_credit(owed))
                owed = 0
    finally:
        if giving is not None:
            await settle(giving)


async def _next_frames(
    frames: Awaitable[Sequence[Incoming]], patience_s: float | None
) -> Sequence[Incoming]:
    try:
        async with asyncio.timeout(patience_s):
            return await frames
    except TimeoutError:
        raise BatonError(
            Cause.TRANSFER_STALLED, f"no frame came within {patience_s:.1f} s"
        ) from None


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
    if not all(task.done() for task in tasks):
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
