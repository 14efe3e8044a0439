"""The worker machine where sequences decode: bound, fetched, computed, ended."""

from dataclasses import replace

import pytest

from baton.engine import commands
from baton.engine.events import (
    KVReserved,
    LegRefused,
    PrefillProgress,
)
from baton.errors import Cause
from baton.kvtransfer.effects import (
    CancelFetch,
)
from baton.messages import (
    Abort,
    Bind,
    ComputeLocally,
    Failed,
    Heartbeat,
    Imported,
    KvFailed,
    NoRoom,
    Progress,
    Rebind,
)
from baton.types import (
    KVRange,
    KVTicket,
    TokenChunk,
)
from baton.worker.effects import FetchKV
from baton.worker.machine import WorkerMachine
from baton.worker.policy import WorkerPolicy
from tests.worker.machines import (
    BLOCKS,
    PROMPT,
    S1,
    STATS,
    TRANSPORTS,
    D,
    P,
    admit_elsewhere,
    bound,
    machine,
    only,
    posted,
    request,
    step,
    token,
    told,
)

__all__ = ["machine"]


def test_a_decode_from_bind_to_the_last_token(machine: WorkerMachine) -> None:
    ticket = admit_elsewhere()
    effects = machine.receive(S1, Bind(D, request(), ticket, TRANSPORTS, "h"), 0)
    assert posted(effects) == [commands.AddDecode(D, request(), len(PROMPT))]
    fetch = only(step(machine, KVReserved(D, BLOCKS, len(PROMPT), 16)), FetchKV)
    assert fetch.fetch.range == KVRange(0, 2, 16, 40)
    assert fetch.block_ids == BLOCKS
    effects = machine.fetch_ended(D, STATS, [token(P, 9).chunk], 0)
    assert posted(effects) == [commands.KVImported(D, (token(D, 9).chunk,))]
    assert told(effects) == [Imported(D, STATS)]
    step(machine, token(D, 9), token(D, 10, start=1, end=True))
    assert machine.is_idle
    assert machine.receive(S1, Abort(D), 0) == []


def test_a_ticket_for_another_request_is_refused_at_bind(machine: WorkerMachine) -> None:
    other = request(prompt_token_ids=(*PROMPT[:-1], 99))
    effects = machine.receive(S1, Bind(D, other, admit_elsewhere(), TRANSPORTS, "h"), 0)
    (refusal,) = told(effects)
    assert isinstance(refusal, Failed)
    assert refusal.cause is Cause.TOKENS_MISMATCH
    assert posted(effects) == []
    assert machine.is_idle


def test_no_room_at_bind_holds_nothing(machine: WorkerMachine) -> None:
    machine.receive(S1, Bind(D, request(), admit_elsewhere(), TRANSPORTS, "h"), 0)
    (refusal,) = told(step(machine, LegRefused(D, 2)))
    assert refusal == NoRoom(D, 2, WorkerPolicy().retry_after_ms)
    assert machine.is_idle


def test_a_failed_fetch_is_told_and_refetched(machine: WorkerMachine) -> None:
    fetch = bound(machine)
    effects = machine.fetch_failed(D, 32, Cause.FRAME_CORRUPT, "checksum", 0)
    assert told(effects) == [KvFailed(D, 32, Cause.FRAME_CORRUPT, "checksum")]
    assert posted(effects) == [commands.KVFailed(D, 32)]
    again = machine.receive(S1, Rebind(D, fetch.fetch.source, TRANSPORTS, "h"), 0)
    assert only(again, FetchKV).fetch.range.token_start == 32


def test_a_ticket_for_another_request_is_refused_at_rebind(machine: WorkerMachine) -> None:
    ticket = bound(machine).fetch.source
    assert isinstance(ticket, KVTicket)
    machine.fetch_failed(D, 32, Cause.FRAME_CORRUPT, "checksum", 0)
    other = replace(ticket, tokens_digest=b"x" * 32)
    effects = machine.receive(S1, Rebind(D, other, TRANSPORTS, "h"), 0)
    assert not [effect for effect in effects if isinstance(effect, FetchKV)]
    (refusal,) = told(effects)
    assert isinstance(refusal, Failed)
    assert refusal.cause is Cause.TOKENS_MISMATCH


def test_a_failed_fetch_is_computed_locally(machine: WorkerMachine) -> None:
    bound(machine)
    machine.fetch_failed(D, 32, Cause.TRANSPORT_FAILED, "", 0)
    effects = machine.receive(S1, ComputeLocally(D, request()), 0)
    assert posted(effects) == [commands.ComputeHere(D)]
    assert told(step(machine, PrefillProgress(D, 40))) == [Progress(D, 40, 0.0)]
    step(machine, token(D, 9, end=True))
    assert machine.is_idle


def test_a_decision_may_come_before_the_fetch_has_failed(machine: WorkerMachine) -> None:
    bound(machine)
    effects = machine.receive(S1, ComputeLocally(D, request()), 0)
    assert only(effects, CancelFetch).leg == D
    effects = machine.fetch_failed(D, 16, Cause.CANCELLED, "", 0)
    assert posted(effects) == [commands.KVFailed(D, 16), commands.ComputeHere(D)]
    assert told(effects) == []


def test_undecided_legs_end(machine: WorkerMachine) -> None:
    bound(machine)
    machine.fetch_failed(D, 16, Cause.TRANSPORT_FAILED, "", 0)
    now_ms = WorkerPolicy().decide_ms
    machine.receive(S1, Heartbeat(1), now_ms)
    effects = machine.tick(now_ms)
    assert posted(effects) == [commands.Abort(D)]
    (failed,) = told(effects)
    assert isinstance(failed, Failed)
    assert failed.cause is Cause.DEADLINE_EXCEEDED


@pytest.mark.parametrize(
    "chunks",
    [
        [],
        [token(P, 9, choice=1).chunk],
        [token(P, 9, start=1).chunk],
        [token(P, 1000).chunk],
        [token(P, 9).chunk, token(P, 9).chunk],
    ],
)
def test_first_tokens_that_make_no_sense_fail_the_fetch(
    machine: WorkerMachine, chunks: list[TokenChunk]
) -> None:
    bound(machine)
    (told_failed,) = told(machine.fetch_ended(D, STATS, chunks, 0))
    assert isinstance(told_failed, KvFailed)
    assert (told_failed.valid_tokens, told_failed.cause) == (40, Cause.PROTOCOL)


def test_aborting_the_last_choice_during_a_fetch_waits_for_the_writer(
    machine: WorkerMachine,
) -> None:
    bound(machine, n=2)
    assert posted(machine.receive(S1, Abort(D, 0), 0)) == [commands.Abort(D, 0)]
    effects = machine.receive(S1, Abort(D, 1), 0)
    assert posted(effects) == [commands.Abort(D, in_flight=True)]
    effects = machine.fetch_ended(D, STATS, [], 0)
    assert posted(effects) == [commands.Quiesced(D)]
    assert machine.is_idle
