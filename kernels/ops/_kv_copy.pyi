"""kv_copy.c. Built where there is a C compiler at installation; kv_pack.py does without it."""

from typing_extensions import Buffer

def copy_runs(
    pool: Buffer,
    wire: Buffer,
    runs: Buffer,
    pool_layers: int,
    layer_start: int,
    num_layers: int,
    slot_bytes: int,
    item_start: int,
    item_bytes: int,
    to_wire: bool,
    /,
) -> None:
    """Copy some layers of runs of slots, without the GIL.

    Args:
        pool: [pool_layers, 2 (K, V), num_slots, slot_bytes] uint8, contiguous.
        wire: [num_layers, num_tokens, 2 (K, V), item_bytes] uint8, contiguous.
        runs: [num_runs, 3] int64: first slot, first token of the payload, number of tokens.
        layer_start: the pool's layer that is the payload's first.
        item_start: of each slot's bytes, [item_start, item_start + item_bytes) are copied.
        to_wire: from pool to wire, else from wire to pool.

    Raises:
        ValueError: something does not fit, or what is written to is read-only; nothing was copied.
    """
