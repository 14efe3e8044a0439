"""How long a worker is predicted to take, as router and prefix planner ask it."""

from baton.gateway.workers import Fleet, Worker

_MIN_EVIDENCE = 3  # prefill steps before a worker's own model is believed over its peers'


def queue_ms(worker: Worker, fleet: Fleet) -> float:
    return prefill_ms(worker, fleet, worker.queued_tokens, 0)


def prefill_ms(worker: Worker, fleet: Fleet, num_uncached: int, num_cached: int) -> float:
    """By the worker's own model, or, while it has prefilled too little, the slowest of its peers'.

    Otherwise a decode worker that never prefilled would look as fast as the prior.
    """
    if worker.latency.num_prefill_steps >= _MIN_EVIDENCE:
        return worker.latency.prefill_ms(num_uncached, num_cached)
    known = [
        peer.latency.prefill_ms(num_uncached, num_cached)
        for peer in fleet
        if peer.info.fingerprint == worker.info.fingerprint
        and peer.latency.num_prefill_steps >= _MIN_EVIDENCE
    ]
    return max(known, default=worker.latency.prefill_ms(num_uncached, num_cached))
