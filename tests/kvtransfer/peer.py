"""The other process of a two-process test: `python -m tests.kvtransfer.peer ROLE TRANSPORT …`.

    produce TRANSPORT NUM_READY        serves a pool of 4096 tokens, NUM_READY of them computed
    consume TRANSPORT ADDRESS          fetches from ADDRESS until it is killed

Prints one line when it is up, and ends when its standard input does.
"""

import asyncio
import sys

from baton.kvtransfer.exporter import Exporter
from baton.kvtransfer.importer import Importer
from baton.types import KVRange, TransportAddress
from tests.kvtransfer.support import (
    NUM_LAYERS,
    Gate,
    Pool,
    grpc_end,
    make_fetch,
    make_pool,
    on_device,
)

NUM_TOKENS = 4096


def known_pool(transport: str = "") -> Pool:
    pool = make_pool(16, range(NUM_TOKENS // 16), seed=1)
    return on_device(pool) if transport == "cuda" else pool


async def stdin_closed() -> None:
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
    await reader.read()


async def produce(transport_name: str, num_ready: int) -> None:
    pool = known_pool(transport_name)
    gate = Gate(pool, num_ready, b"end" if num_ready == NUM_TOKENS else None)
    async with grpc_end(transport_name, pool.memory.device) as transport:
        address = await transport.start(Exporter(pool.memory, gate, frame_bytes=1 << 16))
        print(address.address, flush=True)
        await stdin_closed()
    pool.memory.close()


async def consume(transport_name: str, address: str) -> None:
    pool = known_pool(transport_name)
    async with grpc_end(transport_name, pool.memory.device) as transport:
        print("fetching", flush=True)
        importer = Importer(pool.memory, pool.block_ids, KVRange(0, NUM_LAYERS, 0, NUM_TOKENS))
        await transport.fetch(
            TransportAddress(transport_name, address), make_fetch(NUM_TOKENS), importer
        )


if __name__ == "__main__":
    role, name, argument = sys.argv[1:]
    asyncio.run(produce(name, int(argument)) if role == "produce" else consume(name, argument))
