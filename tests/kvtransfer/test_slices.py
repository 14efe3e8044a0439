"""Pools of different tensor-parallel degree, block size and dtype: every head of every layer
arrives where it belongs, over the local and the gRPC transport."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from baton.errors import BatonError, Cause
from baton.heads import heads_of
from baton.kvtransfer.base import FetchOpen, Transport
from baton.kvtransfer.exporter import Exporter
from baton.kvtransfer.importer import Importer
from baton.kvtransfer.local import LocalNetwork, LocalTransport
from baton.kvtransfer.memory import KVMemory
from baton.kvtransfer.slices import Converting, HeadSlice, Slice, SliceImport, plan_slices
from baton.types import BlockId, KVGroup, KVKind, KVLayout, KVRange, TransferStats, TransportAddress
from tests.kvtransfer.support import Gate, Pool, grpc_end, make_fetch

NUM_LAYERS, HEAD_DIM, NUM_TOKENS = 3, 8, 100
ALL = KVRange(0, NUM_LAYERS, 0, NUM_TOKENS)
SHAPES = [  # KV heads, ranks of P, ranks of D
    (4, 1, 2),
    (4, 2, 1),
    (4, 4, 2),
    (4, 2, 4),
    (4, 4, 4),
    (2, 4, 2),  # P_TP > D_TP, replicated on P
    (2, 2, 8),  # replicated on D
    (2, 8, 4),  # on both
    (1, 4, 1),
    (6, 3, 2),
]


def layout(num_kv_heads: int, tp_size: int, block_size: int, dtype: str = "bfloat16") -> KVLayout:
    group = KVGroup(KVKind.FULL, NUM_LAYERS, num_kv_heads, HEAD_DIM, dtype)
    return KVLayout((group,), block_size, tp_size)


def whole_kv(num_kv_heads: int) -> Tensor:
    """[layers, 2, tokens, heads, dim] of the model: what every rank's pool is a slice of."""
    shape = (NUM_LAYERS, 2, NUM_TOKENS, num_kv_heads, HEAD_DIM)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


def pool_of(kv: Tensor | None, shape: KVLayout, rank: int, seed: int) -> Pool:
    """A rank's pool; with `kv` its heads of it are in the blocks."""
    (group,) = shape.groups
    heads = heads_of(group.num_kv_heads, shape.tp_size, rank)
    size = shape.block_size
    num_blocks = -(-NUM_TOKENS // size)
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).tolist()
    dtype = getattr(torch, group.dtype)
    cache = torch.zeros((NUM_LAYERS, 2, num_blocks, size, len(heads), HEAD_DIM), dtype=dtype)
    if kv is not None:
        padded = torch.zeros((NUM_LAYERS, 2, num_blocks * size, len(heads), HEAD_DIM), dtype=dtype)
        padded[:, :, :NUM_TOKENS] = kv[:, :, :, heads.start : heads.stop]
        cache[:, :, order] = padded.unflatten(2, (num_blocks, size))
    memory = HeadSlice(KVMemory(cache, shape), len(heads), rank)
    return Pool(cache, cast("KVMemory", memory), [BlockId(b) for b in order])


def content(pool: Pool) -> Tensor:
    return pool.cache[:, :, pool.block_ids].flatten(2, 3)[:, :, :NUM_TOKENS]


@asynccontextmanager
async def transports(kind: str, num: int) -> AsyncIterator[list[Transport]]:
    async with AsyncExitStack() as stack:
        network = LocalNetwork()
        made: list[Transport] = []
        for index in range(num):
            if kind == "grpc":
                made.append(await stack.enter_async_context(grpc_end("grpc")))
            else:
                made.append(LocalTransport(network, f"w{index}"))
                stack.push_async_callback(made[-1].close)
        yield made


class Ranks:
    """A producer's ranks, each with its pool, its gate and its transport."""

    def __init__(self, kv: Tensor, shape: KVLayout, made: list[Transport]) -> None:
        ranks = range(shape.tp_size)
        self.pools = [pool_of(kv, shape, rank, seed=rank) for rank in ranks]
        self.gates = [Gate(pool, NUM_TOKENS, b"end") for pool in self.pools]
        self._transports = made
        self.peers: list[TransportAddress] = []

    async def start(self) -> None:
        for pool, gate, transport in zip(self.pools, self.gates, self._transports, strict=True):
            self.peers.append(await transport.start(Exporter(pool.memory, gate, frame_bytes=900)))

    def fetch_by(self, consumer: Transport) -> Any:
        async def fetch(one: Slice, importer: Importer) -> TransferStats:
            opening: FetchOpen = replace(make_fetch(NUM_TOKENS), range=one.range)
            return await consumer.fetch(self.peers[one.source.rank], opening, importer)

        return fetch


