"""The asyncio side: real gRPC sessions to scripted workers."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from baton.config import GatewayConfig
from baton.errors import BatonError, Cause
from baton.gateway.backend import (
    Disaggregation,
    HandOvers,
    PairConflict,
    PrefillPath,
    RequestStream,
    WorkerState,
)
from baton.gateway.orchestrate import Orchestrator
from baton.gateway.sessions import SessionConfig
from baton.messages import Abort, Bind, Release, Submit
from baton.types import BlockHash, Role
from tests.gateway.scripted_worker import ScriptedWorker, token
from tests.gateway.support import request

FAST = SessionConfig(
    heartbeat_s=0.05, silence_s=0.5, max_outgoing=64, min_backoff_s=0.02, max_backoff_s=0.1
)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


class Fleet:
    def __init__(self) -> None:
        config = GatewayConfig.model_validate({"redis_url": "unix:///nonexistent/redis.sock"})
        self.orchestrator = Orchestrator(config, FAST)
        self.workers: dict[str, ScriptedWorker] = {}

    async def add(self, worker_id: str, role: Role, **changes: Any) -> ScriptedWorker:
        """`changes`: to its registration."""
        worker = self.workers[worker_id] = ScriptedWorker(worker_id, role)
        worker.info = replace(worker.info, **changes)
        await worker.start()
        self.orchestrator._discovery.members[worker_id] = worker.info
        self.orchestrator.worker_registered(worker.info)
        return worker

    def state(self, worker_id: str) -> WorkerState:
        view = self.orchestrator.topology()
        return next(worker.state for worker in view.workers if worker.worker_id == worker_id)

    async def up(self) -> None:
        await until(lambda: all(self.state(name) is WorkerState.UP for name in self.workers))

    async def close(self) -> None:
        await self.orchestrator.close()
        await asyncio.gather(*(worker.stop() for worker in self.workers.values()))


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    fleet = Fleet()
    yield fleet
    await fleet.close()
    leftover = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
    names = [task.get_name() for task in leftover]
    assert not [name for name in names if name.startswith(("session", "discovery", "readiness"))]


async def pair(fleet: Fleet) -> tuple[ScriptedWorker, ScriptedWorker]:
    p, d = await fleet.add("p", Role.PREFILL), await fleet.add("d", Role.DECODE)
    await fleet.up()
    return p, d


async def tokens_of(stream: RequestStream) -> list[int]:
    async with asyncio.timeout(20):
        return [token_id async for chunk in stream for token_id in chunk.token_ids]


def expected(count: int = 8) -> list[int]:
    return [token(index) for index in range(count)]


async def test_tokens_come_in_order_over_two_workers(fleet: Fleet) -> None:
    p, d = await pair(fleet)
    assert fleet.orchestrator.topology().hand_overs.state is Disaggregation.UNKNOWN
    stream = fleet.orchestrator.open(request())
    assert await tokens_of(stream) == expected()
    hand_overs = fleet.orchestrator.topology().hand_overs
    assert hand_overs == HandOvers(Disaggregation.HAPPENING, 1, 0)
    report = stream.report
    assert report.path is PrefillPath.REMOTE
    assert (report.prefill_worker, report.decode_worker) == ("p", "d")
    assert [stats.num_bytes for stats in report.transfers] == [4096]
    await until(lambda: any(isinstance(message, Release) for message in p.received))
    (link,) = fleet.orchestrator.topology().links
    assert (link.source, link.target, link.num_transfers, link.num_bytes) == ("p", "d", 1, 4096)
    assert not any(isinstance(message, Abort) for message in d.received)


async def test_ready_is_proven_by_a_request_over_the_route(fleet: Fleet) -> None:
    p, d = await pair(fleet)
    assert not fleet.orchestrator.ready()
    await fleet.orchestrator.start()
    await until(fleet.orchestrator.ready)
    assert [type(message) for message in d.received] == [Bind]
    assert fleet.orchestrator.topology().links[0].num_bytes > 0
    await p.stop()
    await until(lambda: fleet.state("p") is WorkerState.LOST)
    await until(fleet.orchestrator.ready)  # d computes alone, and that is proven too
    fleet.orchestrator.drain()
    assert not fleet.orchestrator.ready()
    with pytest.raises(BatonError) as caught:
        fleet.orchestrator.open(request())
    assert caught.value.cause is Cause.DRAINING


async def test_workers_whose_layouts_cannot_be_converted_are_never_paired(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    """And that is said by name: once in the log, and as long as both are up."""
    p = await fleet.add("p", Role.PREFILL)
    (group,) = p.info.layout.groups
    layout = replace(p.info.layout, groups=(replace(group, head_dim=2 * group.head_dim),))
    d = await fleet.add("d", Role.DECODE, layout=layout)
    await fleet.up()
    await fleet.orchestrator.start()
    await until(fleet.orchestrator.ready)
    reason = f"KV group 0: head_dim {group.head_dim} against {2 * group.head_dim}"
    (conflict,) = fleet.orchestrator.topology().conflicts
    assert conflict == PairConflict("p", "d", Cause.LAYOUT_INCOMPATIBLE, reason)
    assert await tokens_of(fleet.orchestrator.open(request())) == expected()
    assert not any(isinstance(message, Bind) for message in d.received)
    assert caplog.text.count(f"p and d are never paired: {reason}") == 1
    await d.stop()
    await until(lambda: not fleet.orchestrator.topology().conflicts)


async def test_models(fleet: Fleet) -> None:
    assert fleet.orchestrator.models() == ()
    await pair(fleet)
    (model,) = fleet.orchestrator.models()
    assert (model.name, model.max_model_len, model.eos_token_ids) == ("tiny", 1024, (2,))


async def test_n_choices_and_a_stop_string(fleet: Fleet) -> None:
    _, d = await pair(fleet)
    d.hold.clear()
    stream = fleet.orchestrator.open(request(n=2))
    got: dict[int, list[int]] = {0: [], 1: []}
    async with asyncio.timeout(20):
        async for chunk in stream:
            got[chunk.choice] += chunk.token_ids
            if chunk.choice == 0 and not d.hold.is_set():
                stream.finish_choice(0)
                await until(lambda: any(isinstance(m, Bind | Abort) for m in d.received))
                d.hold.set()
    assert got[0] == expected(1)
    assert got[1] == expected()


@pytest.mark.parametrize("how", ["killed", "silent", "session ended"])
async def test_a_lost_decode_worker_is_replaced(fleet: Fleet, how: str) -> None:
    p, d = await pair(fleet)
    d.hold.clear()
    stream = fleet.orchestrator.open(request())
    async with asyncio.timeout(20):
        first = list((await anext(stream)).token_ids)
    await until(lambda: any(isinstance(message, Bind) for message in d.received))
    other = await fleet.add("d2", Role.DECODE)
    await until(lambda: fleet.state("d2") is WorkerState.UP)
    if how == "killed":
        await d.stop()
    elif how == "silent":
        d.is_silent = True
    else:
        d.end_session()
        d.hold.set()
    assert first + await tokens_of(stream) == expected()
    if how != "session ended":
        (bind,) = (message for message in other.received if isinstance(message, Bind))
        assert bind.request.output_token_ids == (tuple(first),)
    assert sum(isinstance(message, Submit) for message in p.received) == 1, "the lease lived on"


async def test_a_session_is_opened_again_after_a_restart_on_the_same_port(fleet: Fleet) -> None:
    _, d = await pair(fleet)
    port = d.port
    await d.stop()
    await until(lambda: fleet.state("d") is WorkerState.LOST)
    await d.start(port)
    await until(lambda: fleet.state("d") is WorkerState.UP)
    assert d.num_sessions == 2
    assert await tokens_of(fleet.orchestrator.open(request())) == expected()


async def test_abort_reaches_both_workers_and_ends_the_stream(fleet: Fleet) -> None:
    p, d = await pair(fleet)
    d.hold.clear()
    stream = fleet.orchestrator.open(request())
    async with asyncio.timeout(20):
        await anext(stream)
    await until(lambda: any(isinstance(message, Bind) for message in d.received))
    stream.abort()
    stream.abort()
    assert await tokens_of(stream) == []
    await until(lambda: any(isinstance(message, Abort) for message in d.received))
    await until(lambda: any(isinstance(message, Release) for message in p.received))


async def test_a_slow_reader_holds_up_nobody(fleet: Fleet) -> None:
    await pair(fleet)
    slow = fleet.orchestrator.open(request(request_id="slow", max_tokens=200))
    quick = fleet.orchestrator.open(request(request_id="quick", max_tokens=200))
    assert await tokens_of(quick) == expected(200)
    assert await tokens_of(slow) == expected(200)


async def test_what_cannot_be_sent_fails_alone(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    p, d = await pair(fleet)
    d.hold.clear()
    running = fleet.orchestrator.open(request(request_id="running"))
    async with asyncio.timeout(20):
        await anext(running)
    bad = fleet.orchestrator.open(request(request_id="lone \ud800 surrogate"))
    with pytest.raises(BatonError) as caught:
        await tokens_of(bad)
    assert caught.value.cause is Cause.INTERNAL
    assert "cannot be sent" in caplog.text
    d.hold.set()
    assert await tokens_of(running) == expected()[1:]
    assert (p.num_sessions, d.num_sessions) == (1, 1)


async def test_a_defect_of_ours_costs_a_session_and_not_the_worker(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = await fleet.add("w", Role.BOTH)
    await fleet.up()

    def explode(*_: object) -> None:
        monkeypatch.undo()
        raise ZeroDivisionError

    monkeypatch.setattr(fleet.orchestrator._dispatcher, "received", explode)
    await until(lambda: worker.num_sessions == 2 and fleet.state("w") is WorkerState.UP)
    assert await tokens_of(fleet.orchestrator.open(request())) == expected()


async def test_nothing_is_up(fleet: Fleet) -> None:
    with pytest.raises(BatonError) as caught:
        fleet.orchestrator.open(request())
    assert caught.value.cause is Cause.NO_WORKER


async def test_the_last_worker_dies_and_comes_back(fleet: Fleet) -> None:
    worker = await fleet.add("w", Role.BOTH)
    await fleet.up()
    worker.hold.clear()
    stream = fleet.orchestrator.open(request())
    async with asyncio.timeout(20):
        first = (await anext(stream)).token_ids[0]
    port = worker.port
    await worker.stop()
    await until(lambda: fleet.state("w") is WorkerState.LOST)
    worker.hold.set()
    await worker.start(port)
    assert [first, *await tokens_of(stream)] == expected()


async def test_closing_cuts_open_streams(fleet: Fleet) -> None:
    worker = await fleet.add("w", Role.BOTH)
    await fleet.up()
    worker.hold.clear()
    stream = fleet.orchestrator.open(request())
    reading: Awaitable[list[int]] = asyncio.create_task(tokens_of(stream))
    await fleet.orchestrator.close()
    with pytest.raises(BatonError) as caught:
        await reading
    assert caught.value.cause is Cause.CANCELLED


async def test_a_foreign_hello_is_refused(fleet: Fleet) -> None:
    worker = ScriptedWorker("w", Role.BOTH)
    await worker.start()
    fleet.workers["w"] = worker
    registered = worker.info
    worker.info = ScriptedWorker("other", Role.BOTH).info
    fleet.orchestrator.worker_registered(registered)
    await until(lambda: worker.num_sessions >= 3)
    assert fleet.state("w") is WorkerState.CONNECTING


async def test_inventory(fleet: Fleet) -> None:
    worker = await fleet.add("w", Role.BOTH)
    worker.hashes = [BlockHash(bytes([i]) * 32) for i in range(3)]
    assert await fleet.orchestrator.inventory(worker.info) == (7, worker.hashes)
    worker.hashes = [BlockHash(b"short")]
    with pytest.raises(BatonError) as caught:
        await fleet.orchestrator.inventory(worker.info)
    assert caught.value.cause is Cause.PROTOCOL


async def test_unregistered_and_lost_workers_vanish(fleet: Fleet) -> None:
    worker = await fleet.add("w", Role.BOTH)
    await fleet.up()
    fleet.orchestrator.worker_unregistered(worker.info)
    assert fleet.state("w") is WorkerState.UP, "a live session outlives its registration"
    del fleet.orchestrator._discovery.members["w"]
    await worker.stop()
    await until(lambda: not fleet.orchestrator.topology().workers)
