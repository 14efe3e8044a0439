"""KV between pools of different shape: head slices of tensor-parallel ranks, and other dtypes.

Heads on the wire are numbered over the whole model, so a frame says which ones it brings whatever
either side's ranks are. A rank's pool holds a run of them (`HeadSlice`), and a consumer's rank gets
its own from one rank of the producer or from several at once (`SliceImport`), by the mapping in
`baton.heads`. Workers of this version run on one rank each and do not announce any of this.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from baton.errors import BatonError, Cause
from baton.heads import HeadSource, head_sources, heads_of
from baton.kvtransfer.importer import Importer
from baton.kvtransfer.memory import KVMemory, heap_buffer
from baton.kvtransfer.pump import settle
from baton.types import BlockId, KVLayout, KVRange, TransferStats

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class HeadSlice:
    """The pool of one tensor-parallel rank as exporter and importer use it: ranges name heads of
    the whole model."""

    def __init__(self, memory: KVMemory, num_local_heads: int, rank: int = 0) -> None:
        """
        Args:
            memory: of a cache with this rank's heads alone; its layout is the whole model's, of
                `tp_size` ranks.

        Raises:
            ValueError: the rank has another number of heads.
        """
        self.layout = memory.layout
        self.run = memory.run
        self.settle = memory.settle
        self.close = memory.close
        self.is_on_device = memory.is_on_device
        (group,) = self.layout.groups
        self.heads = heads_of(group.num_kv_heads, self.layout.tp_size, rank)
        self._num_kv_heads = group.num_kv_heads
        self._memory = memory
        if num_local_heads != len(self.heads):
            raise ValueError(f"{num_local_heads} heads in the cache of {self.heads}")

    def has(self, where: KVRange) -> bool:
        local = self._local(where)
        return local is not None and self._memory.has(local)

    def num_bytes(self, where: KVRange) -> int:
        return self._memory.num_bytes(self._known(where))

    def pack(
        self,
        block_ids: Sequence[int],
        where: KVRange,
        headroom_bytes: int = 0,
        buffer: Callable[[int], memoryview] = heap_buffer,
    ) -> memoryview:
        return self._memory.pack(block_ids, self._known(where), headroom_bytes, buffer)

    def unpack(self, block_ids: Sequence[int], where: KVRange, payload: memoryview) -> None:
        self._memory.unpack(block_ids, self._known(where), payload)

    def _local(self, where: KVRange) -> KVRange | None:
        """The same range in the cache's own numbers; None if it lacks some of the heads."""
        start, stop = where.head_start, where.head_stop
        if start == stop == 0:
            stop = self._num_kv_heads
        if not self.heads.start <= start < stop <= self.heads.stop:
            return None
        offset = self.heads.start
        return replace(where, head_start=start - offset, head_stop=stop - offset)

    def _known(self, where: KVRange) -> KVRange:
        local = self._local(where)
        if local is None:
            raise ValueError(f"this rank has heads {self.heads}, not those of {where}")
        return local


class Converting:
    """A pool as the importer of KV in another dtype sees it: payloads are the source's, what is
    written is the pool's. Shares the pool's transfer thread.

    bfloat16 or float16 into float32 keeps every value; any other pair rounds (to nearest even), and
    float16 turns what it cannot hold into infinities. No pair gives the tokens of a run in one
    dtype, which is why fingerprints differ then and workers are never paired.
    """

    def __init__(self, memory: KVMemory, source_dtype: str) -> None:
        """
        Raises:
            ValueError: there is no conversion from this dtype.
        """
        if source_dtype not in DTYPES:
            raise ValueError(f"no conversion from {source_dtype}")
        (group,) = memory.layout.groups
        self.layout = memory.layout
        self.run = memory.run
        self.settle = memory.settle
        self._memory = memory
        self._source, self._target = DTYPES[source_dtype], DTYPES[group.dtype]

    def num_bytes(self, where: KVRange) -> int:
        return self._memory.num_bytes(where) * self._source.itemsize // self._target.itemsize

    def unpack(self, block_ids: Sequence[int], where: KVRange, payload: memoryview) -> None:
        values = torch.from_numpy(np.frombuffer(payload, np.uint8).copy()).view(self._source)
        converted = values.to(self._target).view(torch.uint8)
        self._memory.unpack(block_ids, where, converted.numpy().data)


@dataclass(frozen=True, slots=True)
class Slice:
    """One fetch of a rank: which heads, from which rank of the producer."""

    source: HeadSource
    range: KVRange


def plan_slices(where: KVRange, source: KVLayout, target: KVLayout, rank: int) -> list[Slice]:
    """The fetches that bring `where` (all heads) to this rank of `target`.

    Raises:
        ValueError: the heads do not divide.
    """
    (group,) = target.groups
    sources = head_sources(group.num_kv_heads, source.tp_size, target.tp_size, rank)
    return [
        Slice(one, replace(where, head_start=one.head_start, head_stop=one.head_stop))
        for one in sources
    ]


class SliceImport:
    """Several importers that fill one pool from several ranks; a refetch needs a new one."""

    def __init__(
        self,
        memory: KVMemory,
        block_ids: Sequence[BlockId],
        slices: Sequence[Slice],
        make: Callable[[KVMemory, Sequence[BlockId], KVRange], Importer] = Importer,
    ) -> None:
        self.slices = tuple(slices)
        self.importers = tuple(make(memory, block_ids, one.range) for one in slices)

    @property
    def valid_tokens(self) -> int:
        """Prompt tokens [0, valid_tokens) are there with all heads of this rank."""
        return min(importer.valid_tokens for importer in self.importers)

    async def run(
        self, fetch: Callable[[Slice, Importer], Coroutine[Any, Any, TransferStats]]
    ) -> tuple[list[TransferStats], bytes]:
        """All fetches at once: (their stats, the end payload, which all must agree on).

        Returns or raises when none of them writes any more.

        Raises:
            BatonError: what the first failing one raised; PROTOCOL if the ranks disagree.
        """
        tasks = [
            asyncio.create_task(fetch(one, importer))
            for one, importer in zip(self.slices, self.importers, strict=True)
        ]
        try:
            stats = await asyncio.gather(*tasks)
        finally:
            await settle(*tasks)
        payloads = {importer.end_payload for importer in self.importers}
        if len(payloads) != 1 or None in payloads:
            raise BatonError(Cause.PROTOCOL, "the producer's ranks disagree about the end")
        (payload,) = payloads
        assert payload is not None
        return list(stats), payload
