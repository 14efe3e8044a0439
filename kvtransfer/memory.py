"""A worker's KV pool as the exchange sees it: byte ranges of sequences, copied on one transfer
thread."""

import asyncio
import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import numpy as np
from torch import Tensor

from baton.kernels import kv_pack
from baton.kvtransfer.device_staging import DeviceStaging
from baton.types import KVLayout, KVRange

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_REUSED_BYTES, _KEPT_BYTES = 32 << 20, 64 << 20

P = ParamSpec("P")
R = TypeVar("R")


def keep_freed_memory() -> None:
    """Let the C library keep what is freed (buffers up to 32 MiB, 64 MiB in all per arena) for the
    next ones.

    It would give a frame's megabyte back to the kernel each time, and the next one would be paid
    for in page faults: two thirds of the cost of sending it over gRPC. For processes that move KV;
    call it before threads start. Does nothing where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _REUSED_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def heap_buffer(num_bytes: int) -> memoryview:
    """Writable memory that nobody else holds; its content is undefined."""
    return np.empty(num_bytes, np.uint8).data


class KVMemory:
    """Packs and unpacks ranges of a KV cache. One per worker, shared by exporter and importers.

    `pack`, `unpack` and `settle` are plain functions; call them (with whatever else belongs to the
    same frame: checksum, header) through `run`, which keeps them off the event loop and serial.
    """

    def __init__(
        self, kv_cache: Tensor, layout: KVLayout, device: DeviceStaging | None = None
    ) -> None:
        """
        Args:
            kv_cache: [num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim], contiguous.
            layout: of `kv_cache`; one group.
            device: of `kv_cache`; made for one in CUDA memory.
        """
        (group,) = layout.groups
        shape = (group.num_layers, 2, kv_cache.shape[2], layout.block_size)
        if tuple(kv_cache.shape[:4]) != shape or kv_cache.shape[5] != group.head_dim:
            raise ValueError(f"cache {tuple(kv_cache.shape)} is not of {layout}")
        self.layout = layout
        self._kv_cache = kv_cache
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="kv-transfer")
        self.device = DeviceStaging(kv_cache) if kv_cache.is_cuda else device

    def has(self, where: KVRange) -> bool:
        """Does the pool have these layers and heads?"""
        (group,) = self.layout.groups
        layers_ok = 0 <= where.layer_start < where.layer_stop <= group.num_layers
        is_all = where.head_start == where.head_stop == 0
        heads_ok = is_all or 0 <= where.head_start < where.head_stop <= self._kv_cache.shape[4]
        return layers_ok and heads_ok

    def num_bytes(self, where: KVRange) -> int:
        """Payload size of a range."""
        return kv_pack.payload_bytes(self._kv_cache, where)

    def pack(
        self,
        block_ids: Sequence[int],
        where: KVRange,
        headroom_bytes: int = 0,
        buffer: Callable[[int], memoryview] = heap_buffer,
    ) -> memoryview:
        """The payload of `where` behind `headroom_bytes` that are left to the caller, in what
        `buffer` returns for that many bytes."""
        out = buffer(headroom_bytes + self.num_bytes(where))
        if self.device is not None:
            self.device.pack(block_ids, where, out[headroom_bytes:])
        else:
            kv_pack.pack_kv(self._kv_cache, block_ids, where, out[headroom_bytes:])
        return out

    def unpack(
        self, block_ids: Sequence[int], where: KVRange, payload: memoryview | Tensor
    ) -> None:
        """Write a payload into the slots of `where`. One in host memory was read on return; it is
        all there when `settle` has returned."""
        if self.device is not None:
            self.device.unpack(block_ids, where, payload)
        else:
            kv_pack.unpack_kv(self._kv_cache, block_ids, where, payload)

    def settle(self) -> None:
        """Wait until everything that was unpacked is in the pool: once for several payloads,
        because waiting for a device costs as much as copying 100 KiB."""
        if self.device is not None:
            self.device.settle()

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call `function` on the transfer thread.

        Returns or raises only when the thread is not in `function` any more, also when cancelled:
        that is the exchange's quiescence. A call that has not begun when cancelled never begins.
        """
        future = self._executor.submit(function, *args, **kwargs)
        waiting = asyncio.wrap_future(future)
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            await _settle(future)
            raise

    def close(self) -> None:
        """Wait for the thread to finish what was submitted. Idempotent."""
        self._executor.shutdown(wait=True)


async def _settle(future: Future[R]) -> None:
    """Wait for a call that can no longer be cancelled; further cancellations do not cut it
    short."""
    if future.cancel():
        return
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    future.add_done_callback(lambda _: loop.call_soon_threadsafe(stopped.set))
    while not stopped.is_set():
        try:
            await stopped.wait()
        except asyncio.CancelledError:  # the caller re-raises
            continue
