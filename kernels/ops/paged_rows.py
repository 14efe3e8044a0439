"""What attention and the KV store need to know about a step, in host memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PagedRow:
    """One sequence's share of a step: queries at positions [start, start + num_queries), which see
    the KV of positions [0, start + num_queries) in slots block_ids[i // block_size] * block_size +
    i % block_size."""

    start: int
    num_queries: int
    block_ids: Sequence[int]

    @property
    def context_len(self) -> int:
        return self.start + self.num_queries


def query_slots(rows: Sequence[PagedRow], block_size: int) -> Iterator[int]:
    """The slot of every query of every row, in order: where its own K and V belong."""
    for row in rows:
        position = row.start
        while position < row.context_len:
            index, offset = divmod(position, block_size)
            num_slots = min(block_size - offset, row.context_len - position)
            first = row.block_ids[index] * block_size + offset
            yield from range(first, first + num_slots)
            position += num_slots


def num_blocks_used(row: PagedRow, block_size: int) -> int:
    """Blocks that hold the row's context."""
    return -(-row.context_len // block_size)
