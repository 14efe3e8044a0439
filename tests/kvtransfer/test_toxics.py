"""Pool to pool through a network that misbehaves: what arrives is right, or the fetch ends in time
with a fault of the way, keeps what it has verified, and the next one brings the rest.

Over gRPC the proxy is in front of the producer and carries everything. Over UCX it carries the
frames: the port in the consumer's UCX address, which the fetch announces, is the proxy's. UCX has
nothing of its own against flipped bits in its headers, so those hit the payload of large frames.
"""

import asyncio
import importlib.util
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import psutil
import pytest

from baton.errors import BatonError, Cause
from baton.kvtransfer.base import Transport
from baton.kvtransfer.exporter import Exporter
from baton.kvtransfer.importer import Importer
from baton.types import KVRange, TransportAddress
from tests.fault_proxy import (
    DOWN,
    UP,
    Bandwidth,
    BitFlip,
    Cut,
    Direction,
    Drop,
    FaultProxy,
    Latency,
    Reset,
    Slicer,
    Toxic,
)
from tests.kvtransfer.support import NUM_LAYERS, Gate, Pool, grpc_end, make_fetch, make_pool

NUM_TOKENS = 8192
ALL = KVRange(0, NUM_LAYERS, 0, NUM_TOKENS)
FRAME_BYTES = 1 << 16
PATIENCE_S = 8.0  # an answer, or a frame, that does not come; on a busy machine
FAULTS = {
    Cause.TRANSPORT_FAILED,
    Cause.TRANSFER_STALLED,
    Cause.FRAME_CORRUPT,
    Cause.FRAME_ORDER,
    Cause.FRAME_TRUNCATED,
    Cause.EPOCH_MISMATCH,
    Cause.PROTOCOL,
}
TRANSPORTS = [
    "grpc",
    pytest.param(
        "ucx",
        marks=[
            pytest.mark.ucx,
            pytest.mark.skipif(
                importlib.util.find_spec("ucxx") is None, reason="the ucx extra is not installed"
            ),
        ],
    ),
]


def listening() -> set[int]:
    connections = psutil.Process().net_connections("tcp")
    return {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN}


@dataclass
class Rig:
    """A producer, a consumer, and the proxy that all KV between them passes."""

    consumer: Transport
    peer: TransportAddress
    gate: Gate
    source: Pool
    target: Pool
    proxy: FaultProxy
    towards_consumer: Direction  # the direction in which KV flows

    async def fetch(self, token_start: int = 0) -> Importer:
        """
        Raises:
            BatonError: with what was verified before in `self.importer`.
        """
        where = replace(ALL, token_start=token_start)
        self.importer = Importer(self.target.memory, self.target.block_ids, where)
        fetch = make_fetch(NUM_TOKENS, token_start)
        await self.consumer.fetch(self.peer, fetch, self.importer)
        return self.importer

    def check(self, valid_tokens: int) -> None:
        if valid_tokens:
            valid = replace(ALL, token_stop=valid_tokens)
            assert self.target.content(valid) == self.source.content(valid)

    async def all_closed(self) -> None:
        """Nobody reads the producer's blocks any more."""
        async with asyncio.timeout(PATIENCE_S):
            while sum(kind == "closed" for kind, _ in self.gate.told) < len(self.gate.feeds):
                await asyncio.sleep(0.01)


