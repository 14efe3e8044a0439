"""Who should change the decode worker: tables, and that rebalancing comes to rest."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.gateway.backend import MigrationCause
from baton.gateway.mover import Mover, MoverConfig, Running, gain_of, leaving, rebalanced
from baton.gateway.router import Need
from baton.gateway.workers import Fleet
from baton.latency import LatencyModel, LatencyPrior
from baton.messages import StepBatch
from baton.types import Role, WorkerSnapshot
from tests.gateway.support import worker_info

CONFIG = MoverConfig()


def one(
    name: str, worker: str, context: int = 400, n: int = 1, left: int = 500, **more: bool
) -> Running:
    need = Need(
        prompt_len=context // 2,
        num_choices=n,
        num_output_tokens=(context - context // 2) // n,
        max_new_tokens=left,
    )
    return Running(name, worker, need, **more)


class Board:
    """A fleet whose snapshots follow from who runs where."""

    def __init__(
        self, running: list[Running], *names: str, draining: str = "", role: Role = Role.DECODE
    ) -> None:
        self.running = {r.request_id: r for r in running}
        self.fleet = Fleet()
        self.draining = draining
        for name in names:
            info = worker_info(name, role, num_blocks=4096, max_num_seqs=256)
            worker = self.fleet.joined(info)
            worker.latency = LatencyModel(LatencyPrior((5.0, 0.05, 1e-6, 1.0, 2e-3)))
            worker.latency.num_steps = 100
        self.tell()

    def tell(self) -> None:
        for worker in self.fleet:
            here = [r for r in self.running.values() if r.worker_id == worker.worker_id]
            snapshot = WorkerSnapshot(
                worker.info.role,
                num_running=sum(r.need.num_choices for r in here),
                context_tokens=sum(r.num_context_tokens for r in here),
                free_blocks=4096,
                total_blocks=4096,
                draining=worker.worker_id == self.draining,
            )
            self.fleet.received(worker.worker_id, StepBatch((), snapshot), 0.0)

    def load(self) -> float:
        return sum(
            worker.num_sequences
            * worker.latency.decode_step_ms(worker.num_sequences, worker.snapshot.context_tokens)
            for worker in self.fleet
        )

    def leaving(self) -> list[str]:
        return leaving(list(self.running.values()), self.fleet, CONFIG)

    def rebalanced(self) -> str | None:
        return rebalanced(self.running.values(), self.fleet, CONFIG)


# ── drain ────────────────────────────────────────────────────────────────────────────────────────


def test_who_costs_most_to_compute_again_leaves_first_and_only_some_at_a_time() -> None:
    sizes = {"a": 100, "b": 900, "c": 300, "d": 500, "e": 700}
    board = Board([one(k, "d1", v) for k, v in sizes.items()], "d1", "d2", draining="d1")
    assert board.leaving() == ["b", "e", "d", "c"]
    board.running["b"] = one("b", "d1", 900, is_migrating=True, may_migrate=False)
    assert board.leaving() == ["e", "d", "c"]


def test_several_choices_count_with_all_their_output() -> None:
    many, long = one("many", "d1", 400, n=4), one("long", "d1", 390)
    board = Board([long, many], "d1", "d2", draining="d1")
    assert board.leaving() == ["many", "long"]


@pytest.mark.parametrize("why", ["nobody else", "nobody drains", "not again", "no decode worker"])
def test_nobody_leaves(why: str) -> None:
    names = ["d1"] if why == "nobody else" else ["d1", "d2"]
    draining = "" if why == "nobody drains" else "d1"
    role = Role.PREFILL if why == "no decode worker" else Role.DECODE
    stays = one("a", "d1", may_migrate=why != "not again")
    assert Board([stays], *names, draining=draining, role=role).leaving() == []


def test_not_where_there_is_no_room() -> None:
    board = Board([one("a", "d1")], "d1", "d2", draining="d1")
    full = WorkerSnapshot(Role.DECODE, free_blocks=3, total_blocks=4096)
    board.fleet.received("d2", StepBatch((), full), 0.0)
    assert board.leaving() == []


# ── rebalancing ──────────────────────────────────────────────────────────────────────────────────


def crowd(num: int, worker: str, context: int = 400) -> list[Running]:
    return [one(f"{worker}-{i}", worker, context) for i in range(num)]


def test_a_crowded_worker_gives_to_an_idle_one() -> None:
    assert Board(crowd(8, "d1"), "d1", "d2").rebalanced() is not None


@pytest.mark.parametrize(
    ("here", "there"), [(1, 0), (4, 4), (5, 4), (0, 0)], ids=["alone", "even", "nearly", "idle"]
)
def test_what_gains_too_little_stays(here: int, there: int) -> None:
    assert Board([*crowd(here, "d1"), *crowd(there, "d2")], "d1", "d2").rebalanced() is None


def test_one_at_a_time_and_not_what_is_nearly_done() -> None:
    moving = one("x", "d1", is_migrating=True, may_migrate=False)
    assert Board([moving, *crowd(8, "d1")], "d1", "d2").rebalanced() is None
    short = [one(f"s{i}", "d1", left=1) for i in range(8)]
    assert Board(short, "d1", "d2").rebalanced() is None


def test_never_to_or_from_a_worker_that_drains_or_only_prefills() -> None:
    assert Board(crowd(8, "d1"), "d1", "d2", draining="d2").rebalanced() is None
    assert Board(crowd(8, "d1"), "d1").rebalanced() is None
    board = Board(crowd(8, "d1"), "d1")
    board.fleet.joined(worker_info("p1", Role.PREFILL, num_blocks=4096))
    assert board.rebalanced() is None


def test_a_slow_link_makes_a_move_not_worth_it() -> None:
    board = Board(crowd(8, "d1"), "d1", "d2")
    board.fleet.link("d1", "d2").model.bytes_per_ms = 0.05
    assert board.rebalanced() is None


def test_a_worker_that_has_not_run_is_taken_to_be_like_its_peer() -> None:
    """Its prior looks so fast that everybody would move there."""
    board = Board([one("a", "d1")], "d1", "d2")
    board.fleet.get("d2").latency = LatencyModel(  # type: ignore[union-attr]
        LatencyPrior((0.1, 0.05, 1e-6, 0.01, 1e-6))
    )
    assert board.rebalanced() is None


PLACES = st.lists(
    st.tuples(
        st.integers(0, 3),  # worker
        st.integers(20, 3000),  # context
        st.integers(1, 4),  # choices
        st.integers(1, 1000),  # tokens left
    ),
    max_size=24,
)


@given(places=PLACES, num_workers=st.integers(2, 4), speeds=st.lists(st.floats(0.3, 3), min_size=4))
@settings(max_examples=150, deadline=None)
def test_it_comes_to_rest(
    places: list[tuple[int, int, int, int]], num_workers: int, speeds: list[float]
) -> None:
    """Every move lowers the load of the fleet; so it ends, and nobody goes back and forth."""
    names = [f"d{i}" for i in range(num_workers)]
    running = [
        one(f"r{i}", names[worker % num_workers], max(context, 2 * n), n, left)
        for i, (worker, context, n, left) in enumerate(places)
    ]
    board = Board(running, *names)
    for worker, speed in zip(board.fleet, speeds, strict=False):
        prior = LatencyPrior((5.0 * speed, 0.05, 1e-6, 1.0 * speed, 2e-3 * speed))
        worker.latency = LatencyModel(prior)
        worker.latency.num_steps = 100
    for _ in range(8 * len(places) + 1):
        chosen = board.rebalanced()
        if chosen is None:
            return
        mover, before = board.running[chosen], board.load()
        source = board.fleet.get(mover.worker_id)
        assert source is not None
        others = [w for w in board.fleet if w is not source]
        best = max(others, key=lambda w: gain_of(mover, source, w, board.fleet, CONFIG))
        board.running[chosen] = Running(chosen, best.worker_id, mover.need)
        board.tell()
        assert board.load() < before
    raise AssertionError("it never comes to rest")


# ── when ─────────────────────────────────────────────────────────────────────────────────────────


def test_it_looks_at_its_own_pace() -> None:
    looks: list[float] = []

    class Machine:
        request_id = "a"
        is_migrating = False

        @property
        def runs_on(self) -> str:
            looks.append(now)
            return "d1"

        def need(self, _: float) -> Need:
            return one("a", "d1").need

        def may_migrate(self, _: float) -> bool:
            return True

    board = Board([one("a", "d1")], "d1", "d2", draining="d1")
    mover, machines = Mover(CONFIG), {"a": Machine()}
    for now in (0.0, 1.0, 19.0, 25.0):
        orders = mover.due(board.fleet, machines, now)  # type: ignore[arg-type]
        assert orders == ([("a", MigrationCause.DRAIN)] if now in {0.0, 25.0} else [])
    assert looks == [0.0, 25.0]
    board.draining = ""
    board.tell()
    for now in (30.0, 40.0, 900.0, 1100.0):
        mover.due(board.fleet, machines, now)  # type: ignore[arg-type]
    assert looks[2:] == [30.0, 1100.0]
    off = Mover(MoverConfig(rebalances=False))
    crowded = Board(crowd(8, "d1"), "d1", "d2")
    assert off.due(crowded.fleet, machines, 5.0) == []  # type: ignore[arg-type]
