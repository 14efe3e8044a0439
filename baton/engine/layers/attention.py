"""Attention over the KV pool, planned once per step for all layers."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from baton.engine.kv_cache import KVCache
from baton.engine.model_config import ModelConfig
from baton.kernels.kv_store import kv_store
from baton.kernels.paged_attention import paged_decode, paged_prefill
from baton.kernels.paged_attention_cpu import CpuAttention, Invariance
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
        self._attention = CpuAttention(
            config.num_heads, config.num_kv_heads, config.head_dim, cache.tensor.dtype, invariance
        )

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


class KernelBackend:
    """For CUDA. Rows with one query go through the decode kernel, the others through the prefill
    kernel; the runner puts the former first."""

    def __init__(self, config: ModelConfig, cache: KVCache) -> None:
        self._cache = cache
        self._windows = config.windows
        self._scale = config.head_dim**-0.5

    def plan(self, rows: Sequence[PagedRow]) -> StepAttention:
        cache, scale, windows = self._cache.tensor, self._scale, self._windows
        device = cache.device
        slots = torch.tensor(list(query_slots(rows, self._cache.block_size)), device=device)
        num_decodes = sum(row.num_queries == 1 for row in rows)
        assert all(row.num_queries == 1 for row in rows[:num_decodes]), "decodes come first"
        table, lens = _block_table(rows, self._cache.block_size, device)
        prefills = rows[num_decodes:]
        starts = [0]
        for row in prefills:
            starts.append(starts[-1] + row.num_queries)
        query_starts = torch.tensor(starts, dtype=torch.int32, device=device)
        max_query_len = max((row.num_queries for row in prefills), default=0)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            kv, window = cache[layer], windows[layer]
            kv_store(k, v, kv, slots)
            parts = []
            if num_decodes:
                decode = table[:num_decodes], lens[:num_decodes]
                parts.append(paged_decode(q[:num_decodes], kv, *decode, scale, window))
            if prefills:
                prefill = query_starts, table[num_decodes:], lens[num_decodes:], max_query_len
                parts.append(paged_prefill(q[num_decodes:], kv, *prefill, scale, window))
            return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)

        return attend


def _block_table(
    rows: Sequence[PagedRow], block_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """([num_rows, max_blocks], [num_rows]) int32: block ids, padded with 0, and context lengths."""
    used = [list(row.block_ids[: num_blocks_used(row, block_size)]) for row in rows]
    width = max(map(len, used))
    table = torch.tensor([ids + [0] * (width - len(ids)) for ids in used], dtype=torch.int32)
    lens = torch.tensor([row.context_len for row in rows], dtype=torch.int32)
    return table.to(device, non_blocking=True), lens.to(device, non_blocking=True)
