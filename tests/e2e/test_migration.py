"""A decode worker is told to end, or dies, or is slow: its streams go on at another one, and no
client notices. Greedy, seeded, with several choices, and with a grammar, which is replayed."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import psutil
import pytest
from harness import bearable_silence_s, slowed, wait_until

from baton import SamplingParams
from baton.types import StructuredOutput

NUM_TOKENS = 100
COMMON = {"max_tokens": NUM_TOKENS, "ignore_eos": True, "top_p": 1.0, "top_k": 0}
WORDS = {"regex": "([a-z]{3,8} ){200}"}  # grammars that go on for longer than the output
NUMBERS = {"type": "array", "items": {"type": "integer", "maximum": 10**6}, "minItems": 200}
LIST = {"json": NUMBERS, "disable_any_whitespace": True}
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0, "seed": 1},
    {"temperature": 0.8, "seed": 2, "frequency_penalty": 0.5, "top_p": 0.9},
    {"temperature": 1.0, "seed": 3, "n": 2},
    {"temperature": 1.0, "seed": 4, "structured_outputs": WORDS},
    {"temperature": 1.0, "seed": 5, "n": 2, "structured_outputs": LIST},
]

pytestmark = pytest.mark.timeout(600)


class Stage:
    """Streams decode at `here`, and nothing else could take them until `there` is let in."""

    def __init__(self, fleet: Any, oracle: Any) -> None:
        self.fleet = fleet
        self._oracle = oracle
        self._seeds = count(1)
        self._names = (f"decode-{number}" for number in count())
        self.here = self.there = ""

    def set(self) -> None:
        """What the last test has left is used again."""
        fleet = self.fleet
        alive = [name for name in fleet.processes if name.startswith("decode")]
        for name in alive[1:]:
            fleet.kill(name)
        self.here = alive[0] if alive else self._start(next(self._names))
        if "prefill-0" not in fleet.processes:
            self._start("prefill-0")
        fleet.wait_workers("prefill-0", self.here)

    def replace_here(self, **env: str) -> None:
        self.fleet.kill(self.here)
        self.here = self._start(next(self._names), **env)
        self.fleet.wait_workers(self.here)

    def _start(self, name: str, **env: str) -> str:
        self.fleet.start_worker(name, **env)
        return name

    def park(self, **env: str) -> None:
        """`there` is loaded, and out of the gateway's reach."""
        self.there = self._start(next(self._names), **env)
        self.fleet.wait_workers(self.there)
        self.fleet.stop(self.there)
        wait_until(lambda: self.state(self.there) != "up", 30, f"{self.there} is lost")

    def let_in(self) -> None:
        """Streams are not at their end when `there` is up."""
        with slowed(self.fleet.pid(self.here)):
            self.fleet.cont(self.there)
            self.fleet.wait_workers(self.there)

    def find(self, name: str) -> dict[str, Any]:
        workers = self.fleet.cluster()["workers"]
        return next((w for w in workers if w["worker_id"] == name), {})

    def state(self, name: str) -> str:
        return str(self.find(name).get("state", ""))

    def moved(self, cause: str, result: str = "moved") -> float:
        return float(self.fleet.metric("baton_migrations_total", cause=cause, result=result))

    def play(self, act: Callable[[], None]) -> None:
        """One stream of each kind and, with all of them well on their way, `act`. No client
        notices."""
        on_their_way = threading.Barrier(len(KINDS) + 1)

        def stream(body: dict[str, Any]) -> Any:
            waited: list[bool] = []

            def on_token(number: int) -> None:
                if number >= 24 and not waited:
                    waited.append(True)
                    on_their_way.wait(120)

            return self.fleet.complete(body, on_token)

        bodies = [{"prompt": prompt(next(self._seeds)), **COMMON, **kind} for kind in KINDS]
        with ThreadPoolExecutor(len(KINDS)) as pool:
            streams = [pool.submit(stream, body) for body in bodies]
            on_their_way.wait(120)
            act()
            results = [one.result(200) for one in streams]
        for body, kind, result in zip(bodies, KINDS, results, strict=True):
            assert result.error is None
            assert result.done
            assert result.token_ids == self._oracle(body["prompt"], sampling(kind)), kind
            assert all(len(ids) == NUM_TOKENS for ids in result.token_ids.values())
            assert result.longest_silence_s < bearable_silence_s()
        self.fleet.assert_no_leak()


def prompt(seed: int, length: int = 120) -> list[int]:
    return [(seed * 131 + i * 17 + i * i) % 1900 + 20 for i in range(length)]


def sampling(kind: dict[str, Any]) -> SamplingParams:
    fields = {**COMMON, **kind}
    if "structured_outputs" in fields:
        grammar = dict(fields["structured_outputs"])
        fields["structured_outputs"] = StructuredOutput.of(**grammar)
    return SamplingParams(**fields)


