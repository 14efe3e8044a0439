"""The whole engine against an oracle, with commands in any order: tokens are right, nothing leaks.

One engine plays prefill and decode worker at once; the machine is its worker: it reads held KV,
writes reserved blocks (late and slowly, also after an abort, as a transfer thread would) and says
Quiesced when it has stopped.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baton.engine.batch import Batch
from baton.engine.commands import (
    Abort,
    AddDecode,
    AddLocal,
    AddPrefill,
    Advance,
    ComputeHere,
    KVFailed,
    Pin,
    Quiesced,
    Release,
    Retain,
    Share,
)
from baton.engine.events import (
    KVReserved,
    LeaseEvicted,
    LegAdmitted,
    LegEvent,
    LegFailed,
    LegPinned,
    LegRefused,
    PrefillProgress,
)
from baton.engine.null_runner import NullModel
from baton.errors import Cause
from baton.types import BlockId, LegId, Request, SamplingParams
from tests.engine.driver import Driver, leg_id, prompt

EOS = 3
MAX_STEPS = 3000


@pytest.fixture
def quiet_core() -> Iterator[None]:
    """Thousands of steps fail on purpose."""
    log = logging.getLogger("baton.engine.core")
    log.disabled = True
    yield
    log.disabled = False


@dataclass(frozen=True)
class Shape:
    length: int
    family: int
    n: int
    max_tokens: int
    sampled: bool
    min_tokens: int
    priority: int
    deadline_ms: int | None
    committed: tuple[int, ...] | None


SHAPES = st.builds(
    Shape,
    length=st.integers(1, 90),
    family=st.integers(0, 2),
    n=st.integers(1, 4),
    max_tokens=st.integers(1, 14),
    sampled=st.booleans(),
    min_tokens=st.sampled_from([0, 0, 1, 2]),
    priority=st.sampled_from([0, 0, 1]),
    deadline_ms=st.sampled_from([None, 10, 1000]),
    committed=st.one_of(st.none(), st.tuples(*[st.integers(0, 5)] * 4)),
)


@dataclass
class Leg:
    """The worker's own view of a leg."""

    request: Request
    kind: str  # "prefill" | "decode" | "local"
    block_ids: tuple[BlockId, ...] = ()  # as told
    num_ready: int = 0  # prompt tokens that may be read
    num_written: int = 0  # decode: by the transfer
    state: str = "added"  # prefill: held, retained, pinning; decode: reserved, failed, running
    aborted: set[int] = field(default_factory=set)
    is_shared: bool = False


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(6, 24),
        block_size=st.sampled_from([16, 32]),
        max_num_seqs=st.integers(1, 4),
        budget=st.integers(4, 48),
        caching=st.booleans(),
        policy=st.sampled_from(["fcfs", "deadline"]),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        budget: int,
        caching: bool,
        policy: str,
    ) -> None:
        self.driver = Driver(
            num_blocks,
            model=NullModel(vocab_size=50, eos_token_ids=(EOS,), eos_rate=0.05),
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=100,
            enable_prefix_caching=caching,
            scheduling_policy=policy,
        )
        self.legs: dict[LegId, Leg] = {}
        self.over: dict[LegId, Leg] = {}  # ended with a transfer in flight
        self.num_added = 0

    # ── requests ─────────────────────────────────────────────────────────────────────────────────

    @rule(shapes=st.lists(SHAPES, min_size=1, max_size=3))
    def add_prefill(self, shapes: list[Shape]) -> None:
        for shape in shapes:
            self.add("prefill", shape)

    @rule(shapes=st.lists(SHAPES, min_size=1, max_size=3))
    def add_decode(self, shapes: list[Shape]) -> None:
        for shape in shapes:
            self.add("decode", shape)

    @rule(shapes=st.lists(SHAPES, min_size=1, max_size=3))
    def add_local(self, shapes: list[Shape]) -> None:
        for shape in shapes:
            self.add("local", shape)

    def add(self, kind: str, shape: Shape) -> None:
        """Prompts of one family share their beginning."""
        sampling = SamplingParams(
            n=shape.n,
            temperature=1.0 if shape.sampled else 0.0,
            seed=self.num_added % 5,
            max_tokens=shape.max_tokens,
            min_tokens=min(shape.min_tokens, shape.max_tokens),
        )
        ids = prompt(shape.length, shape.family)
        request = Request(
            f"r{self.num_added}",
            ids,
            sampling,
            priority=shape.priority,
            deadline_ms=shape.deadline_ms,
        )
        if shape.committed is not None:
            pairs = enumerate(shape.committed[: shape.n])
            outputs = tuple(self.driver.expected(request, c)[:done] for c, done in pairs)
            request = replace(request, output_token_ids=outputs)
        leg = leg_id(request.request_id)
        self.num_added += 1
        self.legs[leg] = Leg(request, kind)
        adds: dict[str, type[AddPrefill | AddDecode | AddLocal]] = {
            "prefill": AddPrefill,
            "decode": AddDecode,
            "local": AddLocal,
        }
        self.driver.apply(adds[kind](leg, request))

    @precondition(lambda self: self.driver.core.has_work)
    @rule(num_steps=st.integers(1, 8))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            if self.driver.core.has_work:
                self.driver.now_s += 0.01
                self.see(self.driver.step())

    @precondition(lambda self: self.driver.core.has_work)
    @rule(which=st.integers(0, 3), non_finite=st.booleans())
    def step_goes_wrong(self, which: int, non_finite: bool) -> None:
        def fault(batch: Batch) -> None:
            if not non_finite:
                raise RuntimeError("out of luck")
            self.driver.runner.non_finite = {batch.rows[which % len(batch.rows)].row_id}

        self.driver.runner.fault = fault
        self.step(1)
        self.driver.runner.fault = None
        self.driver.runner.non_finite = set()

    def see(self, events: tuple[LegEvent, ...]) -> None:
        for event in events:
            if getattr(event, "leg", None) not in self.legs:
                continue  # tokens, and what crossed the leg's end
            match event:
                case LegAdmitted() | KVReserved():
                    leg = self.legs[event.leg]
                    leg.block_ids, leg.num_ready = event.block_ids, event.num_cached_tokens
                    leg.num_written = event.num_cached_tokens
                    leg.state = {"decode": "reserved", "prefill": "held", "local": "running"}[
                        leg.kind
                    ]
                    self.check_readable(leg)
                case PrefillProgress(leg=leg_id_, tokens_done=done):
                    leg = self.legs[leg_id_]
                    assert done > leg.num_ready or leg.kind != "prefill"  # others are preempted
                    leg.num_ready = done
                case LegRefused():
                    del self.legs[event.leg]
                case LegFailed():
                    self.over[event.leg] = self.legs.pop(event.leg)
                    assert event.cause in (
                        Cause.STEP_FAILED,
                        Cause.NON_FINITE_LOGITS,
                        Cause.NEVER_FITS,
                    )
                case LegPinned():
                    self.legs[event.leg].state = "held"
                case LeaseEvicted():
                    assert self.legs.pop(event.leg).state in ("retained", "pinning")

    # ── the transfer side ────────────────────────────────────────────────────────────────────────

    def among(self, state: str) -> list[tuple[LegId, Leg]]:
        return [item for item in self.legs.items() if item[1].state == state]

    def check_readable(self, leg: Leg) -> None:
        want = self.driver.model.chain(None, leg.request.shared_token_ids)[: leg.num_ready]
        assert self.driver.runner.export_kv(leg.block_ids, 0, leg.num_ready) == want

    @invariant()
    def what_is_held_can_be_read(self) -> None:
        for leg in [*getattr(self, "legs", {}).values(), *getattr(self, "over", {}).values()]:
            if leg.state == "held":
                self.check_readable(leg)

    def write(self, leg: Leg, num_tokens: int) -> None:
        ids = leg.request.prompt_token_ids
        stop = min(leg.num_written + num_tokens, len(ids))
        values = self.driver.model.chain(None, ids)[leg.num_written : stop]
        self.driver.import_kv(leg.block_ids, leg.num_written, values)
        leg.num_written = stop

    @precondition(lambda self: self.among("reserved"))
    @rule(data=st.data(), num_tokens=st.integers(1, 40))
    def transfer(self, data: st.DataObject, num_tokens: int) -> None:
        _, view = data.draw(st.sampled_from(self.among("reserved")))
        self.write(view, num_tokens)

    @precondition(lambda self: self.over)
    @rule(data=st.data(), num_tokens=st.integers(1, 40), stops=st.booleans())
    def late_transfer(self, data: st.DataObject, num_tokens: int, stops: bool) -> None:
        leg, view = data.draw(st.sampled_from(list(self.over.items())))
        if view.kind == "decode" and view.state == "reserved":
            self.write(view, num_tokens)
        if stops:
            self.driver.apply(Quiesced(leg))
            del self.over[leg]

    @precondition(lambda self: self.among("reserved"))
    @rule(data=st.data())
    def import_ends(self, data: st.DataObject) -> None:
        leg, view = data.draw(st.sampled_from(self.among("reserved")))
        self.write(view, 1000)
        view.state = "running"
        self.driver.apply(self.driver.imported(leg, view.request))

    @precondition(lambda self: self.among("reserved"))
    @rule(data=st.data(), here=st.booleans())
    def import_fails(self, data: st.DataObject, here: bool) -> None:
        leg, view = data.draw(st.sampled_from(self.among("reserved")))
        self.driver.apply(KVFailed(leg, view.num_written))
        if here:
            view.state = "running"
            self.driver.apply(ComputeHere(leg))

    @precondition(lambda self: self.among("held"))
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        leg, view = data.draw(st.sampled_from(self.among("held")))
        if view.is_shared or view.num_ready == len(view.request.prompt_token_ids):
            view.state = "retained"
            self.driver.apply(Retain(leg))

    @precondition(lambda self: self.among("retained"))
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        leg, view = data.draw(st.sampled_from(self.among("retained")))
        view.state = "pinning"
        self.driver.apply(Pin(leg))

    # ── running legs that move ───────────────────────────────────────────────────────────────────

    def with_output(self, leg: LegId, view: Leg, num: int, at_most: bool) -> Request:
        """The request with `num` tokens of each open choice committed: `at_most` those that it has
        said, or (False) at least, and not the last one."""
        outputs = []
        for choice in range(view.request.sampling.n):
            said = len(view.request.committed(choice)) + len(self.driver.tokens[leg, choice])
            expected = self.driver.expected(view.request, choice)
            count = min(num, said) if at_most else max(min(num, len(expected) - 1), said)
            outputs.append(expected[:count])
        return replace(view.request, output_token_ids=tuple(outputs))

    @precondition(lambda self: self.among("running"))
    @rule(data=st.data(), num=st.integers(0, 14))
    def share(self, data: st.DataObject, num: int) -> None:
        source, view = data.draw(st.sampled_from(self.among("running")))
        request = self.with_output(source, view, num, at_most=True)
        leg = leg_id(f"r{self.num_added}")
        self.num_added += 1
        self.legs[leg] = Leg(request, "prefill", is_shared=True)
        self.driver.apply(Share(leg, request, source))

    @precondition(lambda self: self.among("running"))
    @rule(data=st.data(), num=st.integers(1, 14))
    def advance(self, data: st.DataObject, num: int) -> None:
        driver = self.driver
        leg, view = data.draw(st.sampled_from(self.among("running")))
        if driver.core.has_work:
            self.step(1)  # what it has said is known
        if leg not in self.legs:
            return
        request = self.with_output(leg, view, num, at_most=False)
        driver.apply(Advance(leg, request.output_token_ids))
        for choice in range(request.sampling.n):
            if choice not in view.aborted and (leg, choice) not in driver.finished:
                done = len(view.request.committed(choice))
                driver.first.setdefault((leg, choice), done)
                driver.tokens[leg, choice][:] = request.committed(choice)[done:]

    # ── the end of a leg ─────────────────────────────────────────────────────────────────────────

    @precondition(lambda self: self.legs)
    @rule(data=st.data(), in_flight=st.booleans())
    def end(self, data: st.DataObject, in_flight: bool) -> None:
        self.end_leg(data.draw(st.sampled_from(list(self.legs))), in_flight)

    def end_leg(self, leg: LegId, in_flight: bool) -> None:
        view = self.legs.pop(leg)
        in_flight = in_flight and view.state in ("held", "reserved")
        end = Release if view.kind == "prefill" else Abort
        self.driver.apply(end(leg, in_flight=in_flight))
        if in_flight:
            self.over[leg] = view

    @precondition(lambda self: self.legs)
    @rule(data=st.data(), choice=st.integers(0, 3))
    def abort_choice(self, data: st.DataObject, choice: int) -> None:
        leg, view = data.draw(st.sampled_from(list(self.legs.items())))
        still_open = {
            c
            for c in range(view.request.sampling.n)
            if c not in view.aborted and (leg, c) not in self.driver.finished
        }
        if view.state != "reserved" and choice in still_open and len(still_open) > 1:
            view.aborted.add(choice)
            self.driver.apply(Abort(leg, choice))

    @invariant()
    def tokens_are_right(self) -> None:
        for leg, view in getattr(self, "legs", {}).items():
            if view.kind == "prefill":
                continue
            for choice in range(view.request.sampling.n):
                got = tuple(self.driver.tokens[leg, choice])
                done = len(view.request.committed(choice))
                want = self.driver.expected(view.request, choice)[done:]
                assert got == want[: len(got)], f"{leg} choice {choice}"
                if (leg, choice) in self.driver.finished:
                    assert got == want

    def teardown(self) -> None:
        if not hasattr(self, "legs"):
            return
        driver = self.driver
        for leg in [i for i, view in self.legs.items() if view.state in ("reserved", "retained")]:
            self.end_leg(leg, False)
        for leg in [*self.over]:
            driver.apply(Quiesced(leg))
        while True:
            for _ in range(MAX_STEPS):
                if not driver.core.has_work:
                    break
                self.step(1)
            assert not driver.core.has_work, "no end in sight"
            self.tokens_are_right()
            held = [leg for leg, view in self.legs.items() if view.kind == "prefill"]
            waiting = [leg for leg, view in self.legs.items() if view.state == "reserved"]
            for leg in held + waiting:
                self.end_leg(leg, False)
            for leg in [*self.over]:
                driver.apply(Quiesced(leg))
                del self.over[leg]
            if not (held or waiting):
                break
        driver.run()
        for leg, view in self.legs.items():
            for choice in range(view.request.sampling.n):
                assert choice in view.aborted or (leg, choice) in driver.finished
        driver.assert_idle()


EngineMachine.TestCase.settings = settings(
    max_examples=50,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@pytest.mark.usefixtures("quiet_core")
class TestEngineMachine(EngineMachine.TestCase):  # type: ignore[valid-type,misc]
    pass
