import pytest

from baton.engine.prefix_cache import PrefixCache
from baton.engine.sequence import Leg, LegKind, Sequence
from baton.hashing import prefix_hashes, root_hash
from baton.types import BlockHash, BlockId, LegId, Request, SamplingParams
from tests.engine.driver import prompt

ROOT = root_hash(b"f", b"s")


def sequence(seq_id: int) -> Sequence:
    leg = LegId(str(seq_id), 0)
    request = Request(leg.request_id, (1,), SamplingParams(seed=0))
    return Sequence(seq_id, Leg(leg, LegKind.LOCAL, request, 0, 0.0, 0, ROOT, {0}), 0)


def hashes(num_tokens: int, seed: int = 0) -> list[BlockHash]:
    return prefix_hashes(ROOT, prompt(num_tokens, seed))


def block(index: int) -> BlockId:
    return BlockId(index)


@pytest.fixture
def cache() -> PrefixCache:
    return PrefixCache(16)


def test_the_longest_known_run_is_found(cache: PrefixCache) -> None:
    chain = hashes(64)
    for index in (0, 1, 3):
        cache.publish(block(10 + index), (chain[index],))
    assert cache.find(chain, 4, ready=True) == [10, 11]
    assert cache.find(chain, 1, ready=True) == [10]
    assert cache.find(hashes(64, seed=1), 4, ready=True) == []


def test_pending_blocks_are_found_by_those_who_can_wait(cache: PrefixCache) -> None:
    chain = hashes(32)
    cache.publish(block(0), (chain[0],))
    cache.announce(block(1), (chain[1],), sequence(1))
    assert cache.find(chain, 2, ready=True) == [0]
    assert cache.find(chain, 2, ready=False) == [0, 1]
    cache.publish(block(1), (chain[1],))
    assert cache.find(chain, 2, ready=True) == [0, 1]


def test_the_first_block_of_a_prefix_stays_its_block(cache: PrefixCache) -> None:
    chain = hashes(16)
    cache.announce(block(0), (chain[0],), sequence(1))
    cache.announce(block(1), (chain[0],), sequence(2))
    cache.publish(block(2), (chain[0],))
    assert cache.find(chain, 1, ready=False) == [0]
    assert not cache.is_pending(block(1))
    assert not cache.is_ready(block(2))
    cache.check_integrity()


def test_an_abandoned_block_is_claimed_by_the_next_one(cache: PrefixCache) -> None:
    first, second, third = (sequence(i) for i in range(3))
    cache.announce(block(0), (hashes(16)[0],), first)
    assert not cache.claim(block(0), second)
    cache.abandon([block(0)], second)
    assert cache.writer(block(0)) is first
    cache.abandon([block(0)], first)
    assert cache.writer(block(0)) is None
    assert cache.claim(block(0), second)
    assert not cache.claim(block(0), third)
    assert cache.claim(block(5), third), "a block that nobody shares is anybody's own"


def test_changes_in_chain_order_and_only_what_lasts(cache: PrefixCache) -> None:
    chain = hashes(48)
    for index in range(3):
        cache.publish(block(index), (chain[index],))
    assert cache.take_changes() == (tuple(chain), ())
    cache.forget(block(2))
    cache.forget(block(1))
    cache.publish(block(7), (chain[1],))
    assert cache.take_changes() == ((), (chain[2],))
    assert cache.take_changes() == ((), ())
    assert set(cache.ready_hashes()) == set(chain[:2])


def test_a_pending_block_is_no_change(cache: PrefixCache) -> None:
    cache.announce(block(0), (hashes(16)[0],), sequence(1))
    assert cache.take_changes() == ((), ())
    cache.forget(block(0))
    assert cache.take_changes() == ((), ())


def test_a_hash_inside_two_blocks_is_removed_with_the_second() -> None:
    """Blocks of 32 tokens that share their first 16."""
    cache = PrefixCache(32)
    a = prompt(32)
    chain, other = prefix_hashes(ROOT, a), prefix_hashes(ROOT, (*a[:16], *a[:16]))
    cache.publish(block(0), tuple(chain))
    cache.publish(block(1), tuple(other))
    assert cache.take_changes() == ((*chain, other[1]), ())
    cache.forget(block(0))
    assert cache.take_changes() == ((), (chain[1],))
    cache.forget(block(1))
    assert cache.take_changes() == ((), (other[0], other[1]))
    assert cache.ready_hashes() == ()


def test_nothing_is_shared_when_it_is_off() -> None:
    cache = PrefixCache(16, enabled=False)
    chain = hashes(16)
    cache.announce(block(0), (chain[0],), sequence(1))
    cache.publish(block(0), (chain[0],))
    assert cache.find(chain, 1, ready=False) == []
    assert cache.take_changes() == ((), ())
