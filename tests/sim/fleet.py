"""A whole fleet and its schedule of requests and faults, drawn from one seed."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from baton.engine.null_runner import NullModel
from baton.gateway.backend import PrefillPath
from baton.messages import BlocksRemoved, BlocksStored
from baton.types import BlockHash, Request, Role, SamplingParams
from tests.sim.gateway import SimGateway
from tests.sim.oracle import Client, expected_output
from tests.sim.plan import DISTURBANCES, STEPS, Plan, Stats
from tests.sim.worker import EOS, MAX_MODEL_LEN, VOCAB_SIZE, SimWorker, WorkerSpec
from tests.sim.world import Conn, Died, Node, World, crash

MAX_EVENTS = 50_000  # a schedule takes some hundreds
PATIENCE_MS = 90_000.0  # virtual time after the last fault in which everything must have ended
_CALM_START_MS = 60.0  # every session is up
_ECHO_MS = 400.0  # when a calm fleet is at rest again, and the first prompt comes once more


class SimFleet:
    """Build with a seed, then `run`; raises AssertionError as soon as an invariant breaks."""

    def __init__(
        self, seed: int, plan: Plan | None = None, trace: Callable[[str], None] | None = None
    ) -> None:
        self.world = World(seed, trace)
        self.plan = plan or Plan()
        self.stats = Stats()
        self._disturbances = deque(["flip"] * self.plan.num_corrupt)
        self._old_frames: deque[bytes] = deque(maxlen=8)
        self._strikes: dict[str, str] = dict([self.plan.strike] if self.plan.strike else [])
        rng = self.world.rng
        eos_rates = [0.0, 0.01] if self.plan.is_restless else [0.0, 0.03, 0.2]
        self.model = NullModel(VOCAB_SIZE, EOS, eos_rate=rng.choice(eos_rates))
        self.workers: dict[str, SimWorker] = {}
        self.gateways: dict[str, SimGateway] = {}
        for spec in self._draw_workers():
            self.workers[spec.name] = SimWorker(self.world, self, spec, self.model)
        for worker in self.workers.values():
            worker.start()
        for index in range(rng.choice([1, 1, 2])):
            gateway = SimGateway(self.world, self, f"g{index}")
            self.gateways[gateway.name] = gateway
            gateway.start()
        self.clients = self._draw_clients()

    # ── drawing ──────────────────────────────────────────────────────────────────────────────────

    def _draw_workers(self) -> list[WorkerSpec]:
        rng = self.world.rng
        fleets = ["pd", "pd", "pdd", "ppd", "ppddd", "pdd"]
        roles = rng.choice(fleets if self.plan.is_calm else [*fleets, "b", "bb", "pb", "dd"])
        if self.plan.is_restless:
            roles = rng.choice(["pdd", "pdd", "ppddd", "bb", "dd", "pbb"])
        names = {"p": Role.PREFILL, "d": Role.DECODE, "b": Role.BOTH}
        num_seqs = rng.choice([2, 4, 8])
        is_tiny = rng.random() < 0.5
        has_midgets = rng.random() < 0.2 and not self.plan.is_calm
        return [
            WorkerSpec(
                name=f"{letter}{index}",
                role=names[letter],
                num_blocks=self._draw_num_blocks(is_tiny, has_midgets),
                block_size=rng.choice([16, 16, 32]),
                chunk_tokens=rng.choice([16, 32, 64]),
                max_num_seqs=num_seqs,
            )
            for index, letter in enumerate(roles)
        ]

    def _draw_num_blocks(self, is_tiny: bool, has_midgets: bool) -> int:
        """has_midgets: some workers are too small for some requests, perhaps all."""
        rng = self.world.rng
        if has_midgets and rng.random() < 0.5:
            return rng.randrange(3, 9)
        if self.plan.is_calm:
            return 128
        if self.plan.is_restless:
            return rng.randrange(28, 48)
        return rng.randrange(9, 14) if is_tiny else rng.randrange(16, 40)

    def _draw_clients(self) -> list[Client]:
        rng, world = self.world.rng, self.world
        prefixes = [self._tokens(rng.choice([16, 32, 48])) for _ in range(2)]
        is_crowd = rng.random() < 0.25
        num_clients = rng.randint(5, 8) if is_crowd else rng.randint(2, 4)
        window_ms = 10.0 if is_crowd else 60.0
        clients = [
            self._draw_client(f"r{index}", self._draw_prompt(prefixes), window_ms)
            for index in range(num_clients)
        ]
        if rng.random() < 0.4 and not self.plan.is_calm:
            self._add_second_turn(clients)
        if self.plan.is_calm:
            first = clients[0]
            echo = replace(first.request, request_id="echo")
            clients.append(replace(first, request=echo, arrives_ms=_ECHO_MS, got=_empty(echo)))
        for client in clients:
            gateway = self.gateways[client.gateway]
            world.after(client.arrives_ms, None, self._arrive, gateway, client)
        return clients

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self.world.rng.randrange(8, VOCAB_SIZE) for _ in range(count))

    def _draw_prompt(self, prefixes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        rng = self.world.rng
        prefix = rng.choice([(), *prefixes])
        num_own = rng.randrange(0 if prefix else 1, 24)
        return prefix + self._tokens(40 if self.plan.is_calm else num_own)

    def _add_second_turn(self, clients: list[Client]) -> None:
        """A chat goes on: what it needs first is where its first turn was decoded."""
        rng, first = self.world.rng, clients[0]
        prompt = first.request.prompt_token_ids + first.expected[0]
        second = self._draw_client("turn", prompt + self._tokens(rng.randrange(1, 9)), 60.0)
        if len(second.request.prompt_token_ids) <= MAX_MODEL_LEN // 2:
            arrives_ms = first.arrives_ms + 60.0 + rng.random() * 120.0
            clients.append(replace(second, gateway=first.gateway, arrives_ms=arrives_ms))

    def _draw_client(self, name: str, prompt: tuple[int, ...], window_ms: float) -> Client:
        rng, is_calm = self.world.rng, self.plan.is_calm
        lengths = [1, 2, 5, 9, 14, 14 if is_calm else 30]
        if self.plan.is_restless:
            lengths = [50, 80]
        sampling = SamplingParams(
            n=rng.choice([1, 1, 1, 2, 3]),
            temperature=rng.choice([0.0, 1.0]),
            seed=rng.getrandbits(32),
            max_tokens=rng.choice(lengths),
        )
        deadline = rng.choice([None, None, None, 40, 400, 4_000])
        gives_up = rng.random() < 0.15 and not is_calm
        stops = rng.random() < 0.2 and not is_calm
        request = Request(name, prompt, sampling, deadline_ms=None if is_calm else deadline)
        return Client(
            gateway=rng.choice(sorted(self.gateways)),
            request=request,
            arrives_ms=rng.random() * window_ms + (_CALM_START_MS if is_calm else 4.0),
            abort_after_ms=rng.random() * 80.0 if gives_up else None,
            stop_modulo=rng.choice([5, 20]) if stops else None,
            expected=expected_output(self.model, request, MAX_MODEL_LEN),
            got=_empty(request),
        )

    def _arrive(self, gateway: SimGateway, client: Client) -> None:
        """A client connects; to a gateway that is down it comes again later."""
        if gateway.is_alive:
            self.world.log(gateway.name, client.request)
            gateway.clients[client.request.request_id] = client
            self.world.after(0.0, gateway, gateway.open, client)
        else:
            self.world.after(50.0, None, self._arrive, gateway, client)

    def schedule_faults(self) -> None:
        rng = self.world.rng
        if self.plan.move_strike is not None:
            return
        self._draw_disturbances(rng.choice([0, 0, 0, 0, 1, 2]))
        faults = ["crash", "pause", "cut", "corrupt", "raise", "evict", "drain", "gateway", "step"]
        for _ in range(rng.choice([0, 1, 1, 2, 3, 4])):
            fault = rng.choice(faults)
            at = rng.random() * self.plan.fault_window_ms
            self.world.after(at, None, getattr(self, f"_fault_{fault}"))

    def _draw_disturbances(self, count: int) -> None:
        self._disturbances.extend(self.world.rng.choice(DISTURBANCES) for _ in range(count))

    # ── faults ───────────────────────────────────────────────────────────────────────────────────

    def _pick(self, nodes: dict[str, SimWorker]) -> SimWorker:
        return nodes[self.world.rng.choice(sorted(nodes))]

    def _fault_crash(self) -> None:
        worker = self._pick(self.workers)
        if worker.is_alive:
            self._count("crash", worker.name)
            self._crash(worker)

    def _crash(self, worker: SimWorker) -> None:
        crash(worker)
        self._drop_prefixes(worker)
        delay = self.world.rng.choice([5.0, 300.0, 3_000.0])
        self.world.after(delay, None, self._restart, worker)

    def _fault_step(self) -> None:
        rng = self.world.rng
        self._strikes[rng.choice(STEPS)] = rng.choice(["crash", "pause"])

    def strike(self, node: SimWorker | SimGateway, step: str) -> None:
        """A node is at this step.

        Raises:
            Died: it ends here.
        """
        how = self._strikes.pop(step, None)
        if how is None:
            return
        self.stats.steps[f"{how} at {step}"] += 1
        self._count("step", f"{node.name} {how} at {step}")
        if how == "crash":
            if isinstance(node, SimGateway):
                self._crash_gateway(node)
            else:
                self._crash(node)
            raise Died
        node.paused_until = self.world.now + self.world.rng.choice([20.0, 500.0, 4_000.0])

    def about_migration(self, kind: str, source: str, target: str | None) -> None:
        """A message of this kind, about a request that moves, is on its way at a gateway."""
        if self.plan.move_strike is None or self.stats.num_strikes:
            return
        wanted, who, how = self.plan.move_strike
        name = source if who == "source" else target
        if kind == wanted and name is not None:
            self.stats.num_strikes += 1
            self.world.after(0.0, None, self._strike_mover, self.workers[name], how)

    def _strike_mover(self, worker: SimWorker, how: str) -> None:
        if not worker.is_alive:
            return
        self._count(how, worker.name)
        match how:
            case "crash":
                self._crash(worker)
            case "cut":
                for conn in list(worker.conns):
                    conn.cut()
            case "pause":
                worker.paused_until = max(worker.paused_until, self.world.now + 4_000.0)

    def _restart(self, node: SimWorker | SimGateway) -> None:
        self.world.log(node.name, "starts again")
        node.start()

    def _fault_gateway(self) -> None:
        gateway = self.gateways[self.world.rng.choice(sorted(self.gateways))]
        if gateway.is_alive:
            self._count("gateway", gateway.name)
            self._crash_gateway(gateway)

    def _crash_gateway(self, gateway: SimGateway) -> None:
        crash(gateway)
        for client in gateway.clients.values():
            client.is_lost = client.end is None
        self.world.after(200.0, None, self._restart, gateway)

    def _fault_pause(self) -> None:
        nodes: list[Node] = [*self.workers.values(), *self.gateways.values()]
        node = self.world.rng.choice(nodes)
        duration = self.world.rng.choice([20.0, 500.0, 4_000.0])
        self._count("pause", node.name)
        node.paused_until = max(node.paused_until, self.world.now + duration)

    def _fault_cut(self) -> None:
        """Break some open connections; sometimes one end, or neither, is told."""
        rng = self.world.rng
        conns: dict[Conn, None] = {}
        for worker in self.workers.values():
            conns |= worker.conns
        for conn in rng.sample(list(conns), min(len(conns), rng.choice([1, 1, 2]))):
            told = rng.choice([(True, True), (True, True), (True, False), (False, True)])
            self._count("cut", f"{conn.nodes[0].name}-{conn.nodes[1].name} {told}")
            conn.cut(told)

    def _fault_corrupt(self) -> None:
        self._draw_disturbances(self.world.rng.choice([1, 2]))

    def _fault_raise(self) -> None:
        worker = self._pick(self.workers)
        self.stats.faults["raise"] += 1
        worker.runner.is_armed = True

    def _fault_evict(self) -> None:
        """The gateways' picture of who holds what is gone, as after a flushed Redis."""
        self.stats.faults["evict"] += 1
        for gateway in self.gateways.values():
            if gateway.is_alive:
                for name in self.workers:
                    gateway.index.drop(name)

    def _fault_drain(self) -> None:
        """A rolling restart: drain, hand over, exit, come back."""
        worker = self._pick(self.workers)
        if worker.is_alive and not worker.machine.is_draining:
            self._count("drain", worker.name)
            worker.drain()
            self.world.after(60.0, worker, worker.hand_over)
            self.world.after(100.0, None, self._exit, worker, worker.life)

    def _exit(self, worker: SimWorker, life: int) -> None:
        if worker.is_alive and worker.life == life:
            crash(worker)
            self._drop_prefixes(worker)
            self.world.after(50.0, None, self._restart, worker)

    def _count(self, kind: str, what: str) -> None:
        self.world.log("----", kind, what)
        self.stats.faults[kind] += 1
        self.stats.num_breaks += 1

    def disturb(self, data: bytes, swapped: bytes | None) -> tuple[list[bytes], bytes | None]:
        """What becomes of the next frame: (frames to send now, one to send after the next)."""
        after = [] if swapped is None else [swapped]
        kind = self._disturbances.popleft() if self._disturbances else None
        replayed = list(self._old_frames)[:1]
        self._old_frames.append(data)
        if kind is None or (kind == "replay" and not replayed):
            return [data, *after], None
        self.stats.num_corrupted += 1
        self.stats.faults["corrupt"] += 1
        self.stats.faults[kind] += 1
        self.world.log("----", kind, "a frame of", len(data), "bytes")
        match kind:
            case "flip":
                return [self._flip(data), *after], None
            case "truncate":
                return [data[: self.world.rng.randrange(len(data))], *after], None
            case "lose":
                return after, None
            case "duplicate":
                return [data, data, *after], None
            case "swap":
                return after, data
            case _:
                return [*replayed, data, *after], None

    def _flip(self, data: bytes) -> bytes:
        position = self.world.rng.randrange(len(data) * 8)
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        return bytes(flipped)

    # ── locality ─────────────────────────────────────────────────────────────────────────────────

    def publish(
        self, worker: SimWorker, stored: tuple[BlockHash, ...], removed: tuple[BlockHash, ...]
    ) -> None:
        """What went through Redis: late, and only to gateways that are up."""
        if not stored and not removed:
            return
        for gateway in self.gateways.values():
            self.world.after(
                self.world.delay(), gateway, self._apply, gateway, worker.name, stored, removed
            )

    @staticmethod
    def _apply(
        gateway: SimGateway,
        name: str,
        stored: tuple[BlockHash, ...],
        removed: tuple[BlockHash, ...],
    ) -> None:
        gateway.index.apply(name, BlocksStored(stored))
        gateway.index.apply(name, BlocksRemoved(removed))

    def _drop_prefixes(self, worker: SimWorker) -> None:
        for gateway in self.gateways.values():
            if gateway.is_alive:
                gateway.index.drop(worker.name)

    def worker_at(self, address: str) -> SimWorker | None:
        return self.workers.get(address)

    # ── running ──────────────────────────────────────────────────────────────────────────────────

    def run(self) -> Stats:
        """
        Raises:
            AssertionError: an invariant does not hold, or something never ends.
        """
        if not self.plan.is_calm:
            self.schedule_faults()
        world = self.world
        while not self._is_over():
            assert world.now < PATIENCE_MS, "something never ends:\n" + self._open_ends()
            assert world.num_events < MAX_EVENTS, "something goes round in circles"
            if not world.run_one():
                raise AssertionError("nothing is left to happen:\n" + self._open_ends())
        if self.plan.is_calm:
            self.check_economy()
        for worker in self.workers.values():
            worker.check_clean()
            self.stats.num_computed_tokens += worker.runner.num_tokens_computed
            self.stats.leases += worker.machine.producer.leases.counts
        for gateway in self.gateways.values():
            gateway.check_clean()
        for client in self.clients:
            end = client.end
            name = "lost" if end is None else "ok" if end.cause is None else end.cause.name
            self.stats.outcomes[name] += 1
            if client.machine is not None:
                report = client.machine.report
                self.stats.num_cached_tokens += report.num_cached_tokens
                for one in report.migrations:
                    self.stats.migrations[f"{one.cause} {one.result}"] += 1
                    self.stats.num_migrated_bytes += one.num_bytes
        self.stats.num_events = world.num_events
        return self.stats

    def check_economy(self) -> None:
        """In a calm fleet the path is known: whatever has more to say than its first token was
        handed over; no token's KV was computed twice; a prompt that comes again is remembered."""
        bound = 0
        for client in self.clients:
            machine, name = client.machine, client.request.request_id
            assert machine is not None
            report = machine.report
            num_outputs = sum(len(output) - 1 for output in client.expected)
            if num_outputs and report.prefill_worker != report.decode_worker:
                assert report.path is PrefillPath.REMOTE, f"{name} was not handed over"
                assert sum(stats.num_bytes for stats in report.transfers) > 0, f"{name}: no bytes"
            bound += len(client.request.prompt_token_ids) - report.num_cached_tokens + num_outputs
        computed = sum(worker.runner.num_tokens_computed for worker in self.workers.values())
        assert computed <= bound, f"{computed} tokens were computed where {bound} are enough"
        first, echo = self.clients[0].machine, self.clients[-1].machine
        assert first is not None
        assert echo is not None
        if first.report.prefill_worker == echo.report.prefill_worker:
            assert echo.report.num_cached_tokens > 0, "a prompt that came again was not remembered"

    def _is_over(self) -> bool:
        """Everybody was served and the fleet is at rest."""
        if self.world.now < self.plan.fault_window_ms:
            return False
        for client in self.clients:
            if client.end is None and not client.is_lost:
                return False
        nodes: list[SimWorker | SimGateway] = [*self.workers.values(), *self.gateways.values()]
        if not all(node.is_alive and node.paused_until <= self.world.now for node in nodes):
            return False
        return all(worker.is_idle for worker in self.workers.values())

    def _open_ends(self) -> str:
        lines = [f"request {c.request.request_id}" for c in self.clients if not c.is_over]
        lines += [
            f"worker {w.name}: alive={w.is_alive} machine idle={w.machine.is_idle} "
            f"readers={len(w.readers)} writers={len(w.writers)}"
            for w in self.workers.values()
            if not w.is_alive or not w.is_idle
        ]
        return "\n".join(lines)


def _empty(request: Request) -> list[list[int]]:
    return [[] for _ in range(request.sampling.n)]
