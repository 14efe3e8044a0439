"""What the gateway knows of each worker: registration, last snapshot, learned latency, and what it
has sent but not yet seen accounted for. The fleet is the router's input and nothing else writes to
it than the session's messages."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf

from baton.errors import Cause
from baton.gateway.backend import ClusterView, LinkView, Moved, WorkerState, WorkerView
from baton.gateway.fleet_totals import FleetTotals
from baton.latency import LatencyModel, LinkModel, trust_in, unseen_for
from baton.messages import (
    Abort,
    Admitted,
    Bind,
    ComputeLocally,
    Failed,
    GatewayMessage,
    Imported,
    KvFailed,
    LegMessage,
    NoRoom,
    StepBatch,
    Submit,
)
from baton.types import (
    LegId,
    Role,
    StepTiming,
    TokenChunk,
    TransferStats,
    WorkerInfo,
    WorkerSnapshot,
)

STUCK_MS = 10_000.0  # a step older than this and than five predictions is a stuck loop


def num_blocks(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)


@dataclass(slots=True)
class Worker:
    """One worker, as of its last message. Owned by the fleet; the router only reads."""

    info: WorkerInfo
    snapshot: WorkerSnapshot
    state: WorkerState = WorkerState.UP
    latency: LatencyModel = field(default_factory=LatencyModel)
    prefilled_at_ms: float = -inf  # when it was last seen to prefill, and to decode
    decoded_at_ms: float = -inf
    pending_tokens: dict[LegId, int] = field(default_factory=dict)  # submitted, not yet answered
    pending_blocks: dict[LegId, int] = field(default_factory=dict)  # bound, not yet answered

    @property
    def worker_id(self) -> str:
        return self.info.worker_id

    @property
    def role(self) -> Role:
        return self.snapshot.role

    @property
    def accepts(self) -> bool:
        """May get new legs."""
        return self.state is WorkerState.UP and not self.snapshot.draining

    @property
    def free_blocks(self) -> int:
        """Free ones that no Bind in flight is about to take."""
        return self.snapshot.free_blocks - sum(self.pending_blocks.values())

    @property
    def num_sequences(self) -> int:
        snapshot = self.snapshot
        return snapshot.num_running + snapshot.num_waiting_for_kv + len(self.pending_blocks)

    @property
    def queued_tokens(self) -> int:
        return self.snapshot.queued_prefill_tokens + sum(self.pending_tokens.values())

    @property
    def is_at_work(self) -> bool:
        return self.num_sequences > 0 or self.queued_tokens > 0

    def stepped(self, timing: StepTiming, now_ms: float) -> None:
        self.latency.age(now_ms - max(self.prefilled_at_ms, self.decoded_at_ms))
        self.latency.observe(timing)
        if timing.num_prefill_tokens:
            self.prefilled_at_ms = now_ms
        if timing.num_decodes:
            self.decoded_at_ms = now_ms

    def is_stuck(self) -> bool:
        """Heartbeats come, steps do not (liveness is not progress). A pooling worker, whose steps
        are as long as its inputs, finds that out itself, and gives up what it has."""
        snapshot = self.snapshot
        if self.role is Role.POOLING or snapshot.step_age_ms <= STUCK_MS:
            return False
        predicted = self.latency.decode_step_ms(snapshot.num_running, snapshot.context_tokens)
        predicted += self.latency.prefill_ms(min(snapshot.queued_prefill_tokens, 4096))
        return snapshot.step_age_ms > 5 * predicted

    def view(self) -> WorkerView:
        is_draining = self.snapshot.draining and self.state is WorkerState.UP
        state = WorkerState.DRAINING if is_draining else self.state
        return WorkerView(
            worker_id=self.worker_id,
            role=self.role,
            state=state,
            model=self.info.model,
            pid=self.info.pid,
            address=self.info.address,
            host_id=self.info.host_id,
            device=self.info.device,
            block_size=self.info.layout.block_size,
            snapshot=self.snapshot,
        )


@dataclass(slots=True)
class Link:
    """From one producer to one consumer."""

    source: str
    target: str
    model: LinkModel = field(default_factory=LinkModel)
    measured_at_ms: float = -inf
    class_bytes_per_ms: float = 0.0  # of links like it; 0 = nobody knows
    transport: str = ""
    moved: dict[str, Moved] = field(default_factory=dict)
    failures: Counter[Cause] = field(default_factory=Counter)

    def learn(self, stats: TransferStats, now_ms: float) -> None:
        num_measured = self.model.num_measured
        self.model.learn(stats)
        if self.model.num_measured > num_measured:
            self.measured_at_ms = now_ms

    def failed(self, cause: Cause, now_ms: float) -> None:
        self.failures[cause] += 1
        if cause is Cause.TRANSFER_STALLED:
            self.model.stalled()
            self.measured_at_ms = now_ms

    def count(self, stats: TransferStats) -> None:
        self.transport = stats.transport
        before = self.moved.get(stats.transport, Moved())
        self.moved[stats.transport] = Moved(
            before.num_transfers + 1,
            before.num_bytes + stats.num_bytes,
            before.seconds + stats.duration_ms / 1e3,
        )

    @property
    def was_tried(self) -> bool:
        return bool(self.moved or self.failures)

    def view(self) -> LinkView:
        is_measured = self.model.num_measured > 0
        return LinkView(
            self.source,
            self.target,
            self.transport,
            self.model.bytes_per_ms * 1e3 if is_measured or self.class_bytes_per_ms else None,
            dict(self.moved),
            dict(self.failures),
            self.model.in_flight_bytes,
            is_measured,
        )


class Fleet:
    """Every worker with a session, and the links between them."""

    def __init__(self) -> None:
        self.totals = FleetTotals()
        self._workers: dict[str, Worker] = {}  # in the order of their ids
        self._links: dict[tuple[str, str], Link] = {}
        # Transfers under way: leg on D → (link, bytes that the link was told to expect).
        self._transfers: dict[LegId, tuple[Link, int]] = {}
        self._link_measured_at_ms = -inf  # any of them

    def __iter__(self) -> Iterator[Worker]:
        """In the order of their ids, so that ties are broken the same way everywhere."""
        return iter(self._workers.values())

    def get(self, worker_id: str) -> Worker | None:
        return self._workers.get(worker_id)

    def link(self, source: str, target: str) -> Link:
        link = self._links.get((source, target))
        if link is None:
            link = self._links[source, target] = Link(source, target)
            self._inherit(link)
        return link

    def transfer_ms(self, source: str, target: str, num_bytes: int) -> float:
        """Predicted time until that many bytes are there, behind those in flight. A slow link of
        which nothing was seen for long, while others were used, is taken to be like its class."""
        link = self.link(source, target)
        unseen_ms = unseen_for(link.measured_at_ms, self._link_measured_at_ms)
        rate, usual = link.model.bytes_per_ms, link.class_bytes_per_ms
        if usual > rate:
            rate = usual + (rate - usual) * trust_in(unseen_ms)
        return link.model.transfer_ms(num_bytes, rate)

    def joined(self, info: WorkerInfo) -> Worker:
        """A session said Hello. What was learned of the same incarnation is kept."""
        known = self._workers.get(info.worker_id)
        snapshot = WorkerSnapshot(
            role=info.role, free_blocks=info.num_blocks, total_blocks=info.num_blocks
        )
        worker = Worker(info, snapshot)
        if known is not None and known.info.incarnation == info.incarnation:
            worker.latency = known.latency
            worker.prefilled_at_ms = known.prefilled_at_ms
            worker.decoded_at_ms = known.decoded_at_ms
        self._workers[info.worker_id] = worker
        if known is None:
            self._workers = dict(sorted(self._workers.items()))
        return worker

    def lost(self, worker_id: str) -> None:
        """Its session is gone. It stays listed, so that people see it, until `forget`."""
        worker = self._workers.get(worker_id)
        if worker is None:
            return
        worker.state = WorkerState.LOST
        worker.pending_tokens.clear()
        worker.pending_blocks.clear()
        for leg, (link, num_bytes) in list(self._transfers.items()):
            if worker_id == link.target:
                link.model.ended(num_bytes)
                del self._transfers[leg]

    def forget(self, worker_id: str) -> None:
        worker = self._workers.get(worker_id)
        if worker is not None and worker.state is WorkerState.LOST:
            del self._workers[worker_id]
            self.totals.forget(worker_id)
            for key in [key for key in self._links if worker_id in key]:
                del self._links[key]

    def sent(self, worker_id: str, message: GatewayMessage) -> None:
        """Count what the next snapshot cannot show yet."""
        worker = self._workers.get(worker_id)
        if worker is None:
            return
        match message:
            case Submit(leg, request) | ComputeLocally(leg, request):
                worker.pending_tokens[leg] = len(request.prompt_token_ids)
                self.transfer_ended(leg, None)
            case Bind(leg, request):
                tokens = len(request.prompt_token_ids)
                blocks = num_blocks(tokens, worker.info.layout.block_size)
                worker.pending_blocks[leg] = blocks + request.sampling.n
            case Abort(leg, None):
                worker.pending_tokens.pop(leg, None)
                worker.pending_blocks.pop(leg, None)
                self.transfer_ended(leg, None)
            case _:
                pass

    def transfer_started(self, leg: LegId, source: str, target: str, num_bytes: int) -> None:
        self.transfer_ended(leg, None)
        link = self.link(source, target)
        link.model.started(num_bytes)
        self._transfers[leg] = (link, num_bytes)

    def transfer_ended(
        self,
        leg: LegId,
        stats: TransferStats | None,
        failure: Cause | None = None,
        now_ms: float = -inf,
    ) -> None:
        """Take a transfer off its link's queue and learn from it."""
        link, num_bytes = self._transfers.pop(leg, (None, 0))
        if link is None:
            return
        link.model.ended(num_bytes)
        if failure is not None:
            link.failed(failure, now_ms)
        if stats is not None:
            link.learn(stats, now_ms)
            link.count(stats)
            self._link_measured_at_ms = max(self._link_measured_at_ms, link.measured_at_ms)

    def received(self, worker_id: str, batch: StepBatch, now_ms: float) -> None:
        """Apply a batch's snapshot and timing, and stop counting what it answers."""
        worker = self._workers.get(worker_id)
        if worker is None:
            return
        is_news = batch.snapshot.link_rates != worker.snapshot.link_rates
        worker.snapshot = batch.snapshot
        if is_news:
            self._learn_rates(worker)
        if batch.totals is not None:
            self.totals.heard(worker.info, batch.totals)
        if batch.timing is not None:
            worker.stepped(batch.timing, now_ms)
        if worker.state in {WorkerState.UP, WorkerState.STUCK}:
            worker.state = WorkerState.STUCK if worker.is_stuck() else WorkerState.UP
        is_pending = bool(worker.pending_tokens or worker.pending_blocks)
        for message in batch.messages:
            if is_pending or type(message) is not TokenChunk:
                self._answered(worker, message, now_ms)

    def _learn_rates(self, target: Worker) -> None:
        """Of links to it."""
        for source in self._workers:
            link = self._links.get((source, target.worker_id))
            if link is not None:
                self._inherit(link)

    def _inherit(self, link: Link) -> None:
        """A link that nothing has come over yet is taken to be as fast as its class, in the eyes of
        its target or else of others: the first transport that both ends have and of which somebody
        knows something."""
        source, target = self._workers.get(link.source), self._workers.get(link.target)
        if source is None or target is None:
            return
        is_same_host = source.info.host_id == target.info.host_id
        offered = {address.name for address in source.info.transports}
        for worker in (target, source, *self):
            rates = {
                rate.transport: rate.bytes_per_s
                for rate in worker.snapshot.link_rates
                if rate.is_same_host == is_same_host and rate.transport in offered
            }
            for address in target.info.transports:  # in its order of preference
                if address.name in rates:
                    link.class_bytes_per_ms = max(rates[address.name] / 1e3, 1.0)
                    if not link.model.num_measured:
                        link.model.bytes_per_ms = link.class_bytes_per_ms
                    return

    def _answered(self, worker: Worker, message: LegMessage, now_ms: float) -> None:
        leg = message.leg
        worker.pending_tokens.pop(leg, None)
        worker.pending_blocks.pop(leg, None)
        match message:
            case TokenChunk():  # nearly all of them
                pass
            case Imported(_, stats):
                self.transfer_ended(leg, stats, now_ms=now_ms)
            case Admitted(_, _, _, prefix):
                if prefix is None:
                    self.transfer_ended(leg, None)
                else:
                    self.transfer_ended(leg, prefix.stats, prefix.cause, now_ms)
            case KvFailed(_, _, cause):
                self.transfer_ended(leg, None, cause, now_ms)
            case NoRoom() | Failed():
                self.transfer_ended(leg, None)
            case _:
                pass

    def view(self) -> ClusterView:
        links = sorted(self._links.items())
        return ClusterView(
            tuple(worker.view() for worker in self),
            tuple(link.view() for _, link in links if link.was_tried),
            totals=self.totals.sum,
        )
