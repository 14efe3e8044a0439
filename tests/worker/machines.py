"""A worker machine without I/O, and what is said to it in most tests."""

from dataclasses import replace
from typing import TypeVar

import pytest

from baton.engine import commands
from baton.engine.events import (
    KVReserved,
    LegAdmitted,
    LegEvent,
    LegTokens,
    StepOutput,
)
from baton.grants import GrantKeys
from baton.hashing import salt_digest, tokens_digest
from baton.kvtransfer.base import FetchOpen
from baton.kvtransfer.ticket import TicketKeyring
from baton.messages import (
    Admitted,
    Bind,
    Bound,
    LegMessage,
    StepBatch,
    Submit,
)
from baton.types import (
    BlockId,
    FinishReason,
    KVGroup,
    KVKind,
    KVLayout,
    KVRange,
    KVTicket,
    LegId,
    Request,
    Role,
    SamplingParams,
    TokenChunk,
    TransferStats,
    TransportAddress,
    WorkerInfo,
    WorkerSnapshot,
)
from baton.worker.effects import Effect, FetchKV, Post, Send, SessionId
from baton.worker.machine import WorkerMachine
from baton.worker.policy import WorkerPolicy

S1, S2 = SessionId(1), SessionId(2)
P, D = LegId("r", 1), LegId("r", 2)
LAYOUT = KVLayout((KVGroup(KVKind.FULL, 2, 1, 4, "float32"),), block_size=16)
PROMPT = tuple(range(40))
BLOCKS = tuple(BlockId(i) for i in (3, 5, 7))
TRANSPORTS = (TransportAddress("local", "p"),)
STATS = TransferStats("local", num_bytes=640, num_frames=2, num_tokens=40, duration_ms=1.0)
T = TypeVar("T")


class LinearPredictor:
    def prefill_ms(self, num_uncached_tokens: int, num_cached_tokens: int = 0) -> float:
        return float(num_uncached_tokens)


def info(worker_id: str = "w", num_blocks: int = 10) -> WorkerInfo:
    return WorkerInfo(
        worker_id=worker_id,
        incarnation=b"i" * 16,
        role=Role.BOTH,
        model="m",
        fingerprint=b"f" * 32,
        layout=LAYOUT,
        address="127.0.0.1:1",
        transports=TRANSPORTS,
        host_id="h",
        pid=1,
        device="cpu",
        num_blocks=num_blocks,
        max_model_len=128,
        max_num_seqs=8,
        vocab_size=1000,
        eos_token_ids=(0,),
    )


def request(n: int = 1, **changes: object) -> Request:
    sampling = SamplingParams(n=n, seed=1, max_tokens=8)
    return replace(Request("r", PROMPT, sampling), **changes)  # type: ignore[arg-type]


def make_machine(num_blocks: int = 10) -> WorkerMachine:
    ids = iter(range(1, 1000))
    machine = WorkerMachine(
        info(num_blocks=num_blocks),
        WorkerPolicy(),
        TicketKeyring(b"k" * 32),
        LinearPredictor(),
        GrantKeys("test", ()),
        first_epoch=100,
        random_id=lambda: next(ids).to_bytes(16, "little"),
    )
    machine.session_opened(S1, 0)
    return machine


@pytest.fixture
def machine() -> WorkerMachine:
    return make_machine()


def step(machine: WorkerMachine, *events: LegEvent, now_ms: int = 0) -> list[Effect]:
    snapshot = WorkerSnapshot(Role.BOTH, free_blocks=6, total_blocks=10)
    effects = machine.step(StepOutput(events, snapshot, None), now_ms)
    machine.check_integrity()
    return effects


def told(effects: list[Effect], session: SessionId = S1) -> list[LegMessage]:
    """All messages to one session, which must be one batch."""
    batches = [e.message for e in effects if isinstance(e, Send) and e.session == session]
    assert len(batches) <= 1
    if not batches:
        return []
    assert isinstance(batches[0], StepBatch)
    return list(batches[0].messages)


def posted(effects: list[Effect]) -> list[commands.Command]:
    return [e.command for e in effects if isinstance(e, Post)]


def only(effects: list[Effect], kind: type[T]) -> T:
    (found,) = (e for e in effects if isinstance(e, kind))
    return found


def token(
    leg: LegId, token_id: int, choice: int = 0, start: int = 0, end: bool = False
) -> LegTokens:
    reason = FinishReason.LENGTH if end else None
    return LegTokens(TokenChunk(leg, choice, start, (token_id,), finish_reason=reason))


def admit(machine: WorkerMachine, leg: LegId = P, session: SessionId = S1, n: int = 1) -> KVTicket:
    """Submit and let the engine reserve the blocks."""
    machine.receive(session, Submit(leg, request(n)), 0)
    (admitted,) = told(step(machine, LegAdmitted(leg, BLOCKS, len(PROMPT), 16)), session)
    assert isinstance(admitted, Admitted)
    assert admitted.ticket is not None
    return admitted.ticket


def fetch_open(ticket: KVTicket, token_start: int = 0) -> FetchOpen:
    return FetchOpen(
        source=ticket,
        range=KVRange(0, 2, token_start, len(PROMPT)),
        layout=replace(LAYOUT, block_size=32),
        fingerprint=b"f" * 32,
        tokens_digest=tokens_digest(PROMPT),
        salt_digest=salt_digest(b""),
        consumer="d",
    )


def bound(machine: WorkerMachine, n: int = 1) -> FetchKV:
    """Bind and let the engine reserve; the fetch that follows."""
    machine.receive(S1, Bind(D, request(n), admit_elsewhere(n), TRANSPORTS, "h"), 0)
    effects = step(machine, KVReserved(D, BLOCKS, len(PROMPT), 16))
    assert told(effects) == [Bound(D, 16)]
    return only(effects, FetchKV)


def admit_elsewhere(n: int = 1) -> KVTicket:
    return admit(make_machine(), n=n)
