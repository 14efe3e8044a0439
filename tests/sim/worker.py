"""A worker process in the simulator: the real machine and engine; thread, sockets and model are
events."""

import hashlib
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from baton.engine.batch import Batch, OnLayers, Sampled
from baton.engine.commands import Command
from baton.engine.config import EngineConfig
from baton.engine.core import EngineCore
from baton.engine.events import StepOutput
from baton.engine.null_runner import NullModel, NullRunner
from baton.grants import GrantKeys
from baton.kvtransfer.effects import (
    AttachGranted,
    AttachmentReady,
    AttachmentSampled,
    AttachRefused,
    CancelFetch,
    CutAttachment,
)
from baton.kvtransfer.ticket import TicketKeyring
from baton.latency import LatencyModel
from baton.messages import StepBatch
from baton.types import (
    FETCH_BY_HASH,
    BlockId,
    KVGroup,
    KVKind,
    KVLayout,
    KVRange,
    LegId,
    Role,
    TransportAddress,
    WorkerInfo,
)
from baton.worker.effects import CloseSession, Effect, FetchKV, Post, Send, SessionId
from baton.worker.machine import WorkerMachine
from baton.worker.policy import WorkerPolicy
from tests.sim.data_plane import Reader, SimMemory, Writer
from tests.sim.world import Conn, Node, World

if TYPE_CHECKING:
    from tests.sim.fleet import SimFleet

VOCAB_SIZE = 1000
EOS = (7,)
MAX_MODEL_LEN = 256
FINGERPRINT = hashlib.sha256(b"null model").digest()
NUM_LAYERS = 3
BUSY_TICK_MS, IDLE_TICK_MS = 100, 500


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    name: str
    role: Role
    num_blocks: int
    block_size: int
    chunk_tokens: int
    max_num_seqs: int


class SlowRunner(NullRunner):
    """Raises once when told to, in the middle of a step. What it computes for a layer is in the
    pool only when the clock says so: `run` answers at once, `write_layer` brings the KV."""

    is_armed = False

    def __init__(self, num_blocks: int, block_size: int, model: NullModel) -> None:
        super().__init__(num_blocks, block_size, model, NUM_LAYERS)
        self.num_layers_run = 0
        self._is_running = False
        # Of the steps that run: (layer, blocks, first token, its KV), and what was there before.
        self._writes: list[tuple[int, list[BlockId], int, Sequence[int]]] = []
        self._before: list[tuple[int, list[BlockId], int, Sequence[int]]] = []

    def run(
        self, batch: Batch, on_layers: OnLayers | None = None
    ) -> dict[int, tuple[Sampled, ...]]:
        def layer_done(num_layers: int) -> None:
            self.num_layers_run = num_layers
            if on_layers is not None:
                on_layers(num_layers)
            if self.is_armed:
                self.is_armed = False
                raise RuntimeError("injected")

        self.num_layers_run, self._is_running = 0, True
        try:
            return super().run(batch, layer_done)
        finally:
            self._is_running = False
            while self._before:
                layer, block_ids, start, values = self._before.pop()
                super().import_kv(block_ids, start, values, layer)

    def import_kv(
        self, block_ids: Sequence[BlockId], start: int, values: Sequence[int], layer: int = 0
    ) -> None:
        if self._is_running:
            blocks = list(block_ids)
            self._writes.append((layer, blocks, start, values))
            before = self.export_kv(blocks, start, start + len(values), layer)
            self._before.append((layer, blocks, start, before))
        super().import_kv(block_ids, start, values, layer)

    def write_layer(self, layer: int) -> None:
        if not self._writes:
            return
        due = [write for write in self._writes if write[0] == layer]
        self._writes = [write for write in self._writes if write[0] != layer]
        for _, block_ids, start, values in due:
            super().import_kv(block_ids, start, values, layer)


class _GatewayEnd:
    """The worker's end of a session."""

    def __init__(self, worker: "SimWorker", session: SessionId) -> None:
        self._worker = worker
        self._session = session

    def received(self, message: Any) -> None:
        worker = self._worker
        worker.passes(type(message).__name__)
        worker.carry_out(worker.machine.receive(self._session, message, worker.world.now_ms))

    def closed(self, reason: str) -> None:
        worker = self._worker
        worker.sessions.pop(self._session, None)
        worker.carry_out(worker.machine.session_lost(self._session, worker.world.now_ms))


