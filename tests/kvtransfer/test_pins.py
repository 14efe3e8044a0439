"""Pins: one table, event by event."""

import itertools

import pytest

from baton.errors import Cause
from baton.kvtransfer.effects import (
    AttachGranted,
    AttachRefused,
    CutAttachment,
    PinPrefix,
    UnpinPrefix,
)
from baton.kvtransfer.lease import PACE_FACTOR
from baton.kvtransfer.pins import MAX_PINS, PinTable
from baton.types import BlockHash, BlockId

HASHES = (BlockHash(b"1" * 32),)
BLOCKS = (BlockId(3), BlockId(4))
STALL_MS = 1_000


@pytest.fixture
def table() -> PinTable:
    return PinTable(itertools.count(100).__next__, STALL_MS)


def opened(table: PinTable, key: int = 1, now_ms: int = 0) -> int:
    assert table.attach(key, HASHES, 0) == [PinPrefix(key, HASHES)]
    (granted,) = table.pinned(key, BLOCKS, 32, now_ms)
    assert isinstance(granted, AttachGranted)
    assert (granted.key, granted.leg, granted.block_ids) == (key, None, BLOCKS)
    assert (granted.num_tokens, granted.ready.num_tokens, granted.first_tokens) == (32, 32, ())
    table.check_integrity()
    return granted.epoch


def test_a_pin_is_for_one_stream(table: PinTable) -> None:
    epoch = opened(table)
    assert table.closed(epoch) == [UnpinPrefix(1)]
    assert table.closed(epoch) == []
    assert len(table) == 0


def test_nobody_waits_any_more_when_the_engine_answers(table: PinTable) -> None:
    table.attach(1, HASHES, 0)
    table.cancel_attach(1)
    assert table.pinned(1, BLOCKS, 32, 0) == [UnpinPrefix(1)]
    assert len(table) == 0


def test_too_many_readers(table: PinTable) -> None:
    for key in range(MAX_PINS):
        opened(table, key)
    (refused,) = table.attach(99, HASHES, 0)
    assert isinstance(refused, AttachRefused)
    assert refused.cause is Cause.OVERLOADED


def test_a_reader_that_takes_nothing_is_cut_once(table: PinTable) -> None:
    epoch = opened(table)
    table.progress(epoch, STALL_MS)
    assert table.tick(2 * STALL_MS) == []
    (cut,) = table.tick(2 * STALL_MS + 1)
    assert isinstance(cut, CutAttachment)
    assert (cut.epoch, cut.cause) == (epoch, Cause.TRANSFER_STALLED)
    assert table.tick(9 * STALL_MS) == []
    # It holds its blocks until it has stopped.
    assert len(table) == 1
    assert table.closed(epoch) == [UnpinPrefix(1)]


def test_a_slow_link_has_as_long_as_its_bytes_take(table: PinTable) -> None:
    table.attach(1, HASHES, 0, pace_ms=3_000)
    table.pinned(1, BLOCKS, 32, 0)
    assert table.tick(STALL_MS + PACE_FACTOR * 3_000) == []
    assert len(table.tick(STALL_MS + PACE_FACTOR * 3_000 + 1)) == 1


def test_all_are_cut_at_the_end(table: PinTable) -> None:
    epochs = [opened(table, key) for key in range(3)]
    cut = table.cut_all(Cause.DRAINING, "the end")
    assert [effect.epoch for effect in cut if isinstance(effect, CutAttachment)] == epochs
    assert table.cut_all(Cause.DRAINING, "the end") == []
