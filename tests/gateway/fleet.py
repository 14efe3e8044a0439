"""A gateway without I/O: the dispatcher, and the test itself as its workers."""

from collections.abc import Iterable
from typing import TypeVar

from baton.gateway.dispatch import DispatchConfig, Dispatcher
from baton.gateway.legs import Emit, Ended
from baton.gateway.request_machine import RequestMachine
from baton.grants import GrantKeys
from baton.messages import (
    Abort,
    Admitted,
    Bind,
    Bound,
    ComputeLocally,
    GatewayMessage,
    Imported,
    LegMessage,
    Progress,
    Queued,
    Rebind,
    Release,
    StepBatch,
    Submit,
)
from baton.types import (
    BlockHash,
    LegId,
    Request,
    Role,
    TokenChunk,
    TransferStats,
    WorkerInfo,
    WorkerSnapshot,
)
from tests.gateway.support import request, ticket, worker_info

P1, P2 = worker_info("p1", Role.PREFILL), worker_info("p2", Role.PREFILL)
D1, D2 = worker_info("d1", Role.DECODE), worker_info("d2", Role.DECODE)


Order = Submit | Bind | Rebind | ComputeLocally | Abort | Release  # what a machine sends
T = TypeVar("T", bound=Order)


class NoHits:
    def longest_prefix(self, hashes: Iterable[BlockHash]) -> dict[str, int]:
        return {}


class Gateway:
    """A dispatcher whose workers are the test itself."""

    def __init__(self, *infos: WorkerInfo) -> None:
        self.now = 0.0
        self.sent: list[tuple[str, Order]] = []
        self.tokens: dict[int, list[int]] = {}
        self.ended: Ended | None = None
        self.dropped: list[str] = []
        self.dispatcher = Dispatcher(
            NoHits(),
            DispatchConfig(),
            GrantKeys("test", ()),
            send=self._send,
            deliver=self._deliver,
            drop=self.dropped.append,
        )
        self.infos = {info.worker_id: info for info in infos}
        for info in infos:
            self.dispatcher.worker_joined(info, 0)

    def _send(self, worker_id: str, message: GatewayMessage) -> None:
        assert isinstance(message, Order)
        self.sent.append((worker_id, message))

    def _deliver(self, request_id: str, effect: Emit | Ended) -> None:
        assert self.ended is None, "nothing follows the end"
        if isinstance(effect, Ended):
            self.ended = effect
            return
        known = self.tokens.setdefault(effect.chunk.choice, [])
        assert effect.chunk.start == len(known), "index order"
        known.extend(effect.chunk.token_ids)

    def open(self, what: Request | None = None) -> RequestMachine:
        return self.dispatcher.open(what or request(), self.now)

    def take(self) -> list[tuple[str, Order]]:
        sent, self.sent = self.sent, []
        return sent

    def take_one(self, kind: type[T]) -> tuple[str, T]:
        ((worker_id, message),) = self.take()
        assert isinstance(message, kind), message
        return worker_id, message

    def say(self, worker_id: str, *messages: LegMessage, free_blocks: int | None = None) -> None:
        info = self.infos[worker_id]
        free = info.num_blocks if free_blocks is None else free_blocks
        snapshot = WorkerSnapshot(info.role, free_blocks=free, total_blocks=info.num_blocks)
        self.dispatcher.received(worker_id, StepBatch(messages, snapshot), self.now)

    def lose(self, worker_id: str) -> None:
        self.dispatcher.worker_lost(worker_id, self.now)

    def back(self, worker_id: str) -> None:
        self.dispatcher.worker_joined(self.infos[worker_id], self.now)

    def wait(self, ms: float) -> None:
        self.now += ms
        self.dispatcher.tick(self.now)

    # shortcuts to a state: each returns the legs it made

    def submitted(self, what: Request | None = None) -> tuple[str, LegId]:
        self.open(what)
        worker_id, message = self.take_one(Submit)
        self.say(worker_id, Queued(message.leg))
        return worker_id, message.leg

    def admitted(self, what: Request | None = None) -> tuple[str, LegId]:
        p, leg = self.submitted(what)
        far = Progress(leg, 0, 1000.0)  # nothing is bound yet
        self.say(p, Admitted(leg, 0, ticket(self.infos[p])), far)
        return p, leg

    def held(self, what: Request | None = None) -> tuple[str, LegId, str, Bind]:
        p, leg = self.admitted(what)
        n = 1 if what is None else what.sampling.n
        self.say(p, *(TokenChunk(leg, choice, 0, (5,)) for choice in range(n)))
        bind = self.sent[-1][1]
        assert isinstance(bind, Bind)
        worker_id, _ = self.take()[-1]
        return p, leg, worker_id, bind

    def decoding(self) -> tuple[str, LegId, str, LegId]:
        p, p_leg, d, bind = self.held()
        stats = TransferStats("local", 100, 1, 40, 1.0)
        self.say(d, Bound(bind.leg, 0), Imported(bind.leg, stats))
        self.say(d, TokenChunk(bind.leg, 0, 0, (5, 6, 7)))
        return p, p_leg, d, bind.leg
