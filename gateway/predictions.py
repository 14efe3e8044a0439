"""How long a worker is predicted to take, as router and prefix planner ask it.

A prediction is no better than what was seen of the worker, and nothing is seen of one that is
never chosen. So the choice among workers of a pool is made with hope: the longer others were seen
at work and this one was not, the more it is taken to be up to twice as fast as the fastest of them.
Who is as fast as it was learned to be is then known again; one that is n times slower than the
fastest is tried once in 1 + log2(2n - 1) half-lives, or sooner while the others have queues; by one
request at a time, because who is at work is about to be seen.
"""

from collections.abc import Callable, Iterable
from math import inf

from baton.gateway.workers import Fleet, Worker
from baton.latency import LatencyModel, trust_in, unseen_for

_HOPE = 0.5  # of the fastest one's time
# Prefill steps before a worker's own model is believed over its peers': of a prefill worker, and of
# one that is there for something else.
_ENOUGH = 3
_ENOUGH_ELSEWHERE = 16


def queue_ms(worker: Worker, fleet: Fleet) -> float:
    return prefill_ms(worker, fleet, worker.queued_tokens, 0)


def prefill_ms(worker: Worker, fleet: Fleet, num_uncached: int, num_cached: int) -> float:
    """By the worker's own model, or, while it has prefilled too little, the slowest of its peers'.

    Otherwise a decode worker that never prefilled would look as fast as the prior. It has to show
    more steps than a prefill worker, because a few small prompts say nothing of a long one; until
    then it is taken to be as slow as anybody was seen to be, if only once.
    """
    enough, least = (_ENOUGH, _ENOUGH) if worker.role.can_prefill else (_ENOUGH_ELSEWHERE, 1)
    own_ms = worker.latency.prefill_ms(num_uncached, num_cached)
    if worker.latency.num_prefill_steps >= enough:
        return own_ms
    known = (
        peer.latency.prefill_ms(num_uncached, num_cached)
        for peer in fleet
        if peer.info.fingerprint == worker.info.fingerprint
        and peer.latency.num_prefill_steps >= least
    )
    return max(known, default=own_ms)


class Hope:
    """See the module. Of one kind of work, which a `LatencyModel` predicts."""

    def __init__(
        self,
        peers: Iterable[Worker],
        seen_at_ms: Callable[[Worker], float],
        work_ms: Callable[[LatencyModel], float],
    ) -> None:
        """
        Args:
            peers: who may be chosen.
            seen_at_ms: when one was last seen at this work.
            work_ms: predicted duration of what is to be done, or like it.
        """
        peers = list(peers)
        self._seen_at_ms = seen_at_ms
        self._newest_ms = max(map(seen_at_ms, peers), default=-inf)
        known = [peer.latency for peer in peers if seen_at_ms(peer) > -inf]
        self._fastest = min(known, key=work_ms, default=None)

    def hoped_ms(
        self, worker: Worker, predicted_ms: float, work_ms: Callable[[LatencyModel], float]
    ) -> float:
        """What to take `worker` to need.

        Args:
            work_ms: predicted duration of what it would have to do.
        """
        if self._fastest is None or worker.is_at_work:
            return predicted_ms
        trust = trust_in(unseen_for(self._seen_at_ms(worker), self._newest_ms))
        hoped_ms = _HOPE * work_ms(self._fastest)
        return min(predicted_ms, hoped_ms + (predicted_ms - hoped_ms) * trust)
