"""Which running requests should change their decode worker now: pure functions over what the
gateway knows.

A worker that drains is left by everything on it, what costs most to compute again first, a few at a
time. Between workers that stay, a request moves when that makes the fleet's decode steps shorter:

    load = Σ over workers of  sequences × predicted step time

is what every move has to lower, by more than the move costs and by a margin; so moves end, and none
is undone by the next one.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from baton.compat import pair_conflict
from baton.gateway.backend import MigrationCause, WorkerState
from baton.gateway.migration import MigratingMachine
from baton.gateway.router import Need, has_room
from baton.gateway.workers import Fleet, Worker
from baton.latency import LatencyModel

_MIN_EVIDENCE = 16  # steps before a worker's own model is believed


@dataclass(frozen=True, slots=True)
class MoverConfig:
    rebalances: bool = True
    look_every_ms: float = 20.0  # at a worker that drains
    rebalance_every_ms: float = 1_000.0
    max_per_worker: int = 4  # migrations under way from one worker
    horizon_tokens: int = 64  # output over which a move has to pay
    min_speedup: float = 1.25  # of the step that the request itself sees
    min_gain_ms: float = 100.0  # sequences × ms over the horizon, cost taken off


@dataclass(frozen=True, slots=True)
class Running:
    """A request that decodes, and could do so elsewhere."""

    request_id: str
    worker_id: str
    need: Need
    is_migrating: bool = False
    may_migrate: bool = True

    @property
    def num_context_tokens(self) -> int:
        return self.need.prompt_len + self.need.num_choices * self.need.num_output_tokens


Order = tuple[str, MigrationCause]  # request, why


class Mover:
    """Looks when it is time to, and says who should begin to move."""

    def __init__(self, config: MoverConfig) -> None:
        self._config = config
        self._look_at_ms = 0.0
        self._rebalance_at_ms = 0.0

    def due(
        self, fleet: Fleet, machines: Mapping[str, MigratingMachine], now_ms: float
    ) -> list[Order]:
        config = self._config
        if any(is_leaving(worker) for worker in fleet):
            if now_ms < self._look_at_ms:
                return []
            self._look_at_ms = now_ms + config.look_every_ms
            running = list(_running(machines, now_ms))
            return [(name, MigrationCause.DRAIN) for name in leaving(running, fleet, config)]
        if not config.rebalances or now_ms < self._rebalance_at_ms:
            return []
        self._rebalance_at_ms = now_ms + config.rebalance_every_ms
        if sum(_decodes(worker) for worker in fleet) < 2:
            return []
        chosen = rebalanced(_running(machines, now_ms), fleet, config)
        return [] if chosen is None else [(chosen, MigrationCause.REBALANCE)]


def _running(machines: Mapping[str, MigratingMachine], now_ms: float) -> Iterator[Running]:
    for request_id, machine in machines.items():
        worker_id = machine.runs_on
        if worker_id is not None:
            yield Running(
                request_id,
                worker_id,
                machine.need(now_ms),
                machine.is_migrating,
                machine.may_migrate(now_ms),
            )


def is_leaving(worker: Worker) -> bool:
    return worker.state is WorkerState.UP and worker.snapshot.draining


def _decodes(worker: Worker) -> bool:
    return worker.accepts and worker.role.can_decode


def leaving(running: Iterable[Running], fleet: Fleet, config: MoverConfig) -> list[str]:
    """Who should begin to leave the workers that drain, most context first."""
    chosen: list[str] = []
    for worker in filter(is_leaving, fleet):
        here = [one for one in running if one.worker_id == worker.worker_id]
        num_free = config.max_per_worker - sum(one.is_migrating for one in here)
        able = [one for one in here if one.may_migrate and any(_targets(one, worker, fleet))]
        able.sort(key=lambda one: (-one.num_context_tokens, one.request_id))
        chosen += [one.request_id for one in able[: max(num_free, 0)]]
    return chosen


def rebalanced(running: Iterable[Running], fleet: Fleet, config: MoverConfig) -> str | None:
    """The request whose move gains most, if any gains enough; none while one is under way."""
    running = list(running)
    if any(one.is_migrating for one in running):
        return None
    best: tuple[float, str] | None = None
    for one in running:
        source = fleet.get(one.worker_id)
        if source is None or not _decodes(source) or not one.may_migrate:
            continue
        for target in _targets(one, source, fleet):
            gain_ms = gain_of(one, source, target, fleet, config)
            if gain_ms >= config.min_gain_ms and (
                best is None or (-gain_ms, one.request_id) < best
            ):
                best = -gain_ms, one.request_id
    return None if best is None else best[1]


def _targets(one: Running, source: Worker, fleet: Fleet) -> Iterator[Worker]:
    for target in fleet:
        if (
            target is not source
            and _decodes(target)
            and target.worker_id not in one.need.avoid
            and pair_conflict(source.info, target.info) is None
            and one.need.bound_on(target) <= target.info.num_blocks
            and has_room(one.need, target)
        ):
            yield target


def gain_of(
    one: Running, source: Worker, target: Worker, fleet: Fleet, config: MoverConfig
) -> float:
    """What moving gains over the horizon, in sequences × ms, all decodes of both workers counted;
    minus infinity when the request itself would not be faster by the margin."""
    num, context = one.need.num_choices, one.num_context_tokens
    here, there = source.latency, _model_of(target, source)
    before = _step_ms(source, here), _step_ms(target, there)
    after = _step_ms(source, here, -num, -context), _step_ms(target, there, num, context)
    if before[0] < after[1] * config.min_speedup:
        return float("-inf")
    num_here, num_there = source.num_sequences, target.num_sequences
    load_before = num_here * before[0] + num_there * before[1]
    load_after = (num_here - num) * after[0] + (num_there + num) * after[1]
    num_steps = min(one.need.max_new_tokens, config.horizon_tokens)
    return num_steps * (load_before - load_after) - _cost_ms(one, source, target, fleet)


def _cost_ms(one: Running, source: Worker, target: Worker, fleet: Fleet) -> float:
    """The transfer, and a step of the target in which the rest is computed."""
    num_bytes = one.num_context_tokens * source.info.layout.token_bytes
    tails = one.need.num_choices * source.info.layout.block_size
    if one.need.num_choices > 1:
        tails += one.need.num_choices * one.need.num_output_tokens
    model = _model_of(target, source)
    stall_ms = model.prefill_ms(tails, one.need.prompt_len)
    transfer_ms = fleet.transfer_ms(source.worker_id, target.worker_id, num_bytes)
    return transfer_ms + (target.num_sequences + one.need.num_choices) * stall_ms


def _model_of(target: Worker, source: Worker) -> LatencyModel:
    """A worker that has done too little is taken to be like the one it would relieve."""
    return target.latency if target.latency.num_steps >= _MIN_EVIDENCE else source.latency


def _step_ms(worker: Worker, model: LatencyModel, num: int = 0, context: int = 0) -> float:
    tokens = worker.snapshot.context_tokens + context
    return model.decode_step_ms(worker.num_sequences + num, tokens)
