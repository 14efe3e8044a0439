"""A fetch that names a run of the heads moves those and no others."""

from dataclasses import replace

import pytest

from baton.errors import BatonError, Cause
from baton.kvtransfer.exporter import Exporter
from baton.kvtransfer.importer import Importer
from tests.kvtransfer.support import NUM_HEADS, Gate, connected, make_fetch, make_pool

NUM_TOKENS = 100


@pytest.mark.parametrize("transport", ["local", "grpc"])
async def test_each_run_of_heads_arrives_by_itself(transport: str) -> None:
    source = make_pool(16, [4, 0, 6, 2, 5, 1, 3], seed=1)
    target = make_pool(32, [2, 0, 3, 1], seed=2)
    async with connected(transport) as pair:
        exporter = Exporter(source.memory, Gate(source, NUM_TOKENS, b"end"), frame_bytes=900)
        peer = await pair.producer.start(exporter)
        for head in reversed(range(NUM_HEADS)):
            fetch = make_fetch(NUM_TOKENS)
            where = replace(fetch.range, head_start=head, head_stop=head + 1)
            others = replace(where, head_start=1 - head, head_stop=2 - head)
            before = target.content(others)
            importer = Importer(target.memory, target.block_ids, where)
            stats = await pair.consumer.fetch(peer, replace(fetch, range=where), importer)
            assert stats.num_bytes < 0.8 * len(source.content(fetch.range))
            assert target.content(where) == source.content(where)
            assert target.content(others) == before
    assert target.content(fetch.range) == source.content(fetch.range)
    source.memory.close()
    target.memory.close()


@pytest.mark.parametrize("heads", [(1, 1), (0, NUM_HEADS + 1), (NUM_HEADS, NUM_HEADS + 1)])
async def test_heads_that_are_not_there_are_refused(heads: tuple[int, int]) -> None:
    pool = make_pool(16, list(range(7)), seed=1)
    exporter = Exporter(pool.memory, Gate(pool, NUM_TOKENS, b"end"))
    fetch = make_fetch(NUM_TOKENS)
    where = replace(fetch.range, head_start=heads[0], head_stop=heads[1])
    with pytest.raises(BatonError) as caught:
        await exporter.attach(replace(fetch, range=where))
    assert caught.value.cause is Cause.PROTOCOL
    pool.memory.close()
