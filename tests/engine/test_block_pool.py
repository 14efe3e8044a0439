from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baton.engine.block_pool import BlockPool
from baton.types import BlockHash, BlockId, LegId
from tests.engine.driver import leg_id

A, B = leg_id("a"), leg_id("b")


def name(index: int) -> tuple[BlockHash]:
    return (BlockHash(index.to_bytes(32, "little")),)


def pool_of(num_blocks: int) -> BlockPool:
    return BlockPool(num_blocks, 16, enable_prefix_caching=True)


def publish(pool: BlockPool, blocks: list[BlockId], first: int = 0) -> None:
    for index, block in enumerate(blocks, first):
        pool.cache.publish(block, name(index))


def test_blocks_lie_side_by_side_with_room_to_grow() -> None:
    pool = pool_of(64)
    first, second = pool.allocate(4), pool.allocate(4)
    assert first == [0, 1, 2, 3]
    assert second == list(range(second[0], second[0] + 4))
    for _ in range(8):
        first += pool.allocate(1, first[-1])
    assert first == list(range(12)), "grows into the gap"


def test_gaps_are_used_when_there_is_nothing_else() -> None:
    pool = pool_of(20)
    blocks = [pool.allocate(3) for _ in range(6)]
    assert sorted(b for run in blocks for b in run) == sorted({b for run in blocks for b in run})
    assert pool.num_free == 2
    assert len(pool.allocate(2)) == 2
    assert pool.num_free == 0


def test_fragments_add_up() -> None:
    pool = pool_of(8)
    pool.allocate(8)
    pool.release([BlockId(i) for i in (0, 2, 3, 6)])
    assert sorted(pool.allocate(4)) == [0, 2, 3, 6]


def test_the_least_recently_used_goes_first_and_of_a_sequence_its_end() -> None:
    pool = pool_of(4)
    old, new = pool.allocate(2), pool.allocate(2)
    publish(pool, old)
    publish(pool, new, 2)
    pool.release(old)
    pool.release(new)
    assert pool.num_free == 4
    assert pool.allocate(1) == [old[1]]
    assert pool.allocate(1) == [old[0]]
    assert pool.allocate(1) == [new[1]]
    assert pool.cache.find([name(2)[0]], 1, ready=True) == [new[0]]


def test_use_makes_recent() -> None:
    pool = pool_of(2)
    first, second = pool.allocate(1), pool.allocate(1)
    publish(pool, first + second)
    pool.release(first)
    pool.release(second)
    pool.acquire(first)
    pool.release(first)
    assert pool.allocate(1) == second


def test_content_that_is_of_no_use_goes_before_content_that_is() -> None:
    pool = pool_of(3)
    useful, useless = pool.allocate(2), pool.allocate(1)
    publish(pool, useful)
    pool.release(useful)
    pool.release(useless)
    assert pool.allocate(1) == useless


def test_a_shared_block_is_free_when_the_last_owner_lets_go() -> None:
    pool = pool_of(1)
    blocks = pool.allocate(1)
    pool.acquire(blocks)
    pool.release(blocks)
    assert pool.num_free == 0
    pool.release(blocks)
    assert pool.num_free == 1
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(blocks)


def test_quarantined_blocks_are_not_reused_before_they_are_quiet() -> None:
    pool = pool_of(4)
    pool.quarantine(A, pool.allocate(2))
    pool.quarantine(B, pool.allocate(1))
    assert (pool.num_free, pool.num_quarantined) == (1, 3)
    pool.quiesce(leg_id("unknown"))
    pool.quiesce(A)
    assert (pool.num_free, pool.num_quarantined) == (3, 1)
    pool.quiesce(A)
    pool.quiesce(B)
    assert (pool.num_free, pool.num_quarantined) == (4, 0)


def test_a_retained_leg_is_kept_while_there_is_room_and_comes_back_whole() -> None:
    pool = BlockPool(4, 16, enable_prefix_caching=False)
    blocks = pool.allocate(3)
    pool.retain(A, blocks)
    assert pool.num_free == 4
    other = pool.allocate(1)
    assert pool.pin(A) == blocks
    assert pool.num_free == 0
    pool.check_integrity(Counter(blocks + other))
    assert pool.take_evicted_legs() == []


