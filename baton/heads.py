"""Which KV heads a rank of a tensor-parallel worker holds, and from which ranks a rank of another
worker gets its own: the one place where ranks are turned into heads.

Heads are numbered over the whole model. With no more ranks than heads, each rank holds an equal run
of them; with more, each head is held by equally many consecutive ranks (its *replicas*).
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HeadSource:
    """Heads [head_start, head_stop) come from this rank of the producer."""

    rank: int
    head_start: int
    head_stop: int


def tp_conflict(num_kv_heads: int, tp_size: int) -> str | None:
    """Why so many heads cannot be dealt out to so many ranks, or None."""
    if tp_size < 1 or (num_kv_heads % tp_size and tp_size % num_kv_heads):
        return f"{num_kv_heads} KV heads on {tp_size} ranks"
    return None


def heads_of(num_kv_heads: int, tp_size: int, rank: int) -> range:
    """The heads that this rank holds.

    Raises:
        ValueError: there is no such rank, or the heads do not divide.
    """
    conflict = tp_conflict(num_kv_heads, tp_size)
    if conflict is not None or not 0 <= rank < tp_size:
        raise ValueError(conflict or f"rank {rank} of {tp_size}")
    if tp_size <= num_kv_heads:
        size = num_kv_heads // tp_size
        return range(rank * size, (rank + 1) * size)
    head = rank // (tp_size // num_kv_heads)
    return range(head, head + 1)


def head_sources(
    num_kv_heads: int, producer_tp: int, consumer_tp: int, consumer_rank: int
) -> tuple[HeadSource, ...]:
    """Where a rank of the consumer gets each of its heads, once, in ascending order.

    Ranks of the consumer that hold the same head take it from different replicas where the producer
    has several, so that no rank of the producer sends more than it must.

    Raises:
        ValueError: as `heads_of`, for either side.
    """
    wanted = heads_of(num_kv_heads, consumer_tp, consumer_rank)
    heads_of(num_kv_heads, producer_tp, 0)
    num_replicas = max(1, producer_tp // num_kv_heads)
    per_rank = max(1, num_kv_heads // producer_tp)
    sources: list[HeadSource] = []
    for start in range(wanted.start - wanted.start % per_rank, wanted.stop, per_rank):
        rank = start // per_rank * num_replicas + consumer_rank % num_replicas
        held = heads_of(num_kv_heads, producer_tp, rank)
        sources.append(HeadSource(rank, max(held.start, wanted.start), min(held.stop, wanted.stop)))
    return tuple(sources)
