"""Pins: prefixes in this worker's cache that others read by hash.

A pure state machine like `baton.kvtransfer.lease`, drawn in docs/kv-exchange.md.

    PINNING   the engine looks the chain up and pins what it has of it
    OPEN      one reader; cut = asked to stop, still reading until it says so

A pin is for one stream: it ends when its reader has stopped, and nothing waits for it. What is not
ready when the engine looks is not part of it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from baton.errors import Cause
from baton.kvtransfer.effects import (
    AttachGranted,
    AttachRefused,
    CutAttachment,
    PinEffect,
    PinPrefix,
    UnpinPrefix,
)
from baton.kvtransfer.lease import patience_ms
from baton.kvtransfer.progress import KVReady
from baton.types import BlockHash, BlockId

MAX_PINS = 8  # at a time; each costs a sender, and blocks that nobody else can have


@dataclass(slots=True)
class _Pin:
    key: int
    token_start: int
    stall_ms: int
    epoch: int | None = None  # while PINNING
    progress_at_ms: int = 0
    is_wanted: bool = True  # False while PINNING: whoever asked is gone
    is_cut: bool = False


class PinTable:
    """All pins of one worker. See the module docstring."""

    def __init__(self, mint_epoch: Callable[[], int], stall_ms: int) -> None:
        """
        Args:
            mint_epoch: an epoch that no attachment of this process has had.
            stall_ms: how long a reader may take nothing before it is cut, over a link that needs no
                time.
        """
        self._mint_epoch = mint_epoch
        self._stall_ms = stall_ms
        self._pins: dict[int, _Pin] = {}  # by key
        self._by_epoch: dict[int, _Pin] = {}

    def __len__(self) -> int:
        return len(self._pins)

    # ── from consumers ───────────────────────────────────────────────────────────────────────────

    def attach(
        self, key: int, hashes: tuple[BlockHash, ...], token_start: int, pace_ms: int = 0
    ) -> list[PinEffect]:
        """Someone with a checked grant wants the tokens from `token_start` on, and needs `pace_ms`
        for the frames that it has credit for. Answered by AttachGranted or AttachRefused with the
        same `key`."""
        if len(self._pins) >= MAX_PINS:
            return [AttachRefused(key, Cause.OVERLOADED, "too many readers by hash")]
        self._pins[key] = _Pin(key, token_start, patience_ms(self._stall_ms, pace_ms))
        return [PinPrefix(key, hashes)]

    def cancel_attach(self, key: int) -> None:
        """Whoever asked is gone before it was answered."""
        pin = self._pins.get(key)
        if pin is not None:
            pin.is_wanted = False

    def progress(self, epoch: int, now_ms: int) -> None:
        """The consumer took a frame."""
        pin = self._by_epoch.get(epoch)
        if pin is not None:
            pin.progress_at_ms = now_ms

    def closed(self, epoch: int) -> list[PinEffect]:
        """Nothing reads the blocks any more. Once per epoch."""
        pin = self._by_epoch.pop(epoch, None)
        if pin is None:
            return []
        del self._pins[pin.key]
        return [UnpinPrefix(pin.key)]

    # ── from the engine ──────────────────────────────────────────────────────────────────────────

    def pinned(
        self, key: int, block_ids: tuple[BlockId, ...], num_tokens: int, now_ms: int
    ) -> list[PinEffect]:
        """The engine holds the blocks of the chain's first `num_tokens` tokens; perhaps none."""
        pin = self._pins[key]
        if not pin.is_wanted:
            del self._pins[key]
            return [UnpinPrefix(key)]
        pin.epoch = self._mint_epoch()
        pin.progress_at_ms = now_ms
        self._by_epoch[pin.epoch] = pin
        return [AttachGranted(key, pin.epoch, None, block_ids, num_tokens, KVReady(num_tokens), ())]

    # ── time and the end ─────────────────────────────────────────────────────────────────────────

    def tick(self, now_ms: int) -> list[PinEffect]:
        """Cut readers that take nothing: their blocks are wanted."""
        stalled = [
            pin
            for pin in self._by_epoch.values()
            if not pin.is_cut and now_ms - pin.progress_at_ms > pin.stall_ms
        ]
        return [self._cut(pin, Cause.TRANSFER_STALLED, "no progress") for pin in stalled]

    def cut_all(self, cause: Cause, detail: str) -> list[PinEffect]:
        """The worker ends."""
        return [self._cut(p, cause, detail) for p in self._by_epoch.values() if not p.is_cut]

    def _cut(self, pin: _Pin, cause: Cause, detail: str) -> CutAttachment:
        assert pin.epoch is not None
        pin.is_cut = True
        return CutAttachment(pin.epoch, cause, detail)

    def check_integrity(self) -> None:
        """Asserts every invariant; for tests and idle workers."""
        if not self._pins:
            assert not self._by_epoch
            return
        assert len(self._pins) <= MAX_PINS
        opened = {pin.epoch: pin for pin in self._pins.values() if pin.epoch is not None}
        assert opened == self._by_epoch
        assert all(pin.is_wanted for pin in opened.values())