def test_the_oldest_retained_leg_is_evicted_first_and_as_a_whole() -> None:
    pool = BlockPool(6, 16, enable_prefix_caching=False)
    old, new = pool.allocate(3), pool.allocate(3)
    pool.retain(A, old)
    pool.retain(B, new)
    taken = pool.allocate(1)
    assert taken[0] in old
    assert pool.take_evicted_legs() == [A]
    assert set(pool.allocate(2)) | set(taken) == set(old), "the rest of it is of no use"
    assert pool.take_evicted_legs() == []
    pool.allocate(1)
    assert pool.take_evicted_legs() == [B]


def test_legs_that_share_a_block_go_with_it() -> None:
    pool = BlockPool(3, 16, enable_prefix_caching=False)
    shared, own = pool.allocate(1), pool.allocate(1)
    pool.acquire(shared)
    pool.retain(A, shared + own)
    pool.retain(B, shared)
    pool.drop_retained(B)
    assert pool.pin(A) == shared + own
    pool.acquire(shared)
    pool.retain(B, shared)
    pool.retain(A, shared + own)
    pool.allocate(3)
    assert sorted(pool.take_evicted_legs()) == [A, B]


def _count_twice(pool: BlockPool, _: BlockId) -> None:
    pool._num_refs[0] += 1


def _lose_a_free_block(pool: BlockPool, free: BlockId) -> None:
    pool._unused[free] = 0
    pool._num_unused -= 1


def _free_an_owned_one(pool: BlockPool, _: BlockId) -> None:
    pool._unused[0] = 1
    pool._num_unused += 1


def _forget_what_is_evictable(pool: BlockPool, _: BlockId) -> None:
    pool.cache.forget(next(iter(pool._evictable)))


def _free_what_is_evictable(pool: BlockPool, _: BlockId) -> None:
    pool._unused[next(iter(pool._evictable))] = 1
    pool._num_unused += 1


def _evict_what_is_owned(pool: BlockPool, _: BlockId) -> None:
    publish(pool, [BlockId(0)], 7)
    pool._evictable[BlockId(0)] = None


def _publish_a_free_one(pool: BlockPool, free: BlockId) -> None:
    publish(pool, [free], 7)


def _retain_a_free_one(pool: BlockPool, free: BlockId) -> None:
    pool._retained[B] = (free,)
    pool._retainers[free] = {B}


def _announce_what_nobody_owns(pool: BlockPool, _: BlockId) -> None:
    pool.cache._writers[next(iter(pool._evictable))] = None


def _forget_a_retainer(pool: BlockPool, _: BlockId) -> None:
    pool._retained[B] = (BlockId(0),)


def _forget_a_quarantine(pool: BlockPool, _: BlockId) -> None:
    pool._quarantine.clear()


@pytest.mark.parametrize(
    "breakage",
    [
        None,
        _count_twice,
        _lose_a_free_block,
        _free_an_owned_one,
        _forget_what_is_evictable,
        _free_what_is_evictable,
        _evict_what_is_owned,
        _publish_a_free_one,
        _retain_a_free_one,
        _announce_what_nobody_owns,
        _forget_a_retainer,
        _forget_a_quarantine,
    ],
)
def test_the_check_of_integrity_sees_every_breakage(
    breakage: Callable[[BlockPool, BlockId], None] | None,
) -> None:
    pool = pool_of(16)
    owned, cached, kept, written = (pool.allocate(2) for _ in range(4))
    publish(pool, cached)
    pool.release(cached)
    pool.retain(A, kept)
    pool.quarantine(B, written)
    assert owned[0] == 0
    owners = Counter(owned)
    pool.check_integrity(owners)
    if breakage is not None:
        free = BlockId(next(i for i in range(16) if pool._unused[i]))
        breakage(pool, free)
        with pytest.raises(AssertionError):
            pool.check_integrity(owners)


