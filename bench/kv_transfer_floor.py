"""What pool to pool costs without any protocol: two processes that only pack, checksum, verify and
unpack frames in memory that both map, one byte over a socket for each. `bench.kv_transfer` shows it
as the row *copies alone*: no transport can be faster on this machine with these copies."""

import socket
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.shared_memory import SharedMemory

from baton.kvtransfer.exporter import FRAME_BYTES, next_parts
from baton.kvtransfer.frames import HEADER_BYTES, FrameReader, FrameWriter
from baton.kvtransfer.memory import KVMemory
from baton.types import BlockId, KVRange

_NUM_SLOTS = 8  # as much as a fetch has credit for
_SLOT_BYTES = HEADER_BYTES + FRAME_BYTES
_EPOCH = 1


def _slot(ring: SharedMemory, index: int, num_bytes: int) -> memoryview:
    start = index % _NUM_SLOTS * _SLOT_BYTES
    return ring.buf[start : start + num_bytes]


def _parts(memory: KVMemory, num_tokens: int) -> Iterator[KVRange]:
    """The frames' ranges, as the exporter cuts them when everything is ready."""
    layout = memory.layout
    span = KVRange(0, layout.num_layers, 0, num_tokens)
    while span.num_tokens:
        num_bytes = memory.num_bytes(span)
        for part in next_parts(span, layout.block_size, num_bytes, FRAME_BYTES):
            yield part
            span = replace(span, token_start=part.token_stop)


def make_ring() -> SharedMemory:
    return SharedMemory(create=True, size=_NUM_SLOTS * _SLOT_BYTES)


def serve_copies(
    listener: socket.socket, ring: SharedMemory, memory: KVMemory, block_ids: list[BlockId]
) -> None:
    """The producer: 8 bytes with a number of tokens come in, their frames go into the ring."""
    with listener.accept()[0] as connection:
        while request := connection.recv(8):
            writer, num_free = FrameWriter(_EPOCH), _NUM_SLOTS
            parts = _parts(memory, int.from_bytes(request, "little"))
            for index, part in enumerate(parts):
                if not num_free:
                    num_free += len(connection.recv(_NUM_SLOTS))
                slot = _slot(ring, index, HEADER_BYTES + memory.num_bytes(part))
                writer.data(part, memory.pack(block_ids, part, HEADER_BYTES, lambda _, s=slot: s))
                connection.send(b"\1")
                num_free -= 1
            while num_free < _NUM_SLOTS:
                num_free += len(connection.recv(_NUM_SLOTS))


def take_copies(
    connection: socket.socket,
    ring: SharedMemory,
    memory: KVMemory,
    block_ids: list[BlockId],
    num_tokens: int,
) -> int:
    """The consumer of one such transfer; how many frames it took."""
    connection.send(num_tokens.to_bytes(8, "little"))
    reader, num_frames = FrameReader(_EPOCH), 0
    for index, part in enumerate(_parts(memory, num_tokens)):
        connection.recv(1)
        frame = reader.accept(_slot(ring, index, HEADER_BYTES + memory.num_bytes(part)))
        memory.unpack(block_ids, frame.range, frame.payload)
        connection.send(b"\1")
        num_frames += 1
    return num_frames