@pytest.fixture(scope="module")
def theatre(make_fleet, oracle) -> Iterator[Stage]:
    with make_fleet("prefill-0", BATON_REBALANCE="false") as running:
        yield Stage(running, oracle)


@pytest.fixture
def stage(theatre: Stage) -> Stage:
    theatre.set()
    return theatre


def test_streams_move_away_from_a_decode_worker_that_ends(stage: Stage) -> None:
    fleet = stage.fleet
    before = stage.moved("drain"), fleet.metric("baton_migration_bytes_total", cause="drain")
    codes: list[int] = []
    stage.park()

    def end() -> None:
        stage.let_in()
        process = fleet.processes.pop(stage.here)
        process.terminate()
        codes.append(process.wait(30))

    stage.play(end)
    assert codes == [0]
    assert stage.moved("drain") - before[0] == len(KINDS), fleet.log_tail("gateway")
    assert fleet.metric("baton_migration_bytes_total", cause="drain") > before[1]


def test_a_second_signal_ends_at_once(stage: Stage) -> None:
    fleet = stage.fleet

    def end() -> None:
        process = fleet.processes.pop(stage.here)
        with slowed(process.pid):
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: stage.state(stage.here) == "draining", 10, "it drains")
            time.sleep(0.3)
            assert process.poll() is None, "streams are on it, and there is nowhere to go"
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 1

    stage.play(end)  # the prefill worker goes on alone


def test_a_prefill_worker_ends_while_its_requests_decode(stage: Stage) -> None:
    """Its KV was read: nobody waits for streams that do not need it any more."""
    codes: list[int] = []
    num_running: list[int] = []

    def end() -> None:
        with slowed(stage.fleet.pid(stage.here)):
            codes.append(stage.fleet.terminate("prefill-0", timeout_s=20.0))
            num_running.append(stage.find(stage.here)["load"]["running"])

    stage.play(end)
    assert codes == [0]
    assert num_running[0] > 0


@pytest.mark.parametrize(
    "is_lease_left",  # test_faults has the quick one of it
    [pytest.param(True, marks=pytest.mark.slow), False],
)
def test_a_decode_worker_is_killed(stage: Stage, is_lease_left: bool) -> None:
    """What it had of a prompt is fetched again from the lease, or computed again without it."""
    fleet = stage.fleet
    result = "attached" if is_lease_left else "recomputed"
    before = stage.moved("failure", result), fleet.metric("baton_kv_transfer_seconds_count")
    stage.park()

    def kill() -> None:
        stage.let_in()
        if not is_lease_left:
            fleet.kill("prefill-0")
        fleet.kill(stage.here)

    stage.play(kill)
    assert stage.moved("failure", result) - before[0] == len(KINDS)
    num_fetches = fleet.metric("baton_kv_transfer_seconds_count") - before[1]
    assert num_fetches == (2 if is_lease_left else 1) * len(KINDS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("who", "name", "how"),  # each step in one way; the simulator has them in all
    [
        *(("here", name, "kill") for name in ("submit", "attach", "done")),
        *(("here", name, "stop") for name in ("admitted", "frame-sent")),
        *(("there", name, "kill") for name in ("bound", "imported")),
        *(("there", name, "stop") for name in ("bind", "frame", "token")),
    ],
)
def test_a_worker_is_struck_while_streams_move(stage: Stage, who: str, name: str, how: str) -> None:
    fleet = stage.fleet
    env = {"BATON_TEST_HOOKS": "true", "BATON_FAILPOINT": f"{name}:+1={how}"}
    if who == "here":
        stage.replace_here(**env)
    stage.park(**(env if who == "there" else {}))

    def end() -> None:
        stage.let_in()
        os.kill(fleet.pid(getattr(stage, who)), signal.SIGUSR1)
        fleet.processes[stage.here].terminate()

    stage.play(end)
    here, struck = fleet.processes[stage.here], fleet.processes[getattr(stage, who)]
    if how == "stop":
        assert psutil.Process(struck.pid).status() == psutil.STATUS_STOPPED
        struck.send_signal(signal.SIGCONT)
    else:
        assert struck.wait(5) == -signal.SIGKILL
    assert here.wait(40) == (-signal.SIGKILL if (who, how) == ("here", "kill") else 0)
    fleet.assert_no_leak()
    for worker in (stage.here, stage.there):
        fleet.kill(worker)


@pytest.mark.slow
def test_streams_move_away_from_a_worker_that_has_become_slow(stage: Stage) -> None:
    fleet = stage.fleet
    fleet.kill("gateway")
    fleet.start_gateway(BATON_REBALANCE="true")
    fleet.wait_ready()
    fleet.wait_workers("prefill-0", stage.here)
    stage.park()

    def relieve() -> None:
        with slowed(fleet.pid(stage.here)):
            stage.let_in()
            wait_until(lambda: stage.moved("rebalance"), 30, "one has moved")

    stage.play(relieve)
    assert fleet.metric("baton_migration_bytes_total", cause="rebalance") > 0
