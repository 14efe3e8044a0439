"""A gateway process in the simulator: the real dispatcher, router and request machines; sessions
are events."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from baton.errors import BatonError
from baton.gateway.dispatch import DispatchConfig, Dispatcher
from baton.gateway.legs import Emit, Ended, MachineConfig
from baton.gateway.mover import MoverConfig
from baton.gateway.prefix_plan import PrefixConfig
from baton.gateway.request_machine import RequestMachine
from baton.gateway.router import RouterConfig
from baton.grants import GrantKeys
from baton.locality import PrefixIndex
from baton.messages import GatewayMessage, Heartbeat, Hello, StepBatch
from baton.types import LegId
from tests.sim.oracle import Client
from tests.sim.world import Conn, Node, World

if TYPE_CHECKING:
    from tests.sim.fleet import SimFleet
    from tests.sim.worker import SimWorker

HEARTBEAT_MS = 500.0
SILENCE_MS = 2_500.0
RECONNECT_MS = 100.0


@dataclass(slots=True)
class _Session:
    """The gateway's end of a session with one worker."""

    gateway: "SimGateway"
    worker_id: str
    conn: Conn
    is_up: bool = False
    silence_ms: float = 0.0

    def received(self, message: Any) -> None:
        gateway = self.gateway
        self.silence_ms = 0.0
        if isinstance(message, Hello):
            self.is_up = True
            gateway.world.log(gateway.name, f"{self.worker_id} is up")
            gateway.dispatcher.worker_joined(message.info, gateway.world.now)
        else:
            assert isinstance(message, StepBatch)
            for item in message.messages:
                gateway.fleet.stats.messages[type(item).__name__] += 1
                gateway.world.log(gateway.name, "←", self.worker_id, item)
                gateway.tell_migration(type(item).__name__, item.leg)
                gateway.fleet.strike(gateway, f"gateway {type(item).__name__}")
            gateway.dispatcher.received(self.worker_id, message, gateway.world.now)
        gateway.set_timer()

    def closed(self, reason: str) -> None:
        gateway = self.gateway
        del gateway.sessions[self.worker_id]
        if self.is_up:
            gateway.world.log(gateway.name, f"{self.worker_id} is lost: {reason}")
            gateway.dispatcher.worker_lost(self.worker_id, gateway.world.now)
        gateway.world.after(RECONNECT_MS, gateway, gateway.connect, self.worker_id)
        gateway.set_timer()


