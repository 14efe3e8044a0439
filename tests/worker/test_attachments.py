"""Several readers of one lease, one that hangs, and a prefill worker without room: real engines,
real transports."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import pytest

from baton.kvtransfer.exporter import Exporter
from baton.kvtransfer.lease import LeaseState
from baton.kvtransfer.local import LocalNetwork
from baton.messages import Abort, Admitted, Imported, LeaseLost, NoRoom, Release, Submit
from baton.types import LegId, SamplingParams
from baton.worker import data_plane
from baton.worker.policy import WorkerPolicy
from tests.kvtransfer.support import grpc_end
from tests.worker import gate
from tests.worker.fleet import PATIENCE_S, Answer, Client, LocalWorker, start_worker
from tests.worker.gate import SEEDED, Oracle, Runners, prompt

NUM_BLOCKS = 9
PROMPT_LEN = 112  # seven blocks of the nine
FRAME_BYTES = 512
NUM_CREDIT = 8  # of a fetch
runners, oracle = gate.runners, gate.oracle
Workers = tuple[LocalWorker, LocalWorker, LocalWorker]


class PausedWriter:
    """A decode worker's transfer thread, stopped just before it writes its first frame."""

    def __init__(self, worker: LocalWorker) -> None:
        memory = worker.worker._plane.memory
        self._unpack: Callable[..., None] = memory.unpack
        self._has_begun, self._may_write = threading.Event(), threading.Event()
        memory.unpack = self  # type: ignore[method-assign]

    def __call__(self, *args: Any) -> None:
        self._has_begun.set()
        assert self._may_write.wait(2 * PATIENCE_S)
        self._unpack(*args)

    async def begun(self) -> None:
        assert await asyncio.to_thread(self._has_begun.wait, PATIENCE_S)

    def go_on(self) -> None:
        self._may_write.set()


@pytest.fixture(params=["local", "grpc"])
async def workers(
    request: Any, runners: Runners, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Workers]:
    """P with little room, and two decode workers. Frames are so small that a prompt is more of them
    than a consumer has credit for. Nothing may be left in the end."""
    monkeypatch.setattr(data_plane, "Exporter", partial(Exporter, frame_bytes=FRAME_BYTES))
    network = LocalNetwork()
    loaded = {"p": runners.p[16], "d": runners.d[32], "d2": runners.second}
    async with AsyncExitStack() as stack:
        made = []
        for name, runner in loaded.items():
            transport = None
            if request.param == "grpc":
                transport = await stack.enter_async_context(grpc_end("grpc"))
            worker = await start_worker(
                network,
                name,
                runner,
                WorkerPolicy(lease_watermark=1.0),
                transport,
                eos_token_ids=gate.EOS,
                enable_prefix_caching=False,
                max_num_batched_tokens=PROMPT_LEN,
                **({"num_blocks": NUM_BLOCKS} if name == "p" else {}),
            )
            stack.push_async_callback(worker.close)
            made.append(worker)
        yield made[0], made[1], made[2]
        for worker in made:
            await worker.assert_clean()


async def submit(client: Client, p: LocalWorker, length: int, seed: int) -> tuple[LegId, Answer]:
    """Not answered yet."""
    answer = client.answer(client.request(prompt(length, seed), SamplingParams(**SEEDED)))
    leg = client.leg(answer.request)
    p.send(Submit(leg, answer.request))
    return leg, answer


def lease_state(p: LocalWorker, leg: LegId) -> LeaseState | None:
    return p.worker.runtime.machine.producer.leases.state(leg)


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not is_so():
            await asyncio.sleep(0.01)


async def read_to_the_end(first: LocalWorker, leg: LegId) -> None:
    await first.expect(leg, Imported)


async def give_up(first: LocalWorker, leg: LegId) -> None:
    first.send(Abort(leg))


