"""Where a request goes: pure functions over the fleet as the gateway sees it now.

Everything is compared in predicted milliseconds (ARCHITECTURE §6). Remote: queue of P + prefill of
what P has not cached + transfer of what D has not cached. Local: queue of D + prefill there. Prefix
locality enters through the cached tokens and so competes with queues; it never filters. The part of
a transfer that fits into one TPOT of the objective is free when remote and local are compared,
because the client cannot see it. Workers of a pool that were not seen at work for long are hoped to
be fast (`baton.gateway.predictions`), so that nobody is left out for ever.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

from baton.compat import pair_conflict
from baton.errors import Cause
from baton.gateway.backend import WorkerState
from baton.gateway.predictions import Hope, prefill_ms, queue_ms
from baton.gateway.prefix_plan import PrefixConfig, PrefixPlan, plan_prefix
from baton.gateway.workers import Fleet, Worker, num_blocks
from baton.latency import LatencyModel
from baton.messages import PrefixSource

_MAX_LINE = (
    2  # local requests that wait at a worker; more wait at the gateway, earliest deadline first
)


@dataclass(frozen=True, slots=True)
class RouterConfig:
    slo_tpot_ms: float = 200.0
    prefers_faster_local: bool = True  # False: local prefill only when there is no remote route
    # A local prefill must be faster by this much: it takes decode time from others, and predictions
    # err.
    local_margin: float = 0.25
    local_margin_ms: float = 5.0
    decode_horizon_tokens: int = 64  # decode steps weighed against a transfer
    prefixes: PrefixConfig = field(default_factory=PrefixConfig)


@dataclass(frozen=True, slots=True)
class Need:
    """What a request needs from here on."""

    prompt_len: int
    num_choices: int = 1  # still open
    num_output_tokens: int = 0  # committed, of the longest choice; recomputed where it resumes
    max_new_tokens: int = 16  # of the choice with most to go
    total_len: int = 0  # prompt and max_tokens; 0 = the context and max_new_tokens
    hits: Mapping[str, int] = field(default_factory=dict)  # worker → tokens of its cached prefix
    fingerprint: bytes | None = None  # None = nothing of it was computed yet: any model version
    avoid: frozenset[str] = frozenset()  # refused or failed it a moment ago

    @property
    def context_len(self) -> int:
        return self.prompt_len + self.num_output_tokens

    def cached_on(self, worker: Worker) -> int:
        """Prompt tokens it need not compute: whole blocks, and never the last token."""
        block_size = worker.info.layout.block_size
        hit = min(self.hits.get(worker.worker_id, 0), self.prompt_len - 1)
        return max(hit, 0) // block_size * block_size

    def blocks_on(self, worker: Worker) -> int:
        """Blocks to start decoding there: the context and one growth block per choice."""
        block_size = worker.info.layout.block_size
        prompt = num_blocks(self.prompt_len, block_size)
        per_choice = num_blocks(self.context_len, block_size) - prompt + 1
        return prompt + self.num_choices * per_choice

    def whole_on(self, worker: Worker) -> int:
        """Blocks without which it could never finish there; its other choices can take turns."""
        total = self.total_len or self.context_len + self.max_new_tokens
        longest = min(total, worker.info.max_model_len) - 1  # the last token is never run
        return num_blocks(max(longest, self.prompt_len), worker.info.layout.block_size)

    def bound_on(self, worker: Worker) -> int:
        """Blocks without which it could never be bound there: its choices start at once."""
        return max(self.whole_on(worker), self.blocks_on(worker))


@dataclass(frozen=True, slots=True)
class RouteDecision:
    """Where to prefill. `decode_worker` is a forecast (D is bound late) or, for a local route, the
    worker itself."""

    remote: bool
    worker_id: str
    decode_worker_id: str
    num_cached_tokens: int
    predicted_ttft_ms: float
    predicted_ms: float  # as compared: with the transfer's visible part
    reason: str
    prefix: PrefixPlan | None = None  # what `worker_id` fetches from another instead of computing
    source: PrefixSource | None = None  # the same as it is told; filled in by the dispatcher


@dataclass(frozen=True, slots=True)
class DecodeDecision:
    worker_id: str
    num_cached_tokens: int
    num_bytes: int  # to transfer
    lead_ms: float  # bind when the prefill is predicted to end within this


@dataclass(frozen=True, slots=True)
class Refusal:
    """NO_ROOM: later, perhaps. NO_WORKER: nobody who could is up. NEVER_FITS: nobody ever could."""

    cause: Cause
    message: str


_FULL = Refusal(Cause.NO_ROOM, "every worker is full")
_NEVER_FITS = Refusal(Cause.NEVER_FITS, "the request needs more KV blocks than any worker has")


def plan(need: Need, fleet: Fleet, config: RouterConfig) -> RouteDecision | Refusal:
    """The route with the least predicted time."""
    usable = list(_usable(need, fleet))
    if not usable:
        return _refusal(need, fleet)
    able = [worker for worker in usable if worker.worker_id not in need.avoid]
    consumers = [w for w in usable if w.role.can_decode and need.whole_on(w) <= w.info.num_blocks]
    if not consumers:
        # Nobody decodes: prefill workers do, rather than refuse.
        finishers = [w for w in usable if need.whole_on(w) <= w.info.num_blocks]
        if not finishers:
            return _refusal(need, fleet)
        alone = [_local(need, w, fleet, config, "no decode worker") for w in finishers if w in able]
        return min(alone, key=_order, default=_FULL)
    producers = [worker for worker in able if worker.role.can_prefill]
    pairs = _pairs(need, producers, consumers, fleet, config)
    remote = min(pairs, key=_order, default=None)
    # Without a remote route a short line at a full worker is better than waiting here.
    here = [w for w in consumers if w in able and (has_room(need, w) or _short_line(w))]
    if remote is None:
        alone = [_local(need, worker, fleet, config, "no prefill worker") for worker in here]
        return min(alone, key=_order, default=_FULL)
    if not config.prefers_faster_local:
        return remote
    better = [
        decision
        for worker in here
        for decision in (_local(need, worker, fleet, config, "predicted faster"),)
        if _worth_it(decision, worker, remote, need, fleet, config)
    ]
    return min([*better, remote], key=_order)


def pick_decode(
    need: Need, source: Worker, fleet: Fleet, config: RouterConfig
) -> DecodeDecision | Refusal:
    """The decode worker for KV that `source` holds: must have room; least predicted time of the
    next steps plus the transfer, then most free blocks. Refused with NO_WORKER, `source` may go on
    by itself; with NEVER_FITS it is too small for that."""
    able = [
        worker
        for worker in _usable(need, fleet)
        if worker.role.can_decode and need.bound_on(worker) <= worker.info.num_blocks
        if pair_conflict(source.info, worker.info) is None
    ]
    if not able:
        is_alone = need.whole_on(source) <= source.info.num_blocks
        cause = Cause.NO_WORKER if is_alone else Cause.NEVER_FITS
        return Refusal(cause, "no decode worker that is large enough is up")
    roomy = [w for w in able if w.worker_id not in need.avoid and has_room(need, w)]
    if not roomy:
        return Refusal(Cause.NO_ROOM, "no decode worker has room")
    hope = Hope(
        roomy,
        lambda worker: worker.decoded_at_ms,
        lambda model: model.decode_step_ms(need.num_choices, need.num_choices * need.context_len),
    )
    scored = [(_decode_ms(need, source, w, fleet, config, hope), -w.free_blocks, w) for w in roomy]
    _, _, chosen = min(scored, key=lambda entry: (entry[0], entry[1], entry[2].worker_id))
    num_bytes = transfer_bytes(need, source, chosen)
    link = fleet.link(source.worker_id, chosen.worker_id).model
    step_ms = _step_with(need, chosen, chosen.latency)
    transfer_ms = _transfer_ms(need, source, chosen, fleet)
    return DecodeDecision(
        chosen.worker_id,
        need.cached_on(chosen),
        num_bytes,
        lead_ms=max(transfer_ms, link.backlog_ms() + 2 * step_ms),
    )


def local_ms(need: Need, worker: Worker, fleet: Fleet, num_cached_tokens: int) -> float:
    """Predicted time until `worker` has computed the prompt itself, from `num_cached_tokens` on."""
    return queue_ms(worker, fleet) + prefill_ms(
        worker, fleet, need.context_len - num_cached_tokens, num_cached_tokens
    )


def has_room(need: Need, worker: Worker) -> bool:
    needed = need.blocks_on(worker) - need.cached_on(worker) // worker.info.layout.block_size
    needed += worker.snapshot.num_running  # who runs may need a block in the next step
    fits = worker.num_sequences + need.num_choices <= worker.info.max_num_seqs
    # A worker that has nothing to do never refuses for its number of sequences.
    return worker.free_blocks >= needed and (fits or worker.num_sequences == 0)


def transfer_bytes(need: Need, source: Worker, target: Worker) -> int:
    if source.worker_id == target.worker_id:
        return 0
    return (need.prompt_len - need.cached_on(target)) * source.info.layout.token_bytes


def _usable(need: Need, fleet: Fleet) -> Iterator[Worker]:
    """Up, of the right model version, and large enough."""
    return (worker for worker in fleet if worker.accepts and _is_for(need, worker))


def _is_for(need: Need, worker: Worker) -> bool:
    """Has the right model version, and room for the prompt."""
    return (
        _has_model(need, worker)
        and num_blocks(need.prompt_len, worker.info.layout.block_size) <= worker.info.num_blocks
        and need.context_len < worker.info.max_model_len
    )


def _has_model(need: Need, worker: Worker) -> bool:
    return need.fingerprint in {None, worker.info.fingerprint}


def _short_line(worker: Worker) -> bool:
    return worker.snapshot.num_waiting + len(worker.pending_tokens) < _MAX_LINE


def _refusal(need: Need, fleet: Fleet) -> Refusal:
    """When nobody who accepts requests is large enough for this one."""
    up = [worker for worker in fleet if worker.state is WorkerState.UP]
    able = [w for w in fleet if _is_for(need, w) and need.whole_on(w) <= w.info.num_blocks]
    if any(w.accepts and _has_model(need, w) for w in up):
        if able:
            return Refusal(Cause.NO_WORKER, "no worker that is large enough is up")
        return _NEVER_FITS
    if up:
        return Refusal(Cause.DRAINING, "every worker is draining or serves another model version")
    return Refusal(Cause.NO_WORKER, "no worker is up")


def _order(decision: RouteDecision) -> tuple[float, bool, str, str]:
    return (
        decision.predicted_ms,
        decision.remote,  # a tie goes to the route without a transfer
        decision.worker_id,
        decision.decode_worker_id,
    )


def _pairs(
    need: Need,
    producers: list[Worker],
    consumers: list[Worker],
    fleet: Fleet,
    config: RouterConfig,
) -> Iterator[RouteDecision]:
    hope = Hope(
        producers,
        lambda worker: worker.prefilled_at_ms,
        lambda model: model.prefill_ms(need.context_len),
    )
    for source in producers:
        cached = need.cached_on(source)
        prefix = plan_prefix(need.hits, need.prompt_len, cached, source, fleet, config.prefixes)
        ttft = queue_ms(source, fleet)
        ttft += prefill_ms(source, fleet, need.prompt_len - cached, cached)
        ttft -= 0.0 if prefix is None else prefix.saved_ms
        uncached = source.queued_tokens + need.prompt_len - cached
        ttft = hope.hoped_ms(source, ttft, partial(_prefill_ms, uncached, cached))
        for target in consumers:
            if target is source or need.bound_on(target) > target.info.num_blocks:
                continue
            if pair_conflict(source.info, target.info) is not None:
                continue
            transfer = _transfer_ms(need, source, target, fleet)
            yield RouteDecision(
                remote=True,
                worker_id=source.worker_id,
                decode_worker_id=target.worker_id,
                num_cached_tokens=cached,
                predicted_ttft_ms=ttft,
                predicted_ms=ttft + transfer,
                reason="least predicted time",
                prefix=prefix,
            )


def _local(
    need: Need, worker: Worker, fleet: Fleet, config: RouterConfig, reason: str
) -> RouteDecision:
    cached = need.cached_on(worker)
    prefix = plan_prefix(need.hits, need.prompt_len, cached, worker, fleet, config.prefixes)
    ttft = local_ms(need, worker, fleet, cached)
    ttft -= 0.0 if prefix is None else prefix.saved_ms
    return RouteDecision(
        remote=False,
        worker_id=worker.worker_id,
        decode_worker_id=worker.worker_id,
        num_cached_tokens=cached,
        predicted_ttft_ms=ttft,
        predicted_ms=ttft,
        reason=reason,
        prefix=prefix,
    )


def _worth_it(
    local: RouteDecision,
    worker: Worker,
    remote: RouteDecision,
    need: Need,
    fleet: Fleet,
    config: RouterConfig,
) -> bool:
    """A local prefill that fits now, is faster as the client sees it, and keeps the running
    sequences' TPOT."""
    if not has_room(need, worker):
        return False
    if worker.role.can_prefill:
        return local.predicted_ms <= remote.predicted_ms
    visible = max(remote.predicted_ttft_ms, remote.predicted_ms - config.slo_tpot_ms)
    if local.predicted_ms * (1 + config.local_margin) + config.local_margin_ms >= visible:
        return False
    snapshot = worker.snapshot
    chunk = min(need.context_len - local.num_cached_tokens, worker.latency.chunk_tokens)
    step = worker.latency.decode_step_ms(snapshot.num_running, snapshot.context_tokens)
    step += prefill_ms(worker, fleet, chunk, need.context_len - chunk)
    return snapshot.num_running == 0 or step <= config.slo_tpot_ms


def _decode_ms(
    need: Need, source: Worker, worker: Worker, fleet: Fleet, config: RouterConfig, hope: Hope
) -> float:
    num_steps = min(need.max_new_tokens, config.decode_horizon_tokens)
    step = partial(_step_with, need, worker)
    step_ms = hope.hoped_ms(worker, step(worker.latency), step)
    return step_ms * num_steps + _transfer_ms(need, source, worker, fleet)


def _step_with(need: Need, worker: Worker, model: LatencyModel) -> float:
    """A decode step there with this request on board."""
    context = worker.snapshot.context_tokens + need.num_choices * need.context_len
    return model.decode_step_ms(worker.num_sequences + need.num_choices, context)


def _transfer_ms(need: Need, source: Worker, target: Worker, fleet: Fleet) -> float:
    if source.worker_id == target.worker_id:
        return 0.0
    num_bytes = transfer_bytes(need, source, target)
    return fleet.transfer_ms(source.worker_id, target.worker_id, num_bytes)


def _prefill_ms(num_uncached: int, num_cached: int, model: LatencyModel) -> float:
    return model.prefill_ms(num_uncached, num_cached)
