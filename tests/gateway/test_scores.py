"""Whom the gateway asks for scores, and what a job does with them."""

import asyncio
from dataclasses import replace

import pytest

from baton.errors import BatonError, Cause, InvalidRequest
from baton.gateway.backend import ServedModel
from baton.gateway.logprobs import LogprobWriter
from baton.gateway.scores import MAX_ENTRIES, PromptScores, score
from baton.gateway.workers import Worker
from baton.types import Logprobs, Request, Role, SamplingParams, WorkerInfo, WorkerSnapshot
from tests.gateway.fakes import FakeBackend
from tests.gateway.support import worker_info
from tests.tiny_tokenizer import tiny_tokenizer

REQUEST = Request("r", (5, 6, 7), SamplingParams(seed=1, prompt_logprobs=1))


def worker(name: str, role: Role, queued: int = 0, *, draining: bool = False) -> Worker:
    snapshot = WorkerSnapshot(role, queued_prefill_tokens=queued, draining=draining)
    return Worker(replace(worker_info(name), role=role), snapshot)


async def ask(workers: list[Worker], errors: dict[str, BatonError]) -> list[str]:
    """Who was asked, in order."""
    asked: list[str] = []

    async def fetch(info: WorkerInfo, request: Request) -> tuple[Logprobs, ...]:
        asked.append(info.worker_id)
        if info.worker_id in errors:
            raise errors[info.worker_id]
        return ()

    try:
        await score(workers, REQUEST, fetch)
    except BatonError as error:
        asked.append(error.cause.name)
    return asked


async def test_the_least_busy_worker_that_prefills_is_asked_first() -> None:
    fleet = [
        worker("d", Role.DECODE),
        worker("p1", Role.PREFILL, 90),
        worker("p2", Role.PREFILL, 10),
        worker("p3", Role.PREFILL, 5, draining=True),
    ]
    lost, bad = BatonError(Cause.WORKER_LOST, ""), InvalidRequest("")
    assert await ask(fleet, {}) == ["p2"]
    assert await ask(fleet, {"p2": lost}) == ["p2", "p1"]
    assert await ask(fleet, {"p2": lost, "p1": lost}) == ["p2", "p1", "d"]
    all_lost = dict.fromkeys(["p2", "p1", "d"], lost)
    assert await ask(fleet, all_lost) == ["p2", "p1", "d", "WORKER_LOST"]
    assert await ask(fleet, {"p2": bad}) == ["p2", "INVALID_REQUEST"]
    assert await ask([], {}) == ["NO_WORKER"]


async def test_all_prompts_of_a_job_or_a_refusal() -> None:
    backend = FakeBackend(lambda _: [], (ServedModel("m", 99, 99, ()),))
    found = await PromptScores(backend).fetch([REQUEST, replace(REQUEST, prompt_token_ids=(8, 9))])
    assert [[one.logprob for one in prompt] for prompt in found] == [[-6.0, -7.0], [-9.0]]
    long = replace(REQUEST, prompt_token_ids=(1,) * (MAX_ENTRIES // 2 + 1))
    with pytest.raises(InvalidRequest) as caught:
        await PromptScores(backend).fetch([long])
    assert caught.value.param == "prompt_logprobs"


async def test_cancelling_ends_every_call() -> None:
    class Slow(FakeBackend):
        num_running = 0

        async def score(self, request: Request) -> tuple[Logprobs, ...]:
            self.num_running += 1
            try:
                await asyncio.sleep(60)
            finally:
                self.num_running -= 1
            return ()

    backend = Slow(lambda _: [], ())
    scores = PromptScores(backend)
    task = asyncio.create_task(scores.fetch([REQUEST] * 20))
    while not backend.num_running:
        await asyncio.sleep(0)
    scores.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert backend.num_running == 0


def test_they_are_written_as_vllm_does() -> None:
    writer = LogprobWriter(tiny_tokenizer(), 1)
    a, b, c = tiny_tokenizer().encode("abc", add_special_tokens=False)
    scores = [Logprobs(-2.0, 5, ((c, -0.5), (a, -0.7))), Logprobs(-float("inf"), 9, ((c, -0.1),))]
    assert writer.prompt((a, b, c), scores) == [
        None,
        {
            str(b): {"logprob": -2.0, "rank": 5, "decoded_token": "b"},
            str(c): {"logprob": -0.5, "rank": 1, "decoded_token": "c"},
        },
        {str(c): {"logprob": -9999.0, "rank": 9, "decoded_token": "c"}},
    ]
