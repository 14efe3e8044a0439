"""Whether a worker should fetch a prefix that another one holds instead of computing it: pure
functions over the fleet, like the router's.

Compared are the time to fetch what the target lacks (over that link, behind what is in flight on
it) and the time to compute it. A fetch that is chosen has a deadline, because locality is a hint
and links slow down: when computing would have been done, the target computes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from baton.compat import pair_conflict
from baton.gateway.predictions import prefill_ms
from baton.gateway.workers import Fleet, Worker
from baton.types import FETCH_BY_HASH, HASH_TOKENS

PrefixFetching = Literal["auto", "always", "off"]


@dataclass(frozen=True, slots=True)
class PrefixConfig:
    fetching: PrefixFetching = "auto"
    # A fetch must be faster by this much: it takes the source's time too, and predictions err.
    margin: float = 0.25
    margin_ms: float = 5.0
    min_deadline_ms: float = 100.0  # workers' timers are not finer


@dataclass(frozen=True, slots=True)
class PrefixPlan:
    """What a target fetches, from whom."""

    worker_id: str
    num_tokens: int  # of the prefix, what the target has itself included
    num_bytes: int  # to move
    predicted_ms: float  # of the fetch
    saved_ms: float  # computing the same takes so much longer; negative when it is done anyway
    deadline_ms: int  # 0 = none


def plan_prefix(
    hits: Mapping[str, int],
    prompt_len: int,
    num_cached: int,
    target: Worker,
    fleet: Fleet,
    config: PrefixConfig,
) -> PrefixPlan | None:
    """The fetch that saves most, or None when computing is predicted to be as fast.

    Args:
        hits: worker → tokens of the prompt's prefix that it is known to hold.
        num_cached: tokens that `target` holds itself.
    """
    if config.fetching == "off" or not hits:
        return None
    plans = [
        _plan(num_tokens, prompt_len, num_cached, source, target, fleet, config)
        for source, num_tokens in _holders(hits, prompt_len, num_cached, target, fleet)
    ]
    best = max(plans, key=lambda plan: (plan.saved_ms, plan.worker_id), default=None)
    if best is None or config.fetching == "always":
        return best
    is_worth_it = best.saved_ms > best.predicted_ms * config.margin + config.margin_ms
    return best if is_worth_it else None


def _holders(
    hits: Mapping[str, int], prompt_len: int, num_cached: int, target: Worker, fleet: Fleet
) -> Iterator[tuple[Worker, int]]:
    """Who holds at least a block more than `target`, and how many tokens: never the last one."""
    for source in fleet:
        if source.worker_id == target.worker_id or not source.accepts:
            continue
        if FETCH_BY_HASH not in source.info.capabilities & target.info.capabilities:
            continue
        if pair_conflict(source.info, target.info) is not None:
            continue
        num_tokens = min(hits.get(source.worker_id, 0), prompt_len - 1)
        num_tokens = num_tokens // HASH_TOKENS * HASH_TOKENS
        if num_tokens - num_cached >= target.info.layout.block_size:
            yield source, num_tokens


def _plan(
    num_tokens: int,
    prompt_len: int,
    num_cached: int,
    source: Worker,
    target: Worker,
    fleet: Fleet,
    config: PrefixConfig,
) -> PrefixPlan:
    num_bytes = (num_tokens - num_cached) * source.info.layout.token_bytes
    fetch_ms = fleet.transfer_ms(source.worker_id, target.worker_id, num_bytes)
    compute_ms = prefill_ms(target, fleet, prompt_len - num_cached, num_cached)
    compute_ms -= prefill_ms(target, fleet, prompt_len - num_tokens, num_tokens)
    deadline_ms = 0.0
    if config.fetching == "auto":
        deadline_ms = max(compute_ms, config.min_deadline_ms)
    return PrefixPlan(
        source.worker_id,
        num_tokens,
        num_bytes,
        fetch_ms,
        compute_ms - fetch_ms,
        int(deadline_ms),
    )
