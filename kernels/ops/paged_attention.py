"""Causal attention over KV in blocks: one query per row (decode), or a run of queries per row
(prefill, or a chunk of it).

Every op has a Triton kernel for CUDA and plain torch as the reference, with one signature. What
runs on CPU is in `paged_attention_cpu`, which plans a step once for all layers.
"""

import torch
from torch import Tensor


def paged_decode(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int = 0,
) -> Tensor:
    """One query per row, the last token of its context.

    Args:
        q: [num_rows, num_heads, head_dim].
        kv_cache: [2, num_blocks, block_size, num_kv_heads, head_dim], contiguous; one layer.
        block_table: [num_rows, max_blocks] int32; token t of row r is in block
            block_table[r, t // block_size]. Entries past the context are not read.
        context_lens: [num_rows] int32, the query's own token included.
        scale: of the scores, 1 / sqrt(head_dim).
        window: a query sees this many tokens, itself included; 0 = all.

    Returns: [num_rows, num_heads, head_dim], dtype of q.
    """
    if q.is_cuda:
        from baton.kernels.paged_decode_triton import paged_decode_triton

        return paged_decode_triton(q, kv_cache, block_table, context_lens, scale, window)
    return paged_decode_torch(q, kv_cache, block_table, context_lens, scale, window)


def paged_prefill(
    q: Tensor,
    kv_cache: Tensor,
    query_starts: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    max_query_len: int,
    scale: float,
    window: int = 0,
) -> Tensor:
    """The last tokens of each row's context as queries; arguments as in `paged_decode`, and:

    Args:
        q: [num_tokens, num_heads, head_dim], the rows' queries one after the other.
        query_starts: [num_rows + 1] int32; row r has queries [query_starts[r], query_starts[r+1]),
            which are the last positions of its context.
        max_query_len: of any row.

    Returns: [num_tokens, num_heads, head_dim], dtype of q.
    """
    if q.is_cuda:
        from baton.kernels.paged_prefill_triton import paged_prefill_triton

        return paged_prefill_triton(
            q, kv_cache, query_starts, block_table, context_lens, max_query_len, scale, window
        )
    return paged_prefill_torch(
        q, kv_cache, query_starts, block_table, context_lens, max_query_len, scale, window
    )


def paged_decode_torch(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int = 0,
) -> Tensor:
    """`paged_decode` in plain torch, float32 inside."""
    starts = torch.arange(q.shape[0] + 1, dtype=torch.int32)
    return paged_prefill_torch(q, kv_cache, starts, block_table, context_lens, 1, scale, window)


def paged_prefill_torch(
    q: Tensor,
    kv_cache: Tensor,
    query_starts: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    max_query_len: int,
    scale: float,
    window: int = 0,
) -> Tensor:
    """`paged_prefill` in plain torch, float32 inside."""
    block_size, num_kv_heads = kv_cache.shape[2:4]
    out = torch.empty_like(q)
    for row, context_len in enumerate(context_lens.tolist()):
        first, last = query_starts[row : row + 2].tolist()
        assert last - first <= max_query_len
        blocks = block_table[row, : -(-context_len // block_size)].long()
        keys, values = kv_cache[:, blocks].flatten(1, 2)[:, :context_len].float()
        # [num_kv_heads, group, queries, head_dim]
        grouped = q[first:last].reshape(last - first, num_kv_heads, -1, q.shape[2])
        queries = grouped.permute(1, 2, 0, 3).float()
        scores = torch.einsum("hgqd,khd->hgqk", queries, keys) * scale
        positions = torch.arange(context_len - (last - first), context_len, device=q.device)
        columns = torch.arange(context_len, device=q.device)
        distance = positions[:, None] - columns[None, :]
        hidden = distance < 0
        if window:
            hidden |= distance >= window
        weights = scores.masked_fill_(hidden, float("-inf")).softmax(dim=-1)
        seen = torch.einsum("hgqk,khd->qhgd", weights, values)
        out[first:last] = seen.flatten(1, 2).to(q.dtype)
    return out
