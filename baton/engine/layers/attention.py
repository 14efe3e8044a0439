"""Attention over the KV pool, planned once per step for all layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.engine.kv_cache import KVCache
from baton.engine.model_config import ModelConfig
from baton.kernels.kv_store import kv_store
from baton.kernels.paged_attention import paged_decode, paged_prefill
from baton.kernels.paged_attention_cpu import CpuAttention, Invariance
from baton.kernels.paged_attention_native import NativeAttention, is_native
from baton.kernels.paged_rows import PagedRow, num_blocks_used, query_slots


class StepAttention(Protocol):
    """One step's attention, ready to run in every layer."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v, then attend.

        Args:
            q: [num_tokens, num_heads, head_dim]; k, v: [num_tokens, num_kv_heads, head_dim].

        Returns: [num_tokens, num_heads * head_dim].
        """
        ...


class AttentionBackend(Protocol):
    def plan(self, rows: Sequence[PagedRow]) -> StepAttention: ...


def make_attention(
    config: ModelConfig, cache: KVCache, invariance: Invariance | None
) -> AttentionBackend:
    if cache.tensor.device.type == "cpu":
        return CpuBackend(config, cache, invariance)
    return KernelBackend(config, cache)


class CpuBackend:
    def __init__(self, config: ModelConfig, cache: KVCache, invariance: Invariance | None) -> None:
        self._cache = cache
        self._windows = config.windows
        shape, dtype = (config.num_heads, config.num_kv_heads, config.head_dim), cache.tensor.dtype
        self._attention: CpuAttention | NativeAttention
        if is_native(*shape, dtype):
            self._attention = NativeAttention(*shape)
        else:
            self._attention = CpuAttention(*shape, dtype, invariance)

    def plan(self, rows: Sequence[PagedRow]) -> StepAttention:
        cache = self._cache.tensor
        slots = torch.tensor(list(query_slots(rows, self._cache.block_size)))
        plans: dict[int, Any] = {
            window: self._attention.plan(rows, cache[0], window) for window in set(self._windows)
        }

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            kv_store(k, v, cache[layer], slots)
            return self._attention.run(q, cache[layer], plans[self._windows[layer]]).flatten(1)

        return attend


@dataclass(frozen=True, slots=True, eq=False)
class StepTables:
    """A step in device memory: `num_decodes` rows with one query each, then the prefills."""

    slots: Tensor  # [num_tokens] int64; negative = stored nowhere
    block_table: Tensor  # [num_rows, max_blocks] int32
    context_lens: Tensor  # [num_rows] int32
    num_decodes: int
    query_starts: Tensor | None = None  # [number of prefills + 1] int32; None = there are none
    max_query_len: int = 0


class KernelBackend:
    """For CUDA. Rows with one query go through the decode kernel, the others through the prefill
    kernel; the runner puts the former first."""

    def __init__(self, config: ModelConfig, cache: KVCache) -> None:
        self._cache = cache
        self._windows = config.windows
        self._scale = config.head_dim**-0.5

    def plan(self, rows: Sequence[PagedRow]) -> StepAttention:
        device, block_size = self._cache.tensor.device, self._cache.block_size
        num_decodes = sum(row.num_queries == 1 for row in rows)
        assert all(row.num_queries == 1 for row in rows[:num_decodes]), "decodes come first"
        starts = [0, *accumulate(row.num_queries for row in rows[num_decodes:])]
        lens = [row.context_len for row in rows]
        slots = torch.tensor(list(query_slots(rows, block_size)), device=device)
        tables = StepTables(
            slots,
            torch.from_numpy(block_table(rows, block_size)).to(device),
            torch.tensor(lens, dtype=torch.int32, device=device),
            num_decodes,
            torch.tensor(starts, dtype=torch.int32, device=device) if len(starts) > 1 else None,
            max(row.num_queries for row in rows),
        )
        return self.attention(tables)

    def attention(self, step: StepTables) -> StepAttention:
        """Of a step that is on the device already; nothing is copied there."""
        cache, scale, windows = self._cache.tensor, self._scale, self._windows
        num, table, lens = step.num_decodes, step.block_table, step.context_lens

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            kv, window = cache[layer], windows[layer]
            kv_store(k, v, kv, step.slots)
            parts = []
            if num:
                parts.append(paged_decode(q[:num], kv, table[:num], lens[:num], scale, window))
            if step.query_starts is not None:
                prefill = step.query_starts, table[num:], lens[num:], step.max_query_len
                parts.append(paged_prefill(q[num:], kv, *prefill, scale, window))
            return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)

        return attend


def block_table(rows: Sequence[PagedRow], block_size: int) -> npt.NDArray[np.int32]:
    """[num_rows, blocks of the longest]: block ids, padded with 0."""
    used = [row.block_ids[: num_blocks_used(row, block_size)] for row in rows]
    table = np.zeros((len(rows), max(map(len, used))), np.int32)
    for line, block_ids in zip(table, used, strict=True):
        line[: len(block_ids)] = block_ids
    return table
