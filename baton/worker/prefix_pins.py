"""What other workers read here by hash: the prefix cache, opened to whoever has a grant."""

from collections.abc import Callable, Iterable

from baton.compat import layout_conflict
from baton.engine import commands
from baton.engine.events import PrefixPinned
from baton.errors import BatonError, Cause
from baton.grants import GrantBook, GrantKeys, HashChain, check_chain
from baton.kvtransfer.base import FetchOpen
from baton.kvtransfer.effects import AttachRefused, PinEffect, PinPrefix, UnpinPrefix
from baton.kvtransfer.pins import PinTable
from baton.types import WorkerInfo
from baton.worker.outbox import Outbox
from baton.worker.policy import WorkerPolicy


class PrefixPins:
    """Checks grants and owns the pins of one worker, whatever its role."""

    def __init__(
        self,
        info: WorkerInfo,
        policy: WorkerPolicy,
        keys: GrantKeys,
        outbox: Outbox,
        mint_epoch: Callable[[], int],
    ) -> None:
        self._info = info
        self._outbox = outbox
        self._book = GrantBook(keys)
        self.table = PinTable(mint_epoch, policy.attachment_stall_ms)

    def __len__(self) -> int:
        return len(self.table)

    def attach(
        self, key: int, fetch: FetchOpen, chain: HashChain, is_draining: bool, now_ms: int
    ) -> None:
        """Answered by AttachGranted or AttachRefused with the same `key`, after the step that
        runs at the latest."""
        try:
            if is_draining:
                raise BatonError(Cause.DRAINING, "the worker is shutting down")
            self._book.admit(chain.grant, self._info.incarnation, now_ms)
            check_chain(chain, self._info.fingerprint, fetch.salt_digest)
            self._check_fetch(fetch, chain)
        except BatonError as error:
            self._outbox.emit(AttachRefused(key, error.cause, error.message))
            return
        self._carry_out(
            self.table.attach(key, chain.hashes, fetch.range.token_start, fetch.pace_ms)
        )

    def _check_fetch(self, fetch: FetchOpen, chain: HashChain) -> None:
        layout, wanted = self._info.layout, fetch.range
        if fetch.fingerprint != self._info.fingerprint:
            raise BatonError(Cause.MODEL_MISMATCH, "model fingerprints differ")
        conflict = layout_conflict(layout, fetch.layout)
        if conflict is not None:
            raise BatonError(Cause.LAYOUT_INCOMPATIBLE, conflict)
        tokens_ok = 0 <= wanted.token_start < wanted.token_stop <= chain.grant.num_tokens
        layers_ok = wanted.layer_start == 0 and wanted.layer_stop == layout.num_layers
        if not tokens_ok or not layers_ok:
            raise BatonError(Cause.PROTOCOL, f"the grant does not cover {wanted}")

    def pinned(self, event: PrefixPinned, now_ms: int) -> None:
        self._carry_out(self.table.pinned(event.pin, event.block_ids, event.num_tokens, now_ms))

    def closed(self, epoch: int) -> None:
        self._carry_out(self.table.closed(epoch))

    def tick(self, now_ms: int) -> None:
        self._carry_out(self.table.tick(now_ms))

    def cut_all(self) -> None:
        """The process ends; what has not been granted yet is refused by its end."""
        self._carry_out(self.table.cut_all(Cause.DRAINING, "the worker is shutting down"))

    def _carry_out(self, effects: Iterable[PinEffect]) -> None:
        for effect in effects:
            match effect:
                case PinPrefix(key, hashes):
                    self._outbox.post(commands.PinPrefix(key, hashes))
                case UnpinPrefix(key):
                    self._outbox.post(commands.UnpinPrefix(key))
                case _:
                    self._outbox.emit(effect)
