"""The exchange of a pool in CUDA memory: `pytest -m gpu`, with TRITON_INTERPRET=0."""

import asyncio

import pytest
import torch

from baton.kernels.payload_digest import payload_digests
from baton.kvtransfer.exporter import Exporter
from baton.kvtransfer.importer import Importer
from baton.kvtransfer.memory import KVMemory
from baton.types import KVRange
from tests.kvtransfer import test_two_processes as two_processes
from tests.kvtransfer.support import (
    NUM_LAYERS,
    Gate,
    grpc_end,
    make_fetch,
    make_layout,
    make_pool,
    on_device,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

TRANSPORTS = ["grpc", pytest.param("ucx", marks=pytest.mark.ucx)]
RANGES = [
    KVRange(0, NUM_LAYERS, 0, 96),
    KVRange(1, 3, 5, 40),
    KVRange(0, NUM_LAYERS, 17, 18),
    KVRange(0, NUM_LAYERS, 30, 96, 1, 2),
]


@pytest.mark.parametrize("where", RANGES, ids=str)
def test_payloads_are_those_of_a_pool_on_cpu(where: KVRange) -> None:
    cpu = make_pool(16, [2, 0, 1, 5, 4, 3], seed=1)
    cuda = on_device(cpu)
    payload = cpu.memory.pack(cpu.block_ids, where)
    assert bytes(cuda.memory.pack(cuda.block_ids, where)) == bytes(payload)
    there, here = on_device(empty := make_pool(32, [2, 0, 1], seed=2)), empty
    there.memory.unpack(there.block_ids, where, payload)
    there.memory.settle()
    here.memory.unpack(here.block_ids, where, payload)
    assert torch.equal(there.cache.cpu(), here.cache)


async def test_copies_run_beside_the_engine_s_stream() -> None:
    """A pack returns while the engine's stream is still busy."""
    pool = on_device(make_pool(16, [2, 0, 1], seed=1))
    where = KVRange(0, NUM_LAYERS, 0, 48)
    a = torch.randn(8192, 8192, device="cuda")
    done = torch.cuda.Event()
    for _ in range(40):
        a = (a @ a).clamp_(-1, 1)
    done.record()
    payload = await pool.memory.run(pool.memory.pack, pool.block_ids, where)
    assert not done.query(), "the copy waited for the engine's stream, or that was too fast"
    torch.cuda.synchronize()
    assert bytes(payload) == bytes(make_pool(16, [2, 0, 1], seed=1).content(where))


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_kv_moves_between_devices(transport: str) -> None:
    """CUDA to CUDA and CUDA to CPU, with other block sizes."""
    num_tokens = 256
    source = on_device(make_pool(16, [*range(15, -1, -1)], seed=1))
    where = KVRange(0, NUM_LAYERS, 0, num_tokens)
    async with grpc_end(transport) as producer, grpc_end(transport) as consumer:
        gate = Gate(source, num_tokens, b"end")
        address = await producer.start(Exporter(source.memory, gate, frame_bytes=1 << 14))
        on_cpu = make_pool(32, [*range(8)], seed=2)
        for target in (on_device(on_cpu), on_cpu):
            importer = Importer(target.memory, target.block_ids, where)
            stats = await asyncio.wait_for(
                consumer.fetch(address, make_fetch(num_tokens), importer), 60
            )
            assert stats.num_bytes > len(make_pool(16, range(16), seed=1).content(where))
            got = KVMemory(target.cache.cpu(), make_layout(32)).pack(target.block_ids, where)
            want = KVMemory(source.cache.cpu(), make_layout(16)).pack(source.block_ids, where)
            assert bytes(got) == bytes(want)


@pytest.mark.ucx
async def test_kv_never_leaves_the_device_between_two_processes() -> None:
    await two_processes.test_kv_moves_between_processes("cuda")


@pytest.mark.ucx
async def test_a_process_is_killed_while_payloads_are_in_its_memory() -> None:
    await two_processes.test_a_producer_that_computes_and_is_killed("cuda")
    await two_processes.test_a_killed_consumer_ends_the_attachment("cuda")
    await two_processes.test_a_stopped_consumer_does_not_hold_the_producer("cuda")


def test_digests_are_those_of_the_reference() -> None:
    for num_bytes in (0, 4, 1 << 14, (1 << 14) + 4, 3_000_000):
        payload = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8)
        got = payload_digests([payload.cuda(), payload.cuda()]).tolist()
        assert got == payload_digests([payload]).tolist() * 2
