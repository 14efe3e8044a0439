"""A block is not reused while a slow writer or reader is still at it: real engines, real
transports. The same scenes with the quarantine switched off must go wrong, or they prove nothing.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.engine.commands import AddLocal
from baton.engine.events import LegTokens
from baton.engine.runner import ModelRunner
from baton.errors import Cause
from baton.kvtransfer.local import LocalNetwork
from baton.messages import Abort, Admitted, ComputeLocally, KvFailed, Release
from baton.types import LegId, Request, SamplingParams
from tests.engine.tiny_models import load_tiny_runner, make_core, random_prompts, save_tiny_model
from tests.kvtransfer.support import grpc_end
from tests.sim.mutations import quarantine_off
from tests.worker.fleet import Client, LocalWorker, start_worker

NUM_BLOCKS = 9
PROMPT_LEN = 112  # seven blocks of the nine
SAMPLING = SamplingParams(temperature=0.0, seed=0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), "qwen3")


def load(folder: Path) -> ModelRunner:
    return load_tiny_runner(folder, block_size=16, dtype="float32", batch_invariant=True)


class Slow:
    """A transfer thread that stops just before it packs or unpacks its first frame."""

    def __init__(self, copy: Callable[..., Any]) -> None:
        self.has_begun = threading.Event()
        self.may_go_on = threading.Event()
        self._copy = copy

    def __call__(self, *args: Any) -> Any:
        self.has_begun.set()
        assert self.may_go_on.wait(60)
        return self._copy(*args)


@pytest.fixture(params=["local", "grpc"])
async def workers(request: Any, folder: Path) -> AsyncIterator[tuple[LocalWorker, LocalWorker]]:
    network = LocalNetwork()
    async with AsyncExitStack() as stack:
        made = []
        for name in ("p", "d"):
            runner = load(folder)
            stack.callback(runner.close)
            transport = None
            if request.param == "grpc":
                transport = await stack.enter_async_context(grpc_end("grpc"))
            options = {"num_blocks": NUM_BLOCKS, "enable_prefix_caching": False}
            worker = await start_worker(network, name, runner, transport=transport, **options)
            stack.push_async_callback(worker.close)
            made.append(worker)
        yield made[0], made[1]


def oracle(folder: Path, request: Request) -> list[int]:
    runner = load(folder)
    core = make_core(runner, enable_prefix_caching=False)
    core.apply(AddLocal(LegId(request.request_id, 0), request))
    tokens: list[int] = []
    while core.has_work:
        output = core.step()
        for event in output.events if output is not None else ():
            tokens += event.chunk.token_ids if isinstance(event, LegTokens) else ()
    runner.close()
    return tokens


async def reuse_while_writing(p: LocalWorker, d: LocalWorker, expected: list[int]) -> None:
    """A fetch is aborted in the middle of a write; a second request needs the same blocks.

    Raises:
        AssertionError: the late write went into the second request's KV.
    """
    client = Client()
    prompts = random_prompts(PROMPT_LEN, PROMPT_LEN, seed=3)
    memory = d.worker._plane.memory
    writer = Slow(memory.unpack)
    memory.unpack = writer  # type: ignore[method-assign]
    answer = client.answer(client.request(prompts[0], SAMPLING))
    p_leg = await client.prefill(p, answer)
    d_leg = client.bind(p, d, answer)
    assert await asyncio.to_thread(writer.has_begun.wait, 30)
    d.send(Abort(d_leg))
    p.send(Release(p_leg))
    second = client.answer(client.request(prompts[1], SAMPLING))
    leg = client.leg(second.request)
    d.send(ComputeLocally(leg, second.request))
    try:
        async with asyncio.timeout(1.0):
            await d.expect(leg, Admitted)
    except TimeoutError:
        assert d.core.pool.num_quarantined > 0
        writer.may_go_on.set()
        await d.expect(leg, Admitted)
    await client.tokens(d, leg, second, at_least=2)
    writer.may_go_on.set()
    await client.tokens(d, leg, second)
    assert second.token_ids[0] == expected


async def reuse_while_reading(p: LocalWorker, d: LocalWorker, expected: list[int]) -> None:
    """A lease ends in the middle of a read; a second request needs the same blocks.

    Raises:
        AssertionError: they have a new owner before the reader has stopped.
    """
    client = Client()
    prompts = random_prompts(PROMPT_LEN, PROMPT_LEN, seed=3)
    memory = p.worker._plane.memory
    reader = Slow(memory.pack)
    memory.pack = reader  # type: ignore[method-assign]
    answer = client.answer(client.request(prompts[0], SAMPLING))
    p_leg = await client.prefill(p, answer)
    d_leg = client.bind(p, d, answer)
    assert await asyncio.to_thread(reader.has_begun.wait, 30)
    await client.first_tokens(p, p_leg, answer)
    p.send(Release(p_leg))
    second = client.answer(client.request(prompts[1], SAMPLING))
    leg = client.leg(second.request)
    p.send(ComputeLocally(leg, second.request))
    try:
        async with asyncio.timeout(1.0):
            await p.expect(leg, Admitted)
        raise AssertionError("the blocks have a new owner while they are read")
    except TimeoutError:
        assert p.core.pool.num_quarantined > 0
    finally:
        reader.may_go_on.set()
    await p.expect(leg, Admitted)
    await client.tokens(p, leg, second)
    assert second.token_ids[0] == expected
    assert (await d.expect(d_leg, KvFailed)).cause is Cause.LEASE_UNKNOWN
    d.send(Abort(d_leg))


SCENES = [reuse_while_writing, reuse_while_reading]
Scene = Callable[[LocalWorker, LocalWorker, list[int]], Awaitable[None]]


@pytest.fixture
def expected(folder: Path) -> list[int]:
    prompts = random_prompts(PROMPT_LEN, PROMPT_LEN, seed=3)
    return oracle(folder, Client().request(prompts[1], SAMPLING))


@pytest.mark.parametrize("scene", SCENES)
async def test_blocks_wait_for_their_writer_or_reader(
    workers: tuple[LocalWorker, LocalWorker], expected: list[int], scene: Scene
) -> None:
    await scene(*workers, expected)
    for worker in workers:
        await worker.assert_clean()


@pytest.mark.parametrize("scene", SCENES)
async def test_without_the_quarantine_they_do_not(
    workers: tuple[LocalWorker, LocalWorker], expected: list[int], scene: Scene
) -> None:
    with quarantine_off(), pytest.raises(AssertionError):
        await scene(*workers, expected)
