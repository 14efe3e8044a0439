"""The transfer thread: serial, and quiet when `run` is over."""

import asyncio
import threading

import pytest

from baton.types import KVRange
from tests.kvtransfer.support import NUM_LAYERS, Pool, make_layout, make_pool


@pytest.fixture
def pool() -> Pool:
    return make_pool(16, [2, 0, 1], seed=1)


def test_pack_and_unpack_are_inverse(pool: Pool) -> None:
    where, other = KVRange(1, 3, 5, 40), make_pool(32, [1, 0], seed=2)
    payload = pool.memory.pack(pool.block_ids, where)
    assert len(payload) == pool.memory.num_bytes(where)
    other.memory.unpack(other.block_ids, where, payload)
    assert other.content(where) == pool.content(where)


def test_a_cache_of_another_shape_is_refused(pool: Pool) -> None:
    from baton.kvtransfer.memory import KVMemory

    with pytest.raises(ValueError, match="is not of"):
        KVMemory(pool.cache, make_layout(32))


async def test_run_passes_results_and_errors(pool: Pool) -> None:
    assert await pool.memory.run(lambda a, b: a + b, 1, b=2) == 3
    with pytest.raises(ZeroDivisionError):
        await pool.memory.run(lambda: 1 // 0)


async def test_a_cancelled_run_raises_only_when_the_thread_is_out(pool: Pool) -> None:
    entered, leave, left = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        entered.set()
        leave.wait()
        left.set()

    running = asyncio.create_task(pool.memory.run(work))
    await asyncio.to_thread(entered.wait)
    for _ in range(3):
        running.cancel()
        await asyncio.sleep(0.01)
        assert not running.done()
    leave.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert left.is_set()


async def test_what_has_not_begun_when_cancelled_never_begins(pool: Pool) -> None:
    leave, begun = threading.Event(), threading.Event()
    first = asyncio.create_task(pool.memory.run(leave.wait))
    second = asyncio.create_task(pool.memory.run(begun.set))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    leave.set()
    await first
    await pool.memory.run(lambda: None)
    assert not begun.is_set()


async def test_close_waits(pool: Pool) -> None:
    where = KVRange(0, NUM_LAYERS, 0, 48)
    reading = asyncio.create_task(pool.memory.run(pool.memory.pack, pool.block_ids, where))
    await asyncio.sleep(0)
    pool.memory.close()
    assert bytes(await reading) == pool.content(where)
    pool.memory.close()