@pytest.mark.parametrize("late", [read_to_the_end, give_up])
async def test_two_readers_of_one_lease_do_not_touch_each_other(
    workers: Workers, oracle: Oracle, late: Callable[[LocalWorker, LegId], Awaitable[None]]
) -> None:
    """The second attaches while the first is paused. What the first does late, when the second is
    in the middle, ends nothing: P's blocks stay the second one's to read."""
    p, first, second = workers
    client, writers = Client(), (PausedWriter(first), PausedWriter(second))
    answer = client.answer(client.request(prompt(PROMPT_LEN, 1), SamplingParams(**SEEDED)))
    p_leg = await client.prefill(p, answer)
    late_leg = client.bind(p, first, answer)
    await writers[0].begun()
    num_prefilled = p.recorder.num_prefill_tokens
    d_leg = client.bind(p, second, answer)
    await writers[1].begun()
    leases = p.worker.runtime.machine.producer.leases
    assert leases.num_attachments == 2

    writers[0].go_on()
    await late(first, late_leg)
    await until(lambda: leases.num_attachments == 1)
    assert lease_state(p, p_leg) is LeaseState.PINNED
    other, _ = await submit(client, p, PROMPT_LEN, seed=2)
    await p.expect(other, NoRoom)

    writers[1].go_on()
    await client.imported(second, d_leg, answer)
    assert answer.stats is not None
    assert answer.stats.num_tokens == PROMPT_LEN
    await client.first_tokens(p, p_leg, answer)
    await client.tokens(second, d_leg, answer)
    assert answer.token_ids == oracle(answer.request)[0]
    assert p.recorder.num_prefill_tokens == num_prefilled, "nothing is computed twice"
    p.send(Release(p_leg))


async def test_a_stalled_decode_worker_does_not_hold_up_prefills(
    workers: Workers, oracle: Oracle
) -> None:
    p, stalled, other = workers
    client, writer = Client(), PausedWriter(stalled)
    answer = client.answer(client.request(prompt(30, 3), SamplingParams(**SEEDED)))
    p_leg = await client.prefill(p, answer)
    d_leg = client.bind(p, stalled, answer)
    await writer.begun()
    for seed in range(4, 8):
        request = client.request(prompt(80, seed), SamplingParams(**SEEDED))
        assert (await client.disaggregated(p, other, request)).token_ids == oracle(request)[0]
    assert p.worker.runtime.machine.producer.leases.num_attachments == 1, "it still reads"
    writer.go_on()
    await client.imported(stalled, d_leg, answer)
    assert answer.stats is not None
    assert answer.stats.num_frames > NUM_CREDIT, "it had to wait for credit"
    await client.first_tokens(p, p_leg, answer)
    await client.tokens(stalled, d_leg, answer)
    assert answer.token_ids == oracle(answer.request)[0]
    p.send(Release(p_leg))


async def test_under_pressure_retained_leases_go_first_then_there_is_no_room(
    workers: Workers,
) -> None:
    p, d, _ = workers
    client = Client()
    read, answer = await submit(client, p, 48, seed=10)
    answer.ticket = (await p.expect(read, Admitted)).ticket
    await client.imported(d, client.bind(p, d, answer), answer)
    await until(lambda: lease_state(p, read) is LeaseState.RETAINED)
    unread, answer = await submit(client, p, 48, seed=11)
    answer.ticket = (await p.expect(unread, Admitted)).ticket
    await client.first_tokens(p, unread, answer)

    large, _ = await submit(client, p, 80, seed=12)
    await p.expect(large, Admitted)
    await until(lambda: lease_state(p, read) is None)
    lost = [await p.receive(read) for _ in range(p.port.inbox[read].qsize())]
    assert any(isinstance(message, LeaseLost) for message in lost), "the gateway is told"
    assert lease_state(p, unread) is LeaseState.PINNED

    refused, _ = await submit(client, p, 48, seed=13)
    assert (await p.expect(refused, NoRoom)).free_blocks <= NUM_BLOCKS - 8
    await client.imported(d, client.bind(p, d, answer), answer)
