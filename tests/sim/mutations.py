"""Ways to break the product on purpose. Each must make the simulator fail; none exists outside the
tests."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from unittest.mock import patch

from baton.engine import commands, core
from baton.engine.block_pool import BlockPool
from baton.engine.intake import Intake
from baton.engine.legs import Legs
from baton.engine.prefix_cache import PrefixCache
from baton.engine.scheduler import Scheduler
from baton.engine.sequence import Leg, Sequence
from baton.gateway.commit import OutputLog
from baton.kvtransfer import frames
from baton.types import BlockId, TokenChunk
from baton.worker.consumer import ConsumerSide


@contextmanager
def bind_computes_here() -> Iterator[None]:
    """D ignores the ticket and computes the prompt: the tokens are right, nothing is moved."""

    def bind(self, session, leg, request, source, now_ms) -> None:  # type: ignore[no-untyped-def]
        self.compute_locally(session, leg, request, now_ms)

    with patch.object(ConsumerSide, "bind", bind):
        yield


@contextmanager
def import_is_recomputed() -> Iterator[None]:
    """D fetches the KV, says Imported, and computes it all the same."""

    def apply(self: Intake, command: commands.KVImported) -> None:
        self._compute_here(commands.ComputeHere(command.leg))

    with patch.object(Intake, "_kv_imported", apply):
        yield


@contextmanager
def checksum_off() -> Iterator[None]:
    with patch.object(frames, "_checksum", lambda *_: 0):
        yield


@contextmanager
def quarantine_off() -> Iterator[None]:
    """Blocks of an aborted leg are free at once, readers and writers or not."""
    with patch.object(BlockPool, "quarantine", lambda self, _, blocks: self.release(blocks)):
        yield


@contextmanager
def prefix_hits_ignored() -> Iterator[None]:
    with patch.object(PrefixCache, "find", lambda *_, **__: []):
        yield


@contextmanager
def commit_rule_off() -> Iterator[None]:
    """Every chunk is passed on as it comes."""
    commit = OutputLog.commit

    def pass_on(self: OutputLog, chunk: TokenChunk) -> TokenChunk | None:
        commit(self, chunk)
        return chunk

    with patch.object(OutputLog, "commit", pass_on):
        yield


@contextmanager
def layers_announced_too_early() -> Iterator[None]:
    """A layer counts as ready when it is begun."""
    tell = core._tell_layers

    def tell_early(on_kv_ready, exported, num_layers, num_ready) -> None:  # type: ignore[no-untyped-def]
        tell(on_kv_ready, exported, num_layers, num_ready + 1)

    with patch.object(core, "_tell_layers", tell_early):
        yield


@contextmanager
def tokens_announced_too_early() -> Iterator[None]:
    """The end of a step does not matter: all its layers count as soon as one does."""
    tell = core._tell_layers

    def tell_all(on_kv_ready, exported, num_layers, num_ready) -> None:  # type: ignore[no-untyped-def]
        tell(on_kv_ready, exported, num_layers + 1, num_layers)

    with patch.object(core, "_tell_layers", tell_all):
        yield


@contextmanager
def shared_blocks_unpinned() -> Iterator[None]:
    """What another worker fetches of a running leg goes when the leg does."""
    hold = Legs.hold

    def hold_nothing(self: Legs, leg: Leg, block_ids: list[BlockId], num_tokens: int) -> None:
        hold(self, leg, block_ids, num_tokens)
        self._pool.release(leg.trunk.block_ids if leg.trunk is not None else [])

    with patch.object(Legs, "hold", hold_nothing):
        yield


@contextmanager
def catching_up_computes_nothing() -> Iterator[None]:
    """Tokens that were committed elsewhere count as computed."""
    extend = Scheduler.extend

    def skip(self: Scheduler, seq: Sequence, token_ids: tuple[int, ...]) -> None:
        extend(self, seq, token_ids)
        if seq.block_ids:
            room = len(seq.block_ids) * self._config.block_size
            seq.num_computed_tokens = min(seq.num_tokens - 1, room)

    with patch.object(Scheduler, "extend", skip):
        yield


MUTATIONS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    function.__name__: function
    for function in (
        bind_computes_here,
        import_is_recomputed,
        checksum_off,
        quarantine_off,
        prefix_hits_ignored,
        commit_rule_off,
        shared_blocks_unpinned,
        catching_up_computes_nothing,
        layers_announced_too_early,
        tokens_announced_too_early,
    )
}
