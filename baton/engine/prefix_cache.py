"""Which block holds the KV of which prefix.

A block is known by the hash at its end, which stands for everything before it. Its life here:

    unknown ── announce ──► pending ── publish ──► ready ── forget ──► unknown
                            somebody computes it   its KV may be read

A pending block has a writer. Others who need the same prefix share the block and wait for it; when
its writer abandons it, the next one to arrive there claims it and computes it.
"""

from collections.abc import Iterable, Set
from collections.abc import Sequence as Seq

from baton.engine.sequence import Sequence
from baton.types import HASH_TOKENS, BlockHash, BlockId

Hashes = tuple[BlockHash, ...]  # of one block, one per HASH_TOKENS tokens; the last one names it


class PrefixCache:
    """Knows nothing of reference counts: whoever owns blocks calls `forget` before reusing one.

    With `enabled` False nothing is ever announced, published or found.
    """

    def __init__(self, block_size: int, enabled: bool = True) -> None:
        self.block_size = block_size
        self.enabled = enabled
        self.hashes_per_block = block_size // HASH_TOKENS
        self._hashes: dict[BlockId, Hashes] = {}
        self._blocks: dict[BlockHash, BlockId] = {}
        self._writers: dict[BlockId, Sequence | None] = {}  # of pending blocks
        self._num_holders: dict[BlockHash, int] = {}  # ready blocks that contain it
        self._stored: dict[BlockHash, None] = {}  # since take_changes, in order
        self._removed: dict[BlockHash, None] = {}

    def find(self, hashes: Seq[BlockHash], max_blocks: int, *, ready: bool) -> list[BlockId]:
        """The longest known run of leading blocks; `ready` leaves pending ones out."""
        found: list[BlockId] = []
        if not self.enabled:
            return found
        step = self.hashes_per_block
        for index in range(min(max_blocks, len(hashes) // step)):
            block = self._blocks.get(hashes[(index + 1) * step - 1])
            if block is None or (ready and block in self._writers):
                break
            found.append(block)
        return found

    def is_ready(self, block: BlockId) -> bool:
        return block in self._hashes and block not in self._writers

    def is_pending(self, block: BlockId) -> bool:
        return block in self._writers

    def writer(self, block: BlockId) -> Sequence | None:
        """Who computes a pending block; None for one that was abandoned, and for any other."""
        return self._writers.get(block)

    def announce(self, block: BlockId, hashes: Hashes, writer: Sequence) -> None:
        """`writer` will compute `block`. A prefix that is known already keeps its block."""
        if self.enabled and hashes[-1] not in self._blocks:
            self._hashes[block] = hashes
            self._blocks[hashes[-1]] = block
            self._writers[block] = writer

    def claim(self, block: BlockId, writer: Sequence) -> bool:
        """Whether `writer` is the one to compute `block`, which it becomes if nobody is."""
        if block not in self._writers:
            return True
        owner = self._writers[block]
        if owner is None:
            self._writers[block] = writer
        return owner is None or owner is writer

    def abandon(self, blocks: Iterable[BlockId], writer: Sequence) -> None:
        """`writer` will not compute those of `blocks` that it had announced or claimed."""
        for block in blocks:
            if self._writers.get(block) is writer:
                self._writers[block] = None

    def abandon_finished(self, blocks: Iterable[BlockId]) -> None:
        """The same for writers that were over before their transfer had stopped writing."""
        for block in blocks:
            writer = self._writers.get(block)
            if writer is not None and writer.status.is_finished:
                self._writers[block] = None

    def publish(self, block: BlockId, hashes: Hashes) -> None:
        """The KV of `block` is complete. A prefix that is known already keeps its block."""
        if not self.enabled:
            return
        if block in self._writers:
            del self._writers[block]
        elif hashes[-1] in self._blocks:
            return
        else:
            self._hashes[block] = hashes
            self._blocks[hashes[-1]] = block
        for value in hashes:
            self._num_holders[value] = self._num_holders.get(value, 0) + 1
            if self._num_holders[value] == 1:
                _record(value, self._stored, unless_in=self._removed)

    def forget(self, block: BlockId) -> None:
        """The block's content goes away, or must not be used by anybody new."""
        hashes = self._hashes.pop(block, None)
        if hashes is None:
            return
        del self._blocks[hashes[-1]]
        if block in self._writers:
            del self._writers[block]
            return
        for value in hashes:
            self._num_holders[value] -= 1
            if self._num_holders[value] == 0:
                del self._num_holders[value]
                _record(value, self._removed, unless_in=self._stored)

    def take_changes(self) -> tuple[Hashes, Hashes]:
        """Hashes stored and removed since the last call; one that came and went is in neither."""
        if not self._stored and not self._removed:
            return (), ()
        changes = tuple(self._stored), tuple(self._removed)
        self._stored.clear()
        self._removed.clear()
        return changes

    def ready_hashes(self) -> Hashes:
        """Everything that is stored now: the sum of all changes so far."""
        return tuple(self._num_holders)

    def known_blocks(self) -> Set[BlockId]:
        """Those that are ready or pending."""
        return self._hashes.keys()

    def pending_blocks(self) -> Set[BlockId]:
        return self._writers.keys()

    def check_integrity(self) -> None:
        """Raises AssertionError when the maps disagree."""
        assert len(self._blocks) == len(self._hashes), "names and blocks"
        assert self._writers.keys() <= self._hashes.keys(), "a pending block without a name"
        holders: dict[BlockHash, int] = {}
        for block, hashes in self._hashes.items():
            assert self._blocks.get(hashes[-1]) == block, "names and blocks"
            assert len(hashes) == self.hashes_per_block
            for value in hashes if block not in self._writers else ():
                holders[value] = holders.get(value, 0) + 1
        assert holders == self._num_holders, "hash counts"


def _record(
    value: BlockHash, changes: dict[BlockHash, None], *, unless_in: dict[BlockHash, None]
) -> None:
    """Two opposite changes between two reports are none."""
    if value in unless_in:
        del unless_in[value]
    else:
        changes[value] = None