@asynccontextmanager
async def rig(transport: str, num_ready: int = NUM_TOKENS) -> AsyncIterator[Rig]:
    source = make_pool(16, range(NUM_TOKENS // 16), seed=1)
    target = make_pool(32, range(NUM_TOKENS // 32), seed=2)
    gate = Gate(source, num_ready, b"end")
    async with grpc_end(transport) as producer:
        before = listening()
        async with grpc_end(transport) as consumer:
            peer = await producer.start(Exporter(source.memory, gate, frame_bytes=FRAME_BYTES))
            if transport == "grpc":
                host, port = peer.address.split(":")
                upstream, way = (host, int(port)), DOWN
            else:
                worker = consumer._worker  # type: ignore[attr-defined]
                (upstream_port,) = {
                    port
                    for port in listening() - before
                    if port.to_bytes(2, "big") in worker.address
                }
                upstream, way = ("127.0.0.1", upstream_port), UP
            async with FaultProxy(upstream) as proxy:
                if transport == "grpc":
                    peer = replace(peer, address=proxy.address)
                else:
                    ports = (p.to_bytes(2, "big") for p in (upstream_port, proxy.port))
                    worker.address = worker.address.replace(*ports)
                yield Rig(consumer, peer, gate, source, target, proxy, way)
    source.memory.close()
    target.memory.close()


@pytest.fixture(params=TRANSPORTS)
async def faulty(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("UCX_TLS", "tcp")
    async with rig(request.param) as made:
        yield made


async def test_all_kv_passes_the_proxy(faulty: Rig) -> None:
    await faulty.fetch()
    faulty.check(NUM_TOKENS)
    assert faulty.proxy.num_bytes[faulty.towards_consumer] > len(faulty.source.content(ALL))


@pytest.mark.parametrize("name", ["latency", "bandwidth", "slicer"])
async def test_a_slow_network_only_takes_longer(faulty: Rig, name: str) -> None:
    make: dict[str, Callable[[], Toxic]] = {
        "latency": lambda: Latency(latency_s=0.02, jitter_s=0.02),
        "bandwidth": lambda: Bandwidth(bytes_per_s=1.5e6),
        "slicer": lambda: Slicer(size=400),
    }
    toxic = faulty.proxy.add(make[name]())
    await faulty.fetch()
    assert toxic.hits
    faulty.check(NUM_TOKENS)
    await faulty.all_closed()
    assert len(faulty.gate.feeds) == 1


@pytest.mark.parametrize("name", ["reset", "cut", "drop", "flip"])
@pytest.mark.parametrize("after_bytes", [100_000, 900_000])
async def test_a_broken_network_leaves_a_valid_prefix_and_the_rest_is_fetched_again(
    faulty: Rig, name: str, after_bytes: int
) -> None:
    way = faulty.towards_consumer
    make: dict[str, Callable[[], Toxic]] = {
        "reset": lambda: Reset(way, after_bytes=after_bytes),
        "cut": lambda: Cut(way, after_bytes=after_bytes),
        "drop": lambda: Drop(way, after_bytes=after_bytes),
        "flip": lambda: BitFlip(way, every_bytes=5_000, after_bytes=after_bytes),
    }
    toxic = faulty.proxy.add(make[name]())
    began_s = time.monotonic()
    with pytest.raises(BatonError) as caught:
        await faulty.fetch()
    assert toxic.hits
    assert caught.value.cause in FAULTS
    assert time.monotonic() - began_s < PATIENCE_S
    valid_tokens = faulty.importer.valid_tokens
    assert valid_tokens < NUM_TOKENS
    faulty.check(valid_tokens)
    await faulty.all_closed()
    faulty.proxy.heal()
    assert (await faulty.fetch(valid_tokens)).is_complete
    faulty.check(NUM_TOKENS)
    await faulty.all_closed()


@pytest.mark.parametrize("way", [UP, DOWN])
async def test_a_connection_that_went_silent_is_noticed_and_replaced(way: Direction) -> None:
    async with rig("grpc") as faulty:
        await faulty.fetch()
        toxic = faulty.proxy.add(Drop(way))
        began_s = time.monotonic()
        with pytest.raises(BatonError) as caught:
            await faulty.fetch()
        assert time.monotonic() - began_s < PATIENCE_S
        assert toxic.hits
        assert caught.value.cause in FAULTS
        faulty.proxy.heal()
        await faulty.fetch()
        faulty.check(NUM_TOKENS)
        await faulty.all_closed()
        assert faulty.proxy.num_accepted == 2


@pytest.mark.parametrize("bytes_per_s", [4e5])
async def test_a_crawling_connection_is_not_taken_for_a_silent_one(bytes_per_s: float) -> None:
    """A megabyte queued before a ping's answer is seconds of work, none of them idle."""
    async with rig("grpc") as faulty:
        toxic = faulty.proxy.add(Bandwidth(DOWN, bytes_per_s=bytes_per_s))
        await faulty.fetch()
        assert toxic.hits
        faulty.check(NUM_TOKENS)
        assert len(faulty.gate.feeds) == 1
