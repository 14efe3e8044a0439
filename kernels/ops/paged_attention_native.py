"""Paged attention on CPU in float32 by paged_attention.c, which reads the pool where it lies.

A query's bits depend on its own sequence and nothing else: batch-invariant as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.kernels.paged_rows import PagedRow, num_blocks_used

try:
    from baton.kernels import _paged_attention
except ImportError:
    _paged_attention = None  # type: ignore[assignment]

_MAX_GROUP, _MAX_HEAD_DIM = 64, 256

Ints = npt.NDArray[np.int64]


def is_native(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether `NativeAttention` was built and computes these shapes."""
    return (
        _paged_attention is not None
        and dtype is torch.float32
        and num_heads <= _MAX_GROUP * num_kv_heads
        and head_dim % 8 == 0
        and head_dim <= _MAX_HEAD_DIM
    )


@dataclass(frozen=True, slots=True)
class NativePlan:
    sequences: Ints  # see _paged_attention.pyi
    blocks: Ints
    window: int


class NativeAttention:
    """See `CpuAttention`."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        self._num_heads = num_heads
        self._num_kv_heads = num_kv_heads
        self._head_dim = head_dim

    def plan(self, rows: Sequence[PagedRow], kv_cache: Tensor, window: int) -> NativePlan:
        """For every layer with this window."""
        sequences, blocks, num_queries = [], list[int](), 0
        for row in rows:
            sequences.append((row.start, row.num_queries, num_queries, len(blocks)))
            blocks += row.block_ids[: num_blocks_used(row, kv_cache.shape[2])]
            num_queries += row.num_queries
        return NativePlan(np.array(sequences, np.int64), np.array(blocks, np.int64), window)

    def run(self, q: Tensor, kv_cache: Tensor, plan: NativePlan) -> Tensor:
        """One layer.

        Args:
            q: [num_tokens, num_heads, head_dim].
            kv_cache: as in `paged_decode`.

        Returns: [num_tokens, num_heads, head_dim].
        """
        out = q.new_empty(q.shape)
        _paged_attention.attend_rows(
            q.contiguous().numpy().data,
            kv_cache.numpy().data,
            out.numpy().data,
            plan.sequences.data,
            plan.blocks.data,
            kv_cache.shape[2],
            self._num_heads,
            self._num_kv_heads,
            self._head_dim,
            plan.window,
            self._head_dim**-0.5,
            torch.get_num_threads(),
        )
        return out
