"""A KV pool in CUDA memory, and payloads in host memory: the way between them.

    pool ── pack kernel ──► device buffer ── copy ──► frame
    frame ── copy ──► device buffer ── unpack kernel ──► pool

All of it runs on a stream of its own, beside the engine's. Nothing here waits for the engine's
stream, and need not: KV is told ready, and blocks change hands, only after the engine has waited
for the work that concerns them.

Frames lie in ordinary memory (shared, or a buffer that gRPC or UCX reads) and the driver copies to
and from there: a pinned buffer between would be one more copy by this thread.
"""

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from baton.kernels import kv_pack
from baton.types import KVRange


class CudaStaging:
    """Packs and unpacks; one thread only."""

    def __init__(self, kv_cache: Tensor) -> None:
        """kv_cache: as in `kv_pack`, on a CUDA device; nothing else uses it yet."""
        self._kv_cache = kv_cache
        self._stream: torch.cuda.Stream = torch.cuda.Stream(kv_cache.device)  # type: ignore[no-untyped-call]
        self._compile()

    def pack(self, block_ids: Sequence[int], where: KVRange, out: memoryview) -> None:
        """The payload of `where` into `out`, of exactly its size; it is all there on return."""
        with torch.cuda.stream(self._stream):
            packed = torch.empty(len(out), dtype=torch.uint8, device=self._kv_cache.device)
            kv_pack.pack_kv(self._kv_cache, block_ids, where, packed)
            torch.from_numpy(np.frombuffer(out, np.uint8)).copy_(packed)

    def unpack(self, block_ids: Sequence[int], where: KVRange, payload: memoryview) -> None:
        """Write a payload into the slots of `where`. On return it is read; once `settle` has
        returned, it is written."""
        with torch.cuda.stream(self._stream):
            packed = torch.empty(len(payload), dtype=torch.uint8, device=self._kv_cache.device)
            # The driver returns from a copy out of memory that is not pinned when it has read it.
            packed.copy_(_readable(payload), non_blocking=True)
            kv_pack.unpack_kv(self._kv_cache, block_ids, where, packed)

    def settle(self) -> None:
        """Wait for what was launched, asleep: `synchronize` of a stream would spin."""
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        event.synchronize()

    def _compile(self) -> None:
        """The kernels of both directions, now rather than in the first hand-off: one block is read
        and written back."""
        where = KVRange(0, self._kv_cache.shape[0], 0, self._kv_cache.shape[3])
        payload = np.empty(kv_pack.payload_bytes(self._kv_cache, where), np.uint8).data
        self.pack([0], where, payload)
        self.unpack([0], where, payload)
        self.settle()


def _readable(payload: memoryview) -> Tensor:
    """[num_bytes] uint8 over memory that may be read only, which torch knows no tensors of."""
    address = np.frombuffer(payload, np.uint8).ctypes.data
    return torch.frombuffer(
        (ctypes.c_uint8 * len(payload)).from_address(address), dtype=torch.uint8
    )
