"""Frames that are truncated, reordered, repeated, lost, damaged or of another fetch, over every
transport: the right cause, nothing wrong in the pool, and the rest comes with the next fetch."""

import importlib.util
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from dataclasses import replace

import pytest

from baton.errors import BatonError, Cause
from baton.kvtransfer.base import Attachment, Buffers, FetchOpen, Staging
from baton.kvtransfer.exporter import Exporter
from baton.kvtransfer.importer import Importer
from baton.types import KVRange
from tests.kvtransfer.support import (
    NUM_LAYERS,
    Gate,
    Pair,
    Pool,
    Unbounded,
    connected,
    make_fetch,
    make_pool,
)

NUM_TOKENS = 200
ALL = KVRange(0, NUM_LAYERS, 0, NUM_TOKENS)
K = 3  # the first frame that something happens to, of about ten
Frames = list[bytes]
Fault = Callable[[Frames, Frames], Frames]  # (frames of this fetch, of the one before) → sent

FAULTS: dict[str, tuple[Fault, Cause]] = {
    "truncated": (lambda f, _: [*f[:K], f[K][:-1], *f[K + 1 :]], Cause.FRAME_TRUNCATED),
    "header only": (lambda f, _: [*f[:K], f[K][:64]], Cause.FRAME_TRUNCATED),
    "empty": (lambda f, _: [*f[:K], b""], Cause.FRAME_TRUNCATED),
    "two in one": (lambda f, _: [*f[:K], f[K] + f[K + 1]], Cause.FRAME_CORRUPT),
    "reordered": (lambda f, _: [*f[:K], f[K + 1], f[K], *f[K + 2 :]], Cause.FRAME_ORDER),
    "repeated": (lambda f, _: [*f[: K + 1], *f[K:]], Cause.FRAME_ORDER),
    "lost": (lambda f, _: [*f[:K], *f[K + 1 :]], Cause.FRAME_ORDER),
    "damaged header": (lambda f, _: [*f[:K], _flip(f[K], 20)], Cause.FRAME_CORRUPT),
    "damaged payload": (lambda f, _: [*f[:K], _flip(f[K], 100)], Cause.FRAME_CORRUPT),
    "end too early": (lambda f, _: [*f[:K], f[-1]], Cause.FRAME_ORDER),
    "damaged end": (lambda f, _: [*f[:-1], _flip(f[-1], 70)], Cause.FRAME_CORRUPT),
    "of the fetch before": (lambda f, old: [*f[:K], *old[K:]], Cause.EPOCH_MISMATCH),
    "all of the fetch before": (lambda _, old: old, Cause.EPOCH_MISMATCH),
}  # fmt: skip


def _flip(frame: bytes, at: int) -> bytes:
    damaged = bytearray(frame)
    damaged[at] ^= 0x10
    return bytes(damaged)


class FaultyAttachment:
    """Another attachment's frames after a fault has been through them."""

    def __init__(self, attachment: Attachment, source: "FaultySource", fault: Fault | None) -> None:
        self.epoch = attachment.epoch
        self.num_ready_tokens = attachment.num_ready_tokens
        self.failed = attachment.failed
        self.done = attachment.done
        self.close = attachment.close
        self._attachment = attachment
        self._source = source
        self._fault = fault

    async def frames(self, staging: Staging) -> AsyncGenerator[Buffers, None]:
        frames = [b"".join(parts) async for parts in self._attachment.frames(Unbounded())]
        assert len(frames) > K + 2
        before, self._source.recorded = self._source.recorded, frames
        for frame in frames if self._fault is None else self._fault(frames, before):
            await staging.take(1)
            yield (frame,)


class FaultySource:
    def __init__(self, exporter: Exporter) -> None:
        self.fault: Fault | None = None
        self.recorded: Frames = []
        self._exporter = exporter

    async def attach(self, fetch: FetchOpen) -> Attachment:
        fault, self.fault = self.fault, None
        return FaultyAttachment(await self._exporter.attach(fetch), self, fault)


@pytest.fixture(
    params=[
        "local",
        "grpc",
        "shm",
        pytest.param(
            "ucx",
            marks=[
                pytest.mark.ucx,
                pytest.mark.skipif(
                    importlib.util.find_spec("ucxx") is None,
                    reason="the ucx extra is not installed",
                ),
            ],
        ),
    ]
)
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    async with connected(request.param) as transports:
        yield transports


@pytest.fixture
def pools() -> Iterator[tuple[Pool, Pool]]:
    source, target = make_pool(16, range(13), seed=1), make_pool(32, range(7), seed=2)
    yield source, target
    source.memory.close()
    target.memory.close()


@pytest.mark.parametrize("name", FAULTS)
async def test_a_fault_is_found_and_the_hole_fetched_again(
    pair: Pair, pools: tuple[Pool, Pool], name: str
) -> None:
    fault, cause = FAULTS[name]
    source, target = pools
    gate = Gate(source, NUM_TOKENS, b"first tokens")
    faulty = FaultySource(Exporter(source.memory, gate, frame_bytes=4000))
    peer = await pair.producer.start(faulty)

    async def fetch(token_start: int) -> Importer:
        where = replace(ALL, token_start=token_start)
        importers.append(Importer(target.memory, target.block_ids, where))
        await pair.consumer.fetch(peer, make_fetch(NUM_TOKENS, token_start), importers[-1])
        return importers[-1]

    importers: list[Importer] = []
    await fetch(0)
    target.cache.zero_()
    untouched = target.content(ALL)
    faulty.fault = fault
    with pytest.raises(BatonError) as caught:
        await fetch(0)
    assert caught.value.cause is cause
    valid_tokens = importers[-1].valid_tokens
    assert valid_tokens < NUM_TOKENS or name == "damaged end"
    if valid_tokens:
        valid = replace(ALL, token_stop=valid_tokens)
        assert target.content(valid) == source.content(valid)
    if valid_tokens < NUM_TOKENS:
        rest = replace(ALL, layer_start=NUM_LAYERS - 1, token_start=valid_tokens)
        num_bytes = len(target.content(rest))
        assert target.content(rest) == untouched[:num_bytes], "something unverified was written"
    if valid_tokens < NUM_TOKENS:
        assert (await fetch(valid_tokens)).end_payload == b"first tokens"
        assert target.content(ALL) == source.content(ALL)