class SimWorker(Node):
    machine: WorkerMachine
    core: EngineCore
    runner: SlowRunner
    memory: SimMemory

    def __init__(self, world: World, fleet: "SimFleet", spec: WorkerSpec, model: NullModel) -> None:
        super().__init__(world, spec.name)
        self.fleet = fleet
        self.spec = spec
        self._model = model
        self._num_keys = 0
        self._num_starts = 0
        self.slowness = 1.0  # its steps take so many times longer

    # ── life ─────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """A new process: nothing of the one before is left."""
        spec, rng = self.spec, self.world.rng
        self._num_starts += 1
        self.is_alive = True
        self.info = self._describe()
        config = EngineConfig(
            num_blocks=spec.num_blocks,
            block_size=spec.block_size,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=spec.max_num_seqs,
            max_num_batched_tokens=spec.chunk_tokens,
            eos_token_ids=EOS,
            vocab_size=VOCAB_SIZE,
            num_layers=NUM_LAYERS,
            fingerprint=FINGERPRINT,
            role=spec.role,
        )
        self.runner = SlowRunner(spec.num_blocks, spec.block_size, self._model)
        self.core = EngineCore(config, self.runner, clock=lambda: self.world.now / 1e3)
        self.core.on_kv_ready = self._on_kv_ready
        self._marks: list[tuple[int, LegId, KVRange]] = []  # after how many layers
        self.memory = SimMemory(self.runner, self.info.layout)
        policy = WorkerPolicy(
            role=spec.role,
            lease_ttl_ms=4_000 if self.fleet.plan.is_calm else rng.choice([120, 4_000]),
            lease_idle_ms=rng.choice([50, 1_000]),
            attachment_stall_ms=800,
            fetch_stall_ms=1_500,
            decide_ms=3_000,
        )
        self.machine = WorkerMachine(
            self.info,
            policy,
            TicketKeyring(rng.randbytes(32)),
            LatencyModel(),
            GrantKeys("sim", ()),
            first_epoch=rng.getrandbits(64),
            random_id=lambda: rng.randbytes(16),
        )
        self.commands: deque[Command] = deque()
        self._effects: deque[Effect] = deque()
        self._is_carrying_out = False
        self.sessions: dict[SessionId, Conn] = {}
        self.readers_by_key: dict[int, Reader] = {}
        self.readers: dict[int, Reader] = {}
        self.writers: dict[LegId, Writer] = {}
        self._is_stepping = False
        self._is_core_changed = False
        self.world.after(BUSY_TICK_MS, self, self._tick)

    def _describe(self) -> WorkerInfo:
        spec = self.spec
        group = KVGroup(KVKind.FULL, NUM_LAYERS, num_kv_heads=1, head_dim=1, dtype="float32")
        address = TransportAddress("sim", spec.name)
        return WorkerInfo(
            worker_id=spec.name,
            incarnation=f"{spec.name}/{self._num_starts}".ljust(16).encode()[:16],
            role=spec.role,
            model="null",
            fingerprint=FINGERPRINT,
            layout=KVLayout((group,), spec.block_size),
            address=spec.name,
            transports=(address,),
            host_id="sim",
            pid=self._num_starts,
            device="cpu",
            num_blocks=spec.num_blocks,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=spec.max_num_seqs,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=EOS,
            capabilities=frozenset({FETCH_BY_HASH}),
        )

    def accept(self, conn: Conn) -> None:
        """A gateway has connected."""
        session = SessionId(self.next_key())
        self.sessions[session] = conn
        conn.ends[1] = _GatewayEnd(self, session)
        self.carry_out(self.machine.session_opened(session, self.world.now_ms))

    def drain(self) -> None:
        self.carry_out(self.machine.drain(self.world.now_ms))

    def hand_over(self) -> None:
        self.carry_out(self.machine.hand_over(self.world.now_ms))

    def passes(self, step: str) -> None:
        """A place where a test may strike.

        Raises:
            Died: it did.
        """
        self.fleet.strike(self, step)

    def next_key(self) -> int:
        self._num_keys += 1
        return self._num_keys

    def _tick(self) -> None:
        self.carry_out(self.machine.tick(self.world.now_ms))
        self.world.after(IDLE_TICK_MS if self.is_idle else BUSY_TICK_MS, self, self._tick)

    # ── effects of the machine ───────────────────────────────────────────────────────────────────

    def carry_out(self, effects: Iterable[Effect]) -> None:
        """In order: what an effect leads to comes after the effects that were there before it."""
        self._effects.extend(effects)
        if self._is_carrying_out:
            return
        self._is_carrying_out = True
        while self._effects:
            self._carry_out_one(self._effects.popleft())
        self._is_carrying_out = False
        self._kick()

    def _carry_out_one(self, effect: Effect) -> None:
        match effect:
            case Send(session, message):
                for item in message.messages if isinstance(message, StepBatch) else ():
                    self.passes(type(item).__name__)
                if session in self.sessions:
                    self.sessions[session].send(1, message)
            case CloseSession(session, _, detail):
                conn = self.sessions.pop(session, None)
                if conn is not None:
                    conn.close(1, detail)
            case Post(command):
                self.world.log(self.name, command)
                self.commands.append(command)
            case FetchKV(leg):
                self.writers[leg] = Writer(self, effect)
            case CancelFetch(leg):
                self.writers[leg].cancel()
            case _:
                self._tell_readers(effect)

    def _tell_readers(self, effect: Effect) -> None:
        match effect:
            case AttachGranted(key):
                self.readers_by_key[key].granted(effect)
            case AttachRefused(key, cause, detail):
                self.readers_by_key[key].refused(cause, detail)
            case AttachmentReady(epochs, ready):
                for epoch in epochs:
                    self.readers[epoch].ready(ready)
            case AttachmentSampled(epochs, first_tokens):
                for epoch in epochs:
                    self.readers[epoch].sampled(first_tokens)
            case CutAttachment(epoch, cause, detail):
                self.readers[epoch].cut(cause, detail)

    # ── the engine thread ────────────────────────────────────────────────────────────────────────

    def _kick(self) -> None:
        if not self._is_stepping and (self.commands or self.core.has_work):
            self._is_stepping = True
            self.world.after(0.0, self, self._begin_step)

    def _begin_step(self) -> None:
        while self.commands:
            self.core.apply(self.commands.popleft())
        if not self.core.has_work:
            self._is_stepping = False
            return
        early, self._marks = self.core.begin(), []
        output = self.core.compute()
        self._is_core_changed = True
        duration_ms = 0.1
        if early is not None:
            self.world.after(0.05, self, self._tell, early)
        if output is not None and output.timing is not None:
            timing = output.timing
            duration_ms = 1.0 + 0.1 * timing.num_prefill_tokens + 0.3 * timing.num_decodes
            duration_ms *= self.slowness
            output = replace(output, timing=replace(timing, duration_ms=duration_ms))
            for layer in range(NUM_LAYERS) if self._marks else ():
                at_ms = duration_ms * (layer + 1) / (NUM_LAYERS + 1)
                marks = [mark for mark in self._marks if mark[0] == layer + 1]
                self.world.after(at_ms, self, self._end_layer, layer, marks)
        self.world.after(duration_ms, self, self._end_step, output)

    def _on_kv_ready(self, leg: LegId, where: KVRange) -> None:
        self._marks.append((self.runner.num_layers_run, leg, where))

    def _end_layer(self, layer: int, marks: list[tuple[int, LegId, KVRange]]) -> None:
        self.runner.write_layer(layer)
        for _, leg, where in marks:
            self.carry_out(self.machine.layers_ready(leg, where, self.world.now_ms))

    def _end_step(self, output: StepOutput | None) -> None:
        self._is_stepping = False
        for layer in range(NUM_LAYERS):  # those that nobody was told of
            self.runner.write_layer(layer)
        if output is not None:
            self._tell(output)
        self._kick()

    def _tell(self, output: StepOutput) -> None:
        self.fleet.publish(self, output.stored, output.removed)
        self.carry_out(self.machine.step(output, self.world.now_ms))

    # ── invariants ───────────────────────────────────────────────────────────────────────────────

    @property
    def is_idle(self) -> bool:
        busy = self.commands or self.readers or self.readers_by_key or self.writers
        return self.machine.is_idle and not busy and not self.core.has_work

    def check(self) -> None:
        self.machine.check_integrity()
        if self._is_core_changed:
            self._is_core_changed = False
            self.core.check_integrity()
        for reader in self.readers.values():
            if reader.leg is None:
                pinned = self.core.pool._pins[reader.key]
                assert set(reader.block_ids) == set(pinned), "read, and not pinned"
            else:
                self._check_owned(reader.leg, reader.block_ids, "read")
        for writer in self.writers.values():
            self._check_owned(writer.leg, writer.block_ids, "written")

    def check_writer(self, writer: Writer) -> None:
        """Just before a write lands."""
        self._check_owned(writer.leg, writer.block_ids, "written")

    def _check_owned(self, leg: LegId, block_ids: tuple[BlockId, ...], what: str) -> None:
        """While a transfer is under way its blocks are the leg's own, or in its quarantine."""
        record = self.core._legs.get(leg)
        owned: set[BlockId] = set(self.core.pool._quarantine.get(leg, ()))
        if record is not None:
            for sequence in record.sequences():
                owned.update(sequence.block_ids)
        assert owned.issuperset(block_ids), (
            f"blocks {sorted(set(block_ids) - owned)} of {leg} are being {what}, "
            "and somebody else may have them"
        )

    def check_clean(self) -> None:
        """At the end of everything nothing is held."""
        assert self.is_idle, f"{self.name} is not idle"
        assert self.core.pool.num_free == self.spec.num_blocks, f"{self.name} leaks blocks"
        assert self.core.pool.num_quarantined == 0, f"{self.name} leaks quarantined blocks"
        assert not list(self.core._legs), f"{self.name} leaks legs"
        assert not self.core.pool._pins, f"{self.name} leaks pins"
        self.core.check_integrity()
