"""The producer's half of a fetch by itself."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from baton.kvtransfer.base import Buffers
from baton.kvtransfer.memory import heap_buffer
from baton.kvtransfer.pump import Credits, serve
from tests.kvtransfer.support import ScriptedAttachment, ScriptedSource, make_fetch


class Consumer:
    """Takes frames until its credit is used up."""

    def __init__(self) -> None:
        self.credits = Credits(2)
        self.done = asyncio.Event()
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