class SimGateway(Node):
    dispatcher: Dispatcher

    def __init__(self, world: World, fleet: "SimFleet", name: str) -> None:
        super().__init__(world, name)
        self.fleet = fleet
        self.sessions: dict[str, _Session] = {}
        self.clients: dict[str, Client] = {}
        self._timer_ms = float("inf")
        self._ways: dict[LegId, tuple[str, str | None]] = {}  # of migrations: from and to

    def start(self) -> None:
        self.is_alive = True
        self.index = PrefixIndex()
        config = DispatchConfig(
            machine=MachineConfig(queue_timeout_ms=30_000, reroute_wait_ms=6_000),
            router=RouterConfig(prefixes=self._prefix_config()),
            mover=self._mover_config(),
        )
        self.dispatcher = Dispatcher(
            self.index,
            config,
            GrantKeys("sim", ()),
            send=self._send,
            deliver=self._deliver,
            drop=self._drop,
        )
        self.sessions, self.clients = {}, {}
        self._timer_ms = float("inf")
        for worker_id in self.fleet.workers:
            self.connect(worker_id)
        self.world.after(HEARTBEAT_MS, self, self._beat)

    def _prefix_config(self) -> PrefixConfig:
        return PrefixConfig(
            fetching=self.world.rng.choice(["auto", "always", "always", "off"]),
            margin_ms=0.0,
            min_deadline_ms=self.world.rng.choice([1.0, 100.0]),
        )

    def _mover_config(self) -> MoverConfig:
        plan = self.fleet.plan
        lively = MoverConfig(
            rebalances=not plan.is_calm,
            look_every_ms=2.0,
            rebalance_every_ms=10.0,
            min_speedup=1.05,
            min_gain_ms=1.0,
        )
        if not plan.is_restless:
            return lively
        return replace(lively, rebalance_every_ms=1.0, min_speedup=0.0, min_gain_ms=-1e9)

    # ── sessions ─────────────────────────────────────────────────────────────────────────────────

    def connect(self, worker_id: str) -> None:
        worker: SimWorker = self.fleet.workers[worker_id]
        if worker_id in self.sessions:
            return
        if not worker.is_alive:
            self.world.after(RECONNECT_MS, self, self.connect, worker_id)
            return
        conn = Conn(self.world, (self, worker))
        session = self.sessions[worker_id] = _Session(self, worker_id, conn)
        conn.ends[0] = session
        self.world.after(self.world.delay(), worker, self._accepted, worker, conn)

    @staticmethod
    def _accepted(worker: "SimWorker", conn: Conn) -> None:
        if conn.is_open[1]:
            worker.accept(conn)

    def _beat(self) -> None:
        for session in list(self.sessions.values()):
            session.conn.send(0, Heartbeat(1))
            session.silence_ms += HEARTBEAT_MS
            if session.silence_ms > SILENCE_MS:
                session.conn.close(0)
                session.closed("silent")
        self.world.after(HEARTBEAT_MS, self, self._beat)

    def _send(self, worker_id: str, message: GatewayMessage) -> None:
        self.fleet.stats.messages[type(message).__name__] += 1
        self.world.log(self.name, "→", worker_id, message)
        if not isinstance(message, Heartbeat):
            self.tell_migration(type(message).__name__, message.leg)
            self.fleet.strike(self, f"gateway {type(message).__name__}")
        session = self.sessions.get(worker_id)
        if session is not None and session.is_up:
            session.conn.send(0, message)

    def tell_migration(self, kind: str, leg: LegId) -> None:
        """What is sent last about a migration is sent when its machine has forgotten it."""
        if self.fleet.plan.move_strike is None:
            return
        machine = self.dispatcher.machines.get(leg.request_id)
        migration = None if machine is None else machine._migration
        if migration is not None and migration.lease is not None:
            source, target = migration.lease, migration.target
            way = source.info.worker_id, None if target is None else target.info.worker_id
            self._ways[source.leg] = way
            if target is not None:
                self._ways[target.leg] = way
        if leg in self._ways:
            self.fleet.about_migration(kind, *self._ways[leg])

    def _drop(self, worker_id: str) -> None:
        session = self.sessions.get(worker_id)
        if session is not None:
            session.conn.close(0)
            session.closed("stuck")

    # ── clients ──────────────────────────────────────────────────────────────────────────────────

    def open(self, client: Client) -> None:
        request = client.request
        try:
            client.machine = self.dispatcher.open(request, self.world.now)
        except BatonError as error:
            self.world.log(self.name, f"{request.request_id} refused: {error.cause.name}")
            client.refused(error.cause, self)
        if client.abort_after_ms is not None:
            self.world.after(client.abort_after_ms, self, self._abort, client)
        self.set_timer()

    def _abort(self, client: Client) -> None:
        client.is_aborted = True
        self.dispatcher.cancel(client.request.request_id, self.world.now)
        self.set_timer()

    def _deliver(self, request_id: str, effect: Emit | Ended) -> None:
        self.world.log(self.name, request_id, effect)
        client = self.clients[request_id]
        if isinstance(effect, Ended):
            client.ended(effect, self)
            return
        stopped = client.emitted(effect.chunk)
        if stopped:
            delay = self.world.rng.random() * 3
            self.world.after(delay, self, self._finish_choice, client, effect.chunk.choice)

    def _finish_choice(self, client: Client, choice: int) -> None:
        self.dispatcher.finish_choice(client.request.request_id, choice, self.world.now)
        self.set_timer()

    # ── time ─────────────────────────────────────────────────────────────────────────────────────

    def set_timer(self) -> None:
        wake_ms = self.dispatcher.next_wake_ms
        if wake_ms < self._timer_ms:
            self._timer_ms = wake_ms
            self.world.after(max(wake_ms - self.world.now, 0.0), self, self._wake)

    def _wake(self) -> None:
        self._timer_ms = float("inf")
        self.dispatcher.tick(self.world.now)
        self.set_timer()

    # ── invariants ───────────────────────────────────────────────────────────────────────────────

    def check(self) -> None:
        for machine in self.dispatcher.machines.values():
            assert not machine.num_defects, "a leg produced another token than was committed"
            check_not_silent(machine)

    def check_clean(self) -> None:
        assert not self.dispatcher.machines, f"{self.name} has open requests"
        assert not self.dispatcher._parked
        assert not len(self.dispatcher._timers), f"{self.name} will wake requests that are over"
        assert self.dispatcher._claim is None
        assert not self.dispatcher.fleet._transfers, f"{self.name} counts transfers for ever"
        for worker in self.dispatcher.fleet:
            assert not worker.pending_blocks, f"{self.name} counts pending blocks for ever"
            assert not worker.pending_tokens, f"{self.name} counts pending tokens for ever"


def check_not_silent(machine: RequestMachine) -> None:
    """An open request has a leg at work or a timer; nothing else could ever end it."""
    has_leg = machine._decode is not None or machine._prefill is not None
    assert has_leg or machine.wake_at_ms < float("inf"), "a request waits for nothing"