class PoolMachine(RuleBasedStateMachine):
    """Against a model that stamps each block's content and asks for it back."""

    @initialize(num_blocks=st.integers(1, 24), caching=st.booleans())
    def start(self, num_blocks: int, caching: bool) -> None:
        self.pool = BlockPool(num_blocks, 16, caching)
        self.num_blocks = num_blocks
        self.owners: list[list[BlockId]] = []
        self.quarantined: dict[LegId, list[BlockId]] = {}
        self.retained: dict[LegId, list[tuple[BlockId, int]]] = {}
        self.stamps = dict.fromkeys(map(BlockId, range(num_blocks)), 0)
        self.named: dict[int, int] = {}  # name → stamp
        self.clock = 0
        self.is_pressed = False

    def busy(self) -> set[BlockId]:
        return {b for blocks in [*self.owners, *self.quarantined.values()] for b in blocks}

    def new_leg(self) -> LegId:
        self.clock += 1
        return LegId("leg", self.clock)

    @rule(count=st.integers(0, 8), next_to=st.integers(0, 23))
    def allocate(self, count: int, next_to: int) -> None:
        count = min(count, self.pool.num_free)
        busy, unused = self.busy(), bytes(self.pool._unused)
        after = BlockId(next_to) if next_to < self.num_blocks else None
        blocks = self.pool.allocate(count, after)
        self.is_pressed = count > sum(unused)
        assert len(set(blocks)) == count
        assert not set(blocks) & busy
        if after is not None and count and next_to + 1 < self.num_blocks and unused[next_to + 1]:
            assert blocks[0] == next_to + 1
        for block in blocks:
            self.clock += 1
            self.stamps[block] = self.clock
        self.owners.append(blocks)

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), key=st.integers(0, 9))
    def publish(self, data: st.DataObject, key: int) -> None:
        blocks = data.draw(st.sampled_from(self.owners))
        if blocks and not self.pool.cache.is_ready(blocks[0]):
            known = self.pool.cache.find(name(key), 1, ready=False)
            self.pool.cache.publish(blocks[0], name(key))
            if self.pool.cache.enabled and not known:
                self.named[key] = self.stamps[blocks[0]]

    @rule(key=st.integers(0, 9))
    def hit(self, key: int) -> None:
        found = self.pool.cache.find(name(key), 1, ready=True)
        for block in found:
            assert self.stamps[block] == self.named[key], "the cache led to someone else's KV"
        self.pool.acquire(found)
        self.owners.append(found)

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), how=st.sampled_from(["release", "quarantine", "retain"]))
    def let_go(self, data: st.DataObject, how: str) -> None:
        blocks = self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1)))
        if how == "release":
            self.pool.release(blocks)
        elif how == "quarantine":
            leg = self.new_leg()
            self.pool.quarantine(leg, blocks)
            self.quarantined[leg] = blocks
        else:
            leg = self.new_leg()
            self.pool.retain(leg, blocks)
            self.retained[leg] = [(block, self.stamps[block]) for block in blocks]

    @precondition(lambda self: self.quarantined)
    @rule(data=st.data())
    def quiesce(self, data: st.DataObject) -> None:
        leg = data.draw(st.sampled_from(list(self.quarantined)))
        del self.quarantined[leg]
        self.pool.quiesce(leg)

    @precondition(lambda self: self.retained)
    @rule(data=st.data(), pin=st.booleans())
    def unretain(self, data: st.DataObject, pin: bool) -> None:
        leg = data.draw(st.sampled_from(list(self.retained)))
        kept = self.retained.pop(leg)
        if pin:
            blocks = self.pool.pin(leg)
            assert [(block, self.stamps[block]) for block in blocks] == kept
            self.owners.append(blocks)
        else:
            self.pool.drop_retained(leg)

    @invariant()
    def evictions_are_told(self) -> None:
        if not hasattr(self, "pool"):
            return
        for leg in self.pool.take_evicted_legs():
            assert self.is_pressed, "evicted without need"
            del self.retained[leg]
        self.is_pressed = False
        for kept in self.retained.values():
            assert all(self.stamps[block] == stamp for block, stamp in kept)

    @invariant()
    def every_block_has_one_place(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check_integrity(Counter(b for blocks in self.owners for b in blocks))
            assert self.pool.num_free == self.num_blocks - len(self.busy())

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for blocks in self.owners:
                self.pool.release(blocks)
            for leg in self.quarantined:
                self.pool.quiesce(leg)
            assert self.pool.num_free == self.num_blocks


PoolMachine.TestCase.settings = settings(max_examples=100, deadline=None)
TestBlockPoolMachine = PoolMachine.TestCase
