import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue

import pytest

from baton.engine.batch import Batch, OnLayers, Sampled
from baton.engine.commands import Abort, AddLocal, Command
from baton.engine.config import EngineConfig
from baton.engine.core import EngineCore
from baton.engine.events import (
    LegAdmitted,
    LegFailed,
    LegTokens,
    PrefillProgress,
    StepOutput,
)
from baton.engine.null_runner import NullRunner
from baton.engine.thread import MAX_PENDING_ADDS, EngineThread
from baton.errors import BatonError, Cause
from tests.engine.driver import leg_id, prompt, request


class GatedRunner(NullRunner):
    """Waits in each step until it is let on."""

    def __init__(self) -> None:
        super().__init__(64, 16)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def run(
        self, batch: Batch, on_layers: OnLayers | None = None
    ) -> dict[int, tuple[Sampled, ...]]:
        self.entered.set()
        assert self.gate.wait(20)
        return super().run(batch, on_layers)


class CountingCore(EngineCore):
    num_asked = 0

    @property
    def has_work(self) -> bool:
        self.num_asked += 1
        return super().has_work


class Rig:
    def __init__(self) -> None:
        self.runner = GatedRunner()
        self.core = CountingCore(EngineConfig(64, max_num_seqs=8), self.runner)
        self.outputs: SimpleQueue[StepOutput] = SimpleQueue()
        self.failures: SimpleQueue[Exception] = SimpleQueue()
        self.on_output: Callable[[StepOutput], None] = self.outputs.put
        self.thread = EngineThread(self.core, self.hand_over, on_failure=self.failures.put)

    def hand_over(self, output: StepOutput) -> None:
        self.on_output(output)

    def wait_for_end(self, name: str) -> list[StepOutput]:
        """Outputs up to the one in which the leg's only choice finishes."""
        outputs: list[StepOutput] = []
        while True:
            outputs.append(self.outputs.get(timeout=20))
            for event in outputs[-1].events:
                if not isinstance(event, LegTokens) or event.chunk.leg != leg_id(name):
                    continue
                if event.chunk.finish_reason is not None:
                    return outputs


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    rig.thread.start()
    yield rig
    rig.runner.gate.set()
    assert rig.thread.stop()


def add(name: str, **options: object) -> AddLocal:
    return AddLocal(leg_id(name), request(name, prompt(20, len(name)), **options))


def test_commands_from_many_threads_are_served(rig: Rig) -> None:
    names = [f"r{i}" for i in range(20)]
    posters = [threading.Thread(target=rig.thread.post, args=(add(name),)) for name in names]
    for poster in posters:
        poster.start()
    done = 0
    while done < len(names):
        for event in rig.outputs.get(timeout=20).events:
            done += isinstance(event, LegTokens) and event.chunk.finish_reason is not None
    for poster in posters:
        poster.join()
    assert rig.core.snapshot().free_blocks == 64


def test_outputs_come_once_per_step_from_the_engine_thread(rig: Rig) -> None:
    threads: SimpleQueue[str] = SimpleQueue()

    def keep(output: StepOutput) -> None:
        threads.put(threading.current_thread().name)
        rig.outputs.put(output)

    rig.on_output = keep
    rig.thread.post(add("a", max_tokens=5))
    outputs = rig.wait_for_end("a")
    assert [output.timing is None for output in outputs] == [True, *[False] * 5]
    assert {threads.get() for _ in range(6)} == {"engine"}


def test_who_is_admitted_hears_so_before_the_step_is_computed(rig: Rig) -> None:
    rig.runner.gate.clear()
    rig.thread.post(add("a", max_tokens=1))
    (event,) = rig.outputs.get(timeout=20).events
    assert isinstance(event, LegAdmitted)
    assert rig.outputs.empty()
    rig.runner.gate.set()
    (output,) = rig.wait_for_end("a")
    assert [type(event) for event in output.events] == [PrefillProgress, LegTokens]


def test_commands_posted_together_are_applied_before_one_step(rig: Rig) -> None:
    rig.thread.post(add("a"), add("b"), Abort(leg_id("a")))
    outputs = rig.wait_for_end("b")
    assert all(
        not isinstance(event, LegTokens) or event.chunk.leg == leg_id("b")
        for output in outputs
        for event in output.events
    )


def test_an_idle_engine_sleeps(rig: Rig) -> None:
    """The loop asks for work once, and then waits for a command."""
    rig.thread.post(add("a"))
    rig.wait_for_end("a")
    while rig.core.num_asked == 0 or rig.thread.step_started_at is not None:
        threading.Event().wait(0.01)
    before = rig.core.num_asked
    threading.Event().wait(0.2)
    assert rig.core.num_asked <= before + 1, "at most the one that was under way"


def test_a_step_that_is_stuck_can_be_seen(rig: Rig) -> None:
    rig.runner.gate.clear()
    before = time.monotonic()
    rig.thread.post(add("a"))
    assert rig.runner.entered.wait(20)
    started = rig.thread.step_started_at
    assert started is not None
    assert before <= started <= time.monotonic()
    assert not rig.thread.stop(timeout_s=0.01), "it is still in its step"
    rig.runner.gate.set()


def test_a_failing_step_leaves_the_thread_alive(rig: Rig) -> None:
    run, rig.runner.run = rig.runner.run, None  # type: ignore[method-assign,assignment]
    rig.thread.post(add("a"))
    assert isinstance(rig.outputs.get(timeout=20).events[0], LegAdmitted)
    (event,) = [e for e in rig.outputs.get(timeout=20).events if isinstance(e, LegFailed)]
    assert event.cause is Cause.STEP_FAILED
    rig.runner.run = run  # type: ignore[method-assign]
    rig.thread.post(add("b"))
    rig.wait_for_end("b")
    assert rig.thread.failure is None


def test_a_fault_of_the_engine_is_told_and_ends_it(rig: Rig) -> None:
    boom = RuntimeError("boom")

    def explode(_: StepOutput) -> None:
        raise boom

    rig.on_output = explode
    rig.thread.post(add("a"))
    assert rig.failures.get(timeout=20) is boom
    assert rig.thread.failure is boom
    assert rig.thread.step_started_at is None
    with pytest.raises(BatonError, match="not running") as caught:
        rig.thread.post(add("b"))
    assert caught.value.cause is Cause.INTERNAL
    assert rig.thread.stop()
    assert not rig.thread.is_alive


def test_new_legs_are_refused_while_too_much_is_unapplied(rig: Rig) -> None:
    rig.runner.gate.clear()
    rig.thread.post(add("a"))
    assert rig.runner.entered.wait(20)
    flood: list[Command] = [Abort(leg_id("x"))] * MAX_PENDING_ADDS
    rig.thread.post(*flood)
    with pytest.raises(BatonError) as caught:
        rig.thread.post(add("b"))
    assert caught.value.cause is Cause.OVERLOADED
    rig.thread.post(Abort(leg_id("a")))
    rig.runner.gate.set()


def test_stop_is_idempotent_and_works_before_start() -> None:
    rig = Rig()
    assert rig.thread.stop()
    assert rig.thread.stop()
    with pytest.raises(BatonError):
        rig.thread.post(add("a"))
