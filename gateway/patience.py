"""What has gone wrong for one request so far, and how much more of it is borne."""

from baton.errors import Cause, Fault
from baton.gateway.legs import MachineConfig
from baton.gateway.router import Refusal


class Patience:
    """Counts failures, deaths and waiting of one request against its limits."""

    def __init__(self, config: MachineConfig) -> None:
        self._config = config
        self._avoid: dict[str, float] = {}  # worker → until when
        self._deaths: set[bytes] = set()  # incarnations lost while they computed it
        self._suspect_since_ms: float | None = None
        self._waiting_since_ms: float | None = None
        self._num_failures = 0

    # ── workers to leave alone for a while ───────────────────────────────────────────────────────

    def avoid(self, worker_id: str, now_ms: float, for_ms: float) -> None:
        self._avoid[worker_id] = now_ms + for_ms

    def avoided(self, now_ms: float) -> frozenset[str]:
        self._avoid = {worker: t for worker, t in self._avoid.items() if t > now_ms}
        return frozenset(self._avoid)

    # ── failures ─────────────────────────────────────────────────────────────────────────────────

    def failed(self, worker_id: str, cause: Cause, now_ms: float) -> bool:
        """A leg failed there. True when another try is worth it."""
        self.avoid(worker_id, now_ms, self._config.retry_delay_ms)
        if cause is Cause.DEADLINE_EXCEEDED:
            return True  # of the leg alone; the request's own deadline is watched elsewhere
        if cause.info.fault is Fault.CAPACITY:
            # Full or draining is no failure, but waiting has its limit however often it is said.
            if self._waiting_since_ms is None:
                self._waiting_since_ms = now_ms
            return now_ms < self._waiting_since_ms + self._config.queue_timeout_ms
        self._num_failures += 1
        return cause.retryable and self._num_failures <= self._config.max_failures

    def lost(self, incarnation: bytes) -> None:
        self._deaths.add(incarnation)

    def is_back(self, incarnation: bytes) -> bool:
        """It lives. True when that clears the request of something."""
        known = incarnation in self._deaths
        self._deaths.discard(incarnation)
        return known

    def verdict_at_ms(self, now_ms: float) -> float | None:
        """None unless so many workers were lost computing it that it may be what kills them. Then:
        until when one of them has to come back, or the request is blamed."""
        if len(self._deaths) < self._config.max_deaths:
            self._suspect_since_ms = None
            return None
        if self._suspect_since_ms is None:
            self._suspect_since_ms = now_ms
        return self._suspect_since_ms + self._config.acquittal_ms

    # ── waiting ──────────────────────────────────────────────────────────────────────────────────

    def got_on(self) -> None:
        """Blocks were reserved for it: the wait is over."""
        self._waiting_since_ms = None

    def wait_until_ms(self, refusal: Refusal, now_ms: float) -> float:
        """Until when it may wait for what was refused."""
        if self._waiting_since_ms is None:
            self._waiting_since_ms = now_ms
        nobody = refusal.cause in {Cause.NO_WORKER, Cause.DRAINING}
        config = self._config
        for_ms = config.reroute_wait_ms if nobody else config.queue_timeout_ms
        return self._waiting_since_ms + for_ms

    def next_retry_ms(self, now_ms: float) -> float:
        """When the first avoided worker may be asked again."""
        return min((t for t in self._avoid.values() if t > now_ms), default=float("inf"))
