"""A KV pool in CUDA memory, and payloads in host memory: the way between them.

    pool ── pack kernel ──► device buffer ── copy ──► pinned host buffer ──► frame
    frame ──► pinned host buffer ── copy ──► device buffer ── unpack kernel ──► pool

All of it runs on a stream of its own, beside the engine's. Nothing here waits for the engine's
stream, and need not: KV is told ready, and blocks change hands, only after the engine has waited
for the work that concerns them. The transfer thread sleeps while the device works.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from baton.kernels import kv_pack
from baton.types import KVRange


class CudaStaging:
    """Packs and unpacks; one thread only. Buffers come from torch's caching allocators: pinning or
    allocating memory anew would cost as much as copying megabytes."""

    def __init__(self, kv_cache: Tensor) -> None:
        """kv_cache: as in `kv_pack`, on a CUDA device; nothing else uses it yet."""
        self._kv_cache = kv_cache
        self._stream: torch.cuda.Stream = torch.cuda.Stream(kv_cache.device)  # type: ignore[no-untyped-call]
        self._compile()

    def pack(self, block_ids: Sequence[int], where: KVRange, headroom_bytes: int) -> memoryview:
        """The payload of `where`, in pinned memory behind `headroom_bytes`."""
        num_bytes = kv_pack.payload_bytes(self._kv_cache, where)
        host = torch.empty(headroom_bytes + num_bytes, dtype=torch.uint8, pin_memory=True)
        with torch.cuda.stream(self._stream):
            packed = torch.empty(num_bytes, dtype=torch.uint8, device=self._kv_cache.device)
            kv_pack.pack_kv(self._kv_cache, block_ids, where, packed)
            host[headroom_bytes:].copy_(packed, non_blocking=True)
            self._wait()
        return host.numpy().data

    def unpack(self, block_ids: Sequence[int], where: KVRange, payload: memoryview) -> None:
        """Write a payload into the slots of `where`; it is all there on return."""
        host = torch.empty(len(payload), dtype=torch.uint8, pin_memory=True)
        host.numpy()[:] = np.frombuffer(payload, dtype=np.uint8)
        with torch.cuda.stream(self._stream):
            packed = host.to(self._kv_cache.device, non_blocking=True)
            kv_pack.unpack_kv(self._kv_cache, block_ids, where, packed)
            self._wait()

    def _wait(self) -> None:
        """Sleep until the stream is done; `synchronize` would spin."""
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        event.synchronize()

    def _compile(self) -> None:
        """The kernels of both directions, now rather than in the first hand-off: one block is read
        and written back."""
        where = KVRange(0, self._kv_cache.shape[0], 0, self._kv_cache.shape[3])
        self.unpack([0], where, self.pack([0], where, 0))
