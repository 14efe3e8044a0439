"""A KV pool in device memory, and what lies between it and payloads.

    pool ── pack kernel ──► buffer ── copy ──► frame          payloads in host memory
    frame ── copy ──► buffer ── unpack kernel ──► pool

    pool ── pack kernel ──► buffer, digest                    payloads that stay on the device
    buffer, digest ── unpack kernel ──► pool

All of it runs on a stream of its own, beside the engine's. Nothing here waits for the engine's
stream, and need not: KV is told ready, and blocks change hands, only after the engine has waited
for the work that concerns them.

Frames lie in ordinary memory (shared, or a buffer that gRPC or UCX reads) and the driver copies to
and from there: a pinned buffer between would be one more copy by this thread.
"""

import ctypes
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from baton.kernels import kv_pack
from baton.kernels.payload_digest import payload_digests
from baton.types import KVRange


class DeviceStaging:
    """Packs and unpacks; one thread only, but for `buffer`. On a CPU cache, which tests give it,
    there is no stream and nothing to wait for."""

    def __init__(self, kv_cache: Tensor) -> None:
        """kv_cache: as in `kv_pack`; nothing else uses it yet."""
        self._kv_cache = kv_cache
        self._stream: torch.cuda.Stream | None = None
        if kv_cache.is_cuda:
            self._stream = torch.cuda.Stream(kv_cache.device)  # type: ignore[no-untyped-call]
        self._compile()

    def buffer(self, num_bytes: int) -> Tensor:
        """[num_bytes] uint8 on the device; its content is undefined. For any thread, whose device
        is this one from then on.

        It may be written at once by whoever knows nothing of streams: what used this memory before
        was waited for before it was freed.
        """
        with self._on_stream():
            return torch.empty(num_bytes, dtype=torch.uint8, device=self._kv_cache.device)

    def pack(self, block_ids: Sequence[int], where: KVRange, out: memoryview) -> None:
        """The payload of `where` into `out`, of exactly its size; it is all there on return."""
        packed = self.buffer(len(out))
        with self._on_stream():
            kv_pack.pack_kv(self._kv_cache, block_ids, where, packed)
            torch.from_numpy(np.frombuffer(out, np.uint8)).copy_(packed)

    def pack_here(
        self,
        block_ids: Sequence[int],
        ranges: Sequence[KVRange],
        buffer: Callable[[int], Tensor],
    ) -> list[tuple[Tensor, int]]:
        """The payload of each range in what `buffer` returns for its size, and its digest. They are
        there on return."""
        payloads = [buffer(kv_pack.payload_bytes(self._kv_cache, where)) for where in ranges]
        with self._on_stream():
            for where, payload in zip(ranges, payloads, strict=True):
                kv_pack.pack_kv(self._kv_cache, block_ids, where, payload)
        return list(zip(payloads, self.digests(payloads), strict=True))

    def digests(self, payloads: Sequence[Tensor]) -> list[int]:
        """Of payloads on the device: 64 bits each, unsigned."""
        with self._on_stream():
            digests = payload_digests(payloads)
        self.settle()
        return [digest % 2**64 for digest in digests.tolist()]

    def unpack(
        self, block_ids: Sequence[int], where: KVRange, payload: memoryview | Tensor
    ) -> None:
        """Write a payload into the slots of `where`. On return it is read, if it is in host memory;
        once `settle` has returned, it is written."""
        with self._on_stream():
            if isinstance(payload, memoryview):
                packed = self.buffer(len(payload))
                # The driver returns from a copy out of memory that is not pinned when it has read
                # it.
                packed.copy_(_readable(payload), non_blocking=True)
            else:
                packed = payload
            kv_pack.unpack_kv(self._kv_cache, block_ids, where, packed)

    def settle(self) -> None:
        """Wait for what was launched, asleep: `synchronize` of a stream would spin."""
        if self._stream is not None:
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record(self._stream)
            event.synchronize()

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _compile(self) -> None:
        """The kernels of both directions, now rather than in the first hand-off: one block is read
        and written back."""
        where = KVRange(0, self._kv_cache.shape[0], 0, self._kv_cache.shape[3])
        payload = np.empty(kv_pack.payload_bytes(self._kv_cache, where), np.uint8).data
        self.pack([0], where, payload)
        self.unpack([0], where, payload)
        self.digests([self.buffer(len(payload))])
        self.settle()


def _readable(payload: memoryview) -> Tensor:
    """[num_bytes] uint8 over memory that may be read only, which torch knows no tensors of."""
    address = np.frombuffer(payload, np.uint8).ctypes.data
    return torch.frombuffer(
        (ctypes.c_uint8 * len(payload)).from_address(address), dtype=torch.uint8
    )
