"""Write new keys and values into the pool."""

from torch import Tensor


def kv_store(k: Tensor, v: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
    """Put token i's K and V into slot slots[i] of one layer.

    Args:
        k, v: [num_tokens, num_kv_heads, head_dim], dtype of the cache, last two dimensions
            contiguous.
        kv_cache: [2, num_blocks, block_size, num_kv_heads, head_dim], contiguous; one layer.
        slots: [num_tokens] int64, distinct. On CUDA a token with a negative one is not stored.
    """
    if k.is_cuda:
        from baton.kernels.kv_store_triton import kv_store_triton

        kv_store_triton(k, v, kv_cache, slots)
    else:
        kv_store_torch(k, v, kv_cache, slots)


def kv_store_torch(k: Tensor, v: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
    """`kv_store` in plain torch; on CPU also the one that is used."""
    flat = kv_cache.flatten(1, 2)
    flat[0].index_copy_(0, slots, k)
    flat[1].index_copy_(0, slots, v)