@pytest.mark.parametrize("kind", ["local", "grpc"])
@pytest.mark.parametrize(("num_kv_heads", "producer_tp", "consumer_tp"), SHAPES)
async def test_every_head_arrives(
    kind: str, num_kv_heads: int, producer_tp: int, consumer_tp: int
) -> None:
    source, target = layout(num_kv_heads, producer_tp, 16), layout(num_kv_heads, consumer_tp, 32)
    kv = whole_kv(num_kv_heads)
    async with transports(kind, producer_tp + 1) as (consumer, *made):
        ranks = Ranks(kv, source, made)
        await ranks.start()
        for rank in range(consumer_tp):
            pool = pool_of(None, target, rank, seed=50 + rank)
            slices = plan_slices(ALL, source, target, rank)
            importing = SliceImport(pool.memory, pool.block_ids, slices)
            stats, payload = await importing.run(ranks.fetch_by(consumer))
            assert payload == b"end"
            assert importing.valid_tokens == NUM_TOKENS
            heads = heads_of(num_kv_heads, consumer_tp, rank)
            assert torch.equal(content(pool), kv[:, :, :, heads.start : heads.stop])
            assert sum(one.num_bytes for one in stats) > content(pool).nbytes
            pool.memory.close()
        for pool in ranks.pools:
            pool.memory.close()


async def test_one_rank_that_fails_ends_them_all_and_leaves_the_common_prefix() -> None:
    source, target = layout(4, 2, 16), layout(4, 1, 16)
    async with transports("local", 3) as (consumer, *made):
        ranks = Ranks(whole_kv(4), source, made)
        ranks.gates[1].num_ready_tokens = 48
        await ranks.start()
        pool = pool_of(None, target, 0, seed=9)
        importing = SliceImport(pool.memory, pool.block_ids, plan_slices(ALL, source, target, 0))
        running = asyncio.create_task(importing.run(ranks.fetch_by(consumer)))
        while any(importer.valid_tokens < 48 for importer in importing.importers):
            await asyncio.sleep(0.001)
        ranks.gates[1].feeds[0].cut(BatonError(Cause.LEASE_UNKNOWN, "evicted"))
        with pytest.raises(BatonError, match="evicted"):
            await running
        assert importing.valid_tokens == 48
        expected = whole_kv(4)[:, :, :48]
        assert torch.equal(content(pool)[:, :, :48], expected)
        rest = replace(ALL, token_start=48)
        ranks.gates[1].num_ready_tokens = NUM_TOKENS
        again = SliceImport(pool.memory, pool.block_ids, plan_slices(rest, source, target, 0))
        await again.run(ranks.fetch_by(consumer))
        assert torch.equal(content(pool), whole_kv(4))
        for one in (*ranks.pools, pool):
            one.memory.close()


async def test_ranks_that_disagree_about_the_first_tokens_are_refused() -> None:
    source, target = layout(4, 2, 16), layout(4, 1, 16)
    async with transports("local", 3) as (consumer, *made):
        ranks = Ranks(whole_kv(4), source, made)
        ranks.gates[1].end_payload = b"another end"
        await ranks.start()
        pool = pool_of(None, target, 0, seed=9)
        importing = SliceImport(pool.memory, pool.block_ids, plan_slices(ALL, source, target, 0))
        with pytest.raises(BatonError) as caught:
            await importing.run(ranks.fetch_by(consumer))
        assert caught.value.cause is Cause.PROTOCOL
        for one in (*ranks.pools, pool):
            one.memory.close()


async def test_a_rank_sends_only_heads_that_it_holds() -> None:
    pool = pool_of(whole_kv(4), layout(4, 2, 16), rank=1, seed=1)
    exporter = Exporter(pool.memory, Gate(pool, NUM_TOKENS, b"end"))
    for heads in ((0, 0), (0, 2), (1, 3), (2, 5)):
        where = replace(ALL, head_start=heads[0], head_stop=heads[1])
        assert not pool.memory.has(where)
        with pytest.raises(BatonError) as caught:
            await exporter.attach(replace(make_fetch(NUM_TOKENS), range=where))
        assert caught.value.cause is Cause.PROTOCOL
        with pytest.raises(ValueError, match="this rank has heads"):
            pool.memory.pack(pool.block_ids, where)
    assert pool.memory.has(replace(ALL, head_start=2, head_stop=4))
    pool.memory.close()


@pytest.mark.parametrize("target", ["bfloat16", "float16", "float32"])
async def test_another_dtype_is_converted_when_it_is_written(target: str) -> None:
    kv = whole_kv(2)
    async with transports("local", 2) as (consumer, producer):
        ranks = Ranks(kv, layout(2, 1, 16), [producer])
        await ranks.start()
        pool = pool_of(None, layout(2, 1, 32, target), 0, seed=3)
        memory = cast("KVMemory", Converting(pool.memory, "bfloat16"))
        importer = Importer(memory, pool.block_ids, ALL)
        await consumer.fetch(ranks.peers[0], make_fetch(NUM_TOKENS), importer)
        assert torch.equal(content(pool), kv.to(getattr(torch, target)))
        if target == "float32":
            assert torch.equal(content(pool).to(torch.bfloat16), kv)
        for one in (*ranks.pools, pool):
            one.memory.close()


def test_no_conversion_from_what_is_unknown() -> None:
    pool = pool_of(None, layout(2, 1, 16), 0, seed=3)
    with pytest.raises(ValueError, match="no conversion"):
        Converting(pool.memory, "fp8")
    pool.memory.close()
