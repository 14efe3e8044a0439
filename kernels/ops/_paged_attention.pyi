"""paged_attention.c. Built where there is a C compiler at installation; importing it raises
ImportError where the processor has no AVX2 or torch no GNU OpenMP."""

from typing_extensions import Buffer

def attend_rows(
    q: Buffer,
    kv: Buffer,
    out: Buffer,
    sequences: Buffer,
    blocks: Buffer,
    block_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int,
    scale: float,
    num_threads: int,
    /,
) -> None:
    """Causal attention of the last tokens of each sequence, without the GIL. All contiguous.

    Args:
        q: [num_queries, num_heads, head_dim] float32; head_dim is a multiple of 8, up to 256.
        kv: [2 (K, V), num_blocks, block_size, num_kv_heads, head_dim] float32.
        out: like q, written.
        sequences: [num_sequences, 4] int64: position of the first query, number of queries, index
            of the first one in q, index of its first block in `blocks`.
        blocks: int64 block ids, of the sequences' whole contexts.
        num_heads: up to 64 for each KV head.
        window: a query sees this many tokens, itself included; 0 = all.
        scale: of the scores.

    Raises:
        ValueError: something does not fit; nothing was computed.
    """
