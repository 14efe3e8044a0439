"""One mapping from ranks to heads: every head of every rank arrives exactly once."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.heads import head_sources, heads_of, tp_conflict

TP_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
HEADS = (1, 2, 3, 4, 6, 8, 12, 32)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int]:
    num_kv_heads = draw(st.sampled_from(HEADS))
    sizes = [tp for tp in TP_SIZES if tp_conflict(num_kv_heads, tp) is None]
    return num_kv_heads, draw(st.sampled_from(sizes)), draw(st.sampled_from(sizes))


@given(shapes())
def test_every_head_arrives_exactly_once_at_every_rank(shape: tuple[int, int, int]) -> None:
    num_kv_heads, producer_tp, consumer_tp = shape
    for rank in range(consumer_tp):
        sources = head_sources(num_kv_heads, producer_tp, consumer_tp, rank)
        arrived = [h for source in sources for h in range(source.head_start, source.head_stop)]
        assert arrived == list(heads_of(num_kv_heads, consumer_tp, rank))
        for source in sources:
            held = heads_of(num_kv_heads, producer_tp, source.rank)
            assert held.start <= source.head_start < source.head_stop <= held.stop
        assert len({source.rank for source in sources}) == len(sources)


@given(shapes())
def test_replicas_share_the_work(shape: tuple[int, int, int]) -> None:
    num_kv_heads, producer_tp, consumer_tp = shape
    sent: Counter[int] = Counter()
    for rank in range(consumer_tp):
        for source in head_sources(num_kv_heads, producer_tp, consumer_tp, rank):
            sent[source.rank] += source.head_stop - source.head_start
    assert sum(sent.values()) == max(num_kv_heads, consumer_tp)
    num_replicas = max(1, producer_tp // num_kv_heads)
    takers_of_a_head = max(1, consumer_tp // num_kv_heads)
    heads_of_a_rank = max(1, num_kv_heads // producer_tp)
    assert max(sent.values()) <= -(-takers_of_a_head // num_replicas) * heads_of_a_rank


@given(shapes())
def test_all_heads_are_held(shape: tuple[int, int, int]) -> None:
    num_kv_heads, tp_size, _ = shape
    held = [h for rank in range(tp_size) for h in heads_of(num_kv_heads, tp_size, rank)]
    assert sorted(set(held)) == list(range(num_kv_heads))
    assert len(held) == max(num_kv_heads, tp_size)


def test_known_shapes() -> None:
    one = [(s.rank, s.head_start, s.head_stop) for s in head_sources(8, 4, 2, 1)]
    assert one == [(2, 4, 6), (3, 6, 8)]
    assert [(s.rank, s.head_start, s.head_stop) for s in head_sources(8, 2, 8, 5)] == [(1, 5, 6)]
    replicated = [head_sources(2, 8, 4, rank)[0].rank for rank in range(4)]
    assert replicated == [0, 1, 6, 7], "P has more ranks than there are heads"


@pytest.mark.parametrize(("num_kv_heads", "tp_size"), [(6, 4), (4, 6), (4, 0)])
def test_what_does_not_divide_is_refused(num_kv_heads: int, tp_size: int) -> None:
    assert tp_conflict(num_kv_heads, tp_size) is not None
    with pytest.raises(ValueError, match="ranks"):
        heads_of(num_kv_heads, tp_size, 0)
    with pytest.raises(ValueError, match="ranks"):
        head_sources(num_kv_heads, tp_size, 1, 0)
