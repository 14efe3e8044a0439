"""Who owns which KV block.

Every block is in exactly one of these places:

    unused      nobody owns it and its content is of no use
    evictable   nobody owns it; its KV is ready for the prefix cache or for a retained leg (LRU)
    owned       reference count > 0: sequences, quarantines, and pins

A quarantine owns the blocks of a leg that is over while a transfer may still read or write them; a
pin owns blocks of the prefix cache while another worker reads them.
Unused and evictable blocks count as free. Unused blocks are handed out in runs of consecutive ids
where there are any, and a little apart from what is in use, so that a sequence's blocks tend to lie
side by side: attention on CPU then reads them through one view.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from itertools import compress

from baton.engine.prefix_cache import PrefixCache
from baton.types import BlockHash, BlockId, LegId

_GAP = 8  # blocks left free for a neighbour to grow into, while there are enough


class BlockPool:
    """Reference counts, free blocks, quarantine and retained legs. Owns `cache`."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool) -> None:
        self.num_blocks = num_blocks
        self.cache = PrefixCache(block_size, enable_prefix_caching)
        self._num_refs = [0] * num_blocks
        self._unused = bytearray(b"\1") * num_blocks  # 1 = unused
        self._num_unused = num_blocks
        self._evictable: OrderedDict[BlockId, None] = OrderedDict()  # next to go first
        self._quarantine: dict[LegId, list[BlockId]] = {}
        self._pins: dict[int, list[BlockId]] = {}
        self._retained: dict[LegId, tuple[BlockId, ...]] = {}
        self._retainers: dict[BlockId, set[LegId]] = {}
        self._evicted_legs: list[LegId] = []  # since take_evicted_legs

    @property
    def num_free(self) -> int:
        return self._num_unused + len(self._evictable)

    @property
    def num_quarantined(self) -> int:
        return len({block for blocks in self._quarantine.values() for block in blocks})

    def is_shared(self, block: BlockId) -> bool:
        return self._num_refs[block] > 1

    # ── owning ───────────────────────────────────────────────────────────────────────────────────

    def allocate(self, num_blocks: int, after: BlockId | None = None) -> list[BlockId]:
        """Own `num_blocks` blocks with undefined content, preferably next to `after`; evicts the
        least recently used. The caller has checked `num_free`."""
        assert num_blocks <= self.num_free, "allocate without checking num_free"
        while self._num_unused < num_blocks:
            self._evict()
        blocks = self._take_unused(num_blocks, after)
        for block in blocks:
            self._num_refs[block] = 1
        return blocks

    def acquire(self, blocks: Iterable[BlockId]) -> None:
        """One more reference on each: blocks that somebody owns, or that are evictable."""
        for block in blocks:
            if self._num_refs[block] == 0:
                del self._evictable[block]
            self._num_refs[block] += 1

    def release(self, blocks: Seq[BlockId]) -> None:
        """One reference less on each. Of those that become free the last is evicted first."""
        for block in reversed(blocks):
            self._num_refs[block] -= 1
            assert self._num_refs[block] >= 0, "released twice"
            if self._num_refs[block] == 0:
                self._free(block)

    def _free(self, block: BlockId) -> None:
        if self.cache.is_ready(block) or block in self._retainers:
            self._evictable[block] = None
        else:
            self._scrap(block)

    def _scrap(self, block: BlockId) -> None:
        self.cache.forget(block)
        self._unused[block] = 1
        self._num_unused += 1

    def _evict(self) -> None:
        block, _ = self._evictable.popitem(last=False)
        self._scrap(block)
        for leg in self._retainers.pop(block, ()):
            self._unretain(leg)
            self._evicted_legs.append(leg)

    def _take_unused(self, num_blocks: int, after: BlockId | None) -> list[BlockId]:
        taken: list[BlockId] = []
        at = self.num_blocks if after is None else after + 1
        while len(taken) < num_blocks and at < self.num_blocks and self._unused[at]:
            self._take_run(taken, at, 1)
            at += 1
        size, gap = num_blocks - len(taken), _GAP
        while len(taken) < num_blocks:
            size = min(size, num_blocks - len(taken))
            at = self._unused.find(b"\1" * (size + gap))
            if at >= 0:
                self._take_run(taken, at + (gap if at else 0), size)
            elif gap:
                gap = 0
            else:
                size = (size + 1) // 2
        return taken

    def _take_run(self, taken: list[BlockId], start: int, size: int) -> None:
        self._unused[start : start + size] = bytes(size)
        self._num_unused -= size
        taken.extend(BlockId(block) for block in range(start, start + size))

    # ── quarantine ───────────────────────────────────────────────────────────────────────────────

    def quarantine(self, leg: LegId, blocks: Seq[BlockId]) -> None:
        """Take over one reference on each, until `quiesce`."""
        self._quarantine.setdefault(leg, []).extend(blocks)

    def quiesce(self, leg: LegId) -> None:
        """Nobody reads or writes the leg's blocks any more. Unknown legs are ignored."""
        blocks = self._quarantine.pop(leg, [])
        self.cache.abandon_finished(blocks)
        self.release(blocks)

    # ── pinned prefixes ──────────────────────────────────────────────────────────────────────────

    def pin_prefix(self, pin: int, hashes: Seq[BlockHash]) -> list[BlockId]:
        """One reference on each block of the longest ready prefix, until `unpin_prefix`."""
        assert pin not in self._pins
        self._pins[pin] = self.cache.find(hashes, len(hashes), ready=True)
        self.acquire(self._pins[pin])
        return self._pins[pin]

    def unpin_prefix(self, pin: int) -> None:
        self.release(self._pins.pop(pin))

    # ── retained legs ────────────────────────────────────────────────────────────────────────────

    def retain(self, leg: LegId, blocks: Seq[BlockId]) -> None:
        """Give up one reference on each, but keep their content while nobody needs the room."""
        assert leg not in self._retained
        self._retained[leg] = tuple(blocks)
        for block in blocks:
            self._retainers.setdefault(block, set()).add(leg)
        self.release(blocks)

    def pin(self, leg: LegId) -> list[BlockId]:
        """Undo `retain`: own the blocks again."""
        blocks = self._retained[leg]
        self.acquire(blocks)
        self._unretain(leg)
        return list(blocks)

    def drop_retained(self, leg: LegId) -> None:
        self._unretain(leg)

    def take_evicted_legs(self) -> list[LegId]:
        """Retained legs that lost a block since the last call."""
        legs, self._evicted_legs = self._evicted_legs, []
        return legs

    def _unretain(self, leg: LegId) -> None:
        for block in self._retained.pop(leg):
            retainers = self._retainers.get(block)
            if retainers is None:
                continue  # the block whose eviction brought us here
            retainers.discard(leg)
            if retainers:
                continue
            del self._retainers[block]
            if block in self._evictable and not self.cache.is_ready(block):
                del self._evictable[block]
                self._scrap(block)

    # ── checks ───────────────────────────────────────────────────────────────────────────────────

    def check_integrity(self, num_owners: Mapping[BlockId, int]) -> None:
        """`num_owners`: references that sequences hold, per block.

        Raises:
            AssertionError: a leak, a double use, or maps that disagree.
        """
        expected = dict(num_owners)
        for blocks in (*self._quarantine.values(), *self._pins.values()):
            for block in blocks:
                expected[block] = expected.get(block, 0) + 1
        owned = [0] * self.num_blocks
        for block, refs in expected.items():
            owned[block] = refs
        if owned != self._num_refs:
            pairs = enumerate(zip(self._num_refs, owned, strict=True))
            wrong = [
                f"block {i}: {refs} references, {held}" for i, (refs, held) in pairs if refs != held
            ]
            raise AssertionError(", ".join(wrong))
        for block in self._evictable:
            useful = self.cache.is_ready(block) or block in self._retainers
            assert useful, f"block {block} is kept for nothing"
            assert block not in expected, f"block {block} is owned and evictable"
        unused = set(compress(range(self.num_blocks), self._unused))
        for what, elsewhere in (
            ("owned", expected.keys()),
            ("evictable", self._evictable.keys()),
            ("useful", self.cache.known_blocks()),
            ("useful", self._retainers.keys()),
        ):
            assert unused.isdisjoint(elsewhere), f"blocks are unused and {what}"
        # Nothing is in two places, so that this leaves none that is nowhere.
        num_placed = len(unused) + len(expected) + len(self._evictable)
        assert num_placed == self.num_blocks, "a block is nowhere"
        assert self.cache.pending_blocks() <= expected.keys(), "a block is pending, and unowned"
        assert self._num_unused == sum(self._unused)
        retainers: dict[BlockId, set[LegId]] = {}
        for leg, kept in self._retained.items():
            for block in kept:
                retainers.setdefault(block, set()).add(leg)
        assert retainers == self._retainers, "retained legs and their blocks"
        self.cache.check_integrity()
