"""Readers by hash yield to those with a ticket."""

import asyncio

from baton.kvtransfer.turns import Turns


async def test_a_ticket_goes_first() -> None:
    turns, order = Turns(), []
    release = asyncio.Event()

    async def read(name: str, yields: bool) -> None:
        async with turns.take(yields):
            order.append(name)
            if not yields:
                await release.wait()

    first = asyncio.create_task(read("ticket 1", yields=False))
    await asyncio.sleep(0)
    hashed = asyncio.create_task(read("hash", yields=True))
    await asyncio.sleep(0)
    second = asyncio.create_task(read("ticket 2", yields=False))
    await asyncio.sleep(0.01)
    assert order == ["ticket 1", "ticket 2"]
    release.set()
    await asyncio.gather(first, hashed, second)
    assert order[-1] == "hash"


async def test_readers_by_hash_do_not_wait_for_one_another() -> None:
    turns = Turns()
    async with asyncio.timeout(30), turns.take(True), turns.take(True):
        pass


async def test_whoever_gives_up_leaves_no_turn_behind() -> None:
    turns = Turns()

    async def read() -> None:
        async with turns.take(False):
            await asyncio.sleep(9)

    task = asyncio.create_task(read())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    async with asyncio.timeout(30), turns.take(True):
        pass
