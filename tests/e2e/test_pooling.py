"""A fleet of pooling workers: the demo model embeds, its last token pooled."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
from harness import wait_until

from baton import LLM, SamplingParams
from baton.config import ServeConfig
from baton.errors import InvalidRequest

TEXTS = [f"def function_{number}(argument):" + " pass" * number for number in range(40)]


@pytest.fixture(scope="module")
def fleet(make_fleet: Any) -> Iterator[Any]:
    with make_fleet("pooling-0", "pooling-1") as fleet:
        fleet.wait_workers("pooling-0", "pooling-1")
        yield fleet


@pytest.fixture(scope="module")
def expected() -> list[list[float]]:
    model = ServeConfig().model_source
    with LLM(model, runner="pooling", dtype="float32", max_model_len=1024) as llm:
        return [output.outputs.embedding for output in llm.embed(TEXTS, use_tqdm=False)]


def embed(fleet: Any, texts: list[str]) -> list[list[float]]:
    answer = fleet.client.post("/v1/embeddings", json={"input": texts})
    assert answer.status_code == 200, answer.text
    return [entry["embedding"] for entry in answer.json()["data"]]


def assert_close(ours: list[list[float]], theirs: list[list[float]]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_embeddings_are_those_of_one_process(fleet: Any, expected: Any) -> None:
    assert_close(embed(fleet, TEXTS), expected)
    score = fleet.client.post("/score", json={"text_1": TEXTS[0], "text_2": TEXTS[:2]}).json()
    assert score["data"][0]["score"] == pytest.approx(1.0, abs=1e-5)
    cosine = sum(a * b for a, b in zip(*expected[:2], strict=True))
    assert score["data"][1]["score"] == pytest.approx(cosine, abs=1e-4)
    refused = fleet.client.post("/v1/completions", json={"prompt": "x"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "model")


def test_a_client_of_the_fleet_is_an_llm(fleet: Any, expected: Any) -> None:
    with LLM(base_url=f"http://127.0.0.1:{fleet.port}") as llm:
        outputs = llm.embed([*TEXTS[:3], [5, 6]], use_tqdm=False)
        assert_close([output.outputs.embedding for output in outputs[:3]], expected[:3])
        assert outputs[3].prompt_token_ids == [5, 6]
        scores = llm.score(TEXTS[0], TEXTS[:2], use_tqdm=False)
        assert scores[0].outputs.score == pytest.approx(1.0, abs=1e-5)
        for call, param in (
            (lambda: llm.embed([[10**6]], use_tqdm=False), "input"),
            (lambda: llm.generate("x", SamplingParams(seed=1), use_tqdm=False), "model"),
        ):
            with pytest.raises(InvalidRequest) as caught:
                call()
            assert caught.value.param == param


def test_workers_that_are_killed_stopped_or_ended_cost_no_answer(fleet: Any, expected: Any) -> None:
    def ask(_: int) -> list[list[float]]:
        return embed(fleet, TEXTS)

    def ended(fleet: Any, **labels: str) -> float:
        count = fleet.metric("baton_requests_total", endpoint="/v1/embeddings", **labels)
        return float(count)

    before, before_ok = ended(fleet), ended(fleet, outcome="ok")
    with ThreadPoolExecutor(4) as threads:
        answers = threads.map(ask, range(24))
        assert_close(next(answers), expected)
        fleet.kill("pooling-0")
        for answer in answers:
            assert_close(answer, expected)
        fleet.start_worker("pooling-0")
        fleet.wait_workers("pooling-0", "pooling-1")
        fleet.stop("pooling-1")
        for answer in threads.map(ask, range(4)):
            assert_close(answer, expected)
        fleet.cont("pooling-1")
        fleet.wait_workers("pooling-0", "pooling-1")
        answers = threads.map(ask, range(16))
        assert_close(next(answers), expected)
        assert fleet.terminate("pooling-1") == 0
        for answer in answers:
            assert_close(answer, expected)
    assert ended(fleet) - before == ended(fleet, outcome="ok") - before_ok == 44
    fleet.assert_no_leak()


STEPS = [
    pytest.param("pooled", "stop"),
    *(
        pytest.param(name, how, marks=pytest.mark.slow)
        for name in ("pool", "engine-step", "pooled")
        for how in ("kill", "stop")
        if (name, how) != ("pooled", "stop")
    ),
]


@pytest.mark.parametrize(("name", "how"), STEPS)
def test_a_worker_is_struck_at_a_step(fleet: Any, expected: Any, name: str, how: str) -> None:
    """By a failpoint, in the middle of a request: another worker answers."""
    victim = "pooling-0"
    fleet.kill(victim)
    fleet.start_worker(victim, BATON_FAILPOINT=f"{name}:+1={how}", BATON_TEST_HOOKS="true")
    if "pooling-1" not in fleet.processes:
        fleet.start_worker("pooling-1")
    fleet.wait_workers(victim, "pooling-1")
    process = psutil.Process(fleet.pid(victim))
    struck = {
        "kill": lambda: fleet.processes[victim].poll() is not None,
        "stop": lambda: process.status() == psutil.STATUS_STOPPED,
    }[how]
    os.kill(fleet.pid(victim), signal.SIGUSR1)

    def serve() -> bool:
        assert_close(embed(fleet, TEXTS), expected)
        return struck()

    wait_until(serve, 60.0, "struck")
    assert_close(embed(fleet, TEXTS), expected)
    if how == "stop":
        fleet.cont(victim)
        fleet.wait_workers(victim, "pooling-1")
    fleet.assert_no_leak()
