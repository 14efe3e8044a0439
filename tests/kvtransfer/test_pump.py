"""The producer's half of a fetch by itself."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from baton.kvtransfer.base import Buffers
from baton.kvtransfer.memory import heap_buffer
from baton.kvtransfer.pump import Credits, serve
from baton.kvtransfer.staging import StagingBudget
from tests.kvtransfer.support import ScriptedAttachment, ScriptedSource, make_fetch


class Consumer:
    """Takes frames until its credit is used up."""

    def __init__(self) -> None:
        self.credits = Credits(2)
        self.done = asyncio.Event()
        self.device = None
        self.took_one = asyncio.Event()

    async def opened(self, epoch: int, num_ready_tokens: int) -> None: ...

    def buffer(self, num_bytes: int) -> memoryview:
        return heap_buffer(num_bytes)

    async def send(self, frame: Buffers) -> None:
        self.took_one.set()


async def endless(_attachment: ScriptedAttachment) -> AsyncGenerator[Buffers, None]:
    while True:
        yield (b"frame",)


@pytest.mark.parametrize("num_turns", range(6))
async def test_being_cancelled_again_while_it_ends_leaves_no_attachment_open(
    num_turns: int,
) -> None:
    """As when the frames' connection breaks, and the call with it: blocks would stay in quarantine
    for ever."""
    source, consumer = ScriptedSource(endless), Consumer()
    serving = asyncio.create_task(serve(source, make_fetch(1), consumer))
    await consumer.took_one.wait()
    serving.cancel()
    for _ in range(num_turns):
        await asyncio.sleep(0)
        serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert source.attachments[0].closed.is_set()


async def test_bytes_in_staging_are_bounded_over_all_fetches() -> None:
    """And a consumer that takes nothing keeps nobody else from getting on."""
    budget = StagingBudget(100)
    stalled, other = Credits(8, budget), Credits(8, budget)
    assert await stalled.take(8, 30) == 3
    assert budget.used_bytes == 90
    assert await other.take(8, 30) == 1, "one frame goes in any case"
    waiting = asyncio.create_task(other.take(4, 30))
    await asyncio.sleep(0.01)
    assert not waiting.done(), "a second one waits for room"
    other.give(1)  # the first one was taken
    assert await waiting == 1
    waiting = asyncio.create_task(other.take(4, 30))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    stalled.close()  # cut
    assert await waiting == 2
    assert budget.used_bytes == 90
    other.close()
    assert budget.used_bytes == 0


async def test_a_fetch_that_ends_leaves_nothing_in_staging() -> None:
    budget, consumer = StagingBudget(1000), Consumer()
    consumer.credits = Credits(2, budget)

    async def staged(_attachment: ScriptedAttachment) -> AsyncGenerator[Buffers, None]:
        await consumer.credits.take(1, 500)
        yield (b"frame",)
        await asyncio.Event().wait()

    serving = asyncio.create_task(serve(ScriptedSource(staged), make_fetch(1), consumer))
    await consumer.took_one.wait()
    assert budget.used_bytes == 500
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert budget.used_bytes == 0
