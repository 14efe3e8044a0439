"""Which fetches may run now: a bounded number per link and in all, and bounded bytes on their way.
Pure; times are integer milliseconds of one monotonic clock."""

from collections.abc import Hashable
from dataclasses import dataclass

from baton.kvtransfer.staging import DEFAULT_STAGING_BYTES
from baton.types import LegId

MAX_PER_LINK = 8
MAX_FETCHES = 32  # of a worker
MAX_BEHIND_MS = 2_000  # a link that is further behind than this gets no more: better compute here


@dataclass(frozen=True, slots=True)
class _Fetch:
    leg: LegId
    link: Hashable
    predicted_ms: float
    is_spare: bool  # gives way to others: a prefix that could be computed instead
    due_ms: float  # when it would be complete had it begun at once
    staging_bytes: int  # at most so much of it is on its way

    @property
    def order(self) -> tuple[bool, float]:
        """Short ones first, but none is overtaken for ever: who comes later is due later."""
        return self.is_spare, self.due_ms


class FetchQueue:
    """`ask` for each fetch, then `admit` after every `ask` and `leave`."""

    def __init__(
        self,
        max_per_link: int = MAX_PER_LINK,
        max_fetches: int = MAX_FETCHES,
        max_behind_ms: float = MAX_BEHIND_MS,
        max_staging_bytes: int = DEFAULT_STAGING_BYTES,
    ) -> None:
        self._max_per_link = max_per_link
        self._max_fetches = max_fetches
        self._max_behind_ms = max_behind_ms
        self._max_staging_bytes = max_staging_bytes
        self._waiting: dict[LegId, _Fetch] = {}
        self._running: dict[LegId, _Fetch] = {}

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def staging_bytes(self) -> int:
        """Of those that run. Readable from any thread."""
        return sum(fetch.staging_bytes for fetch in list(self._running.values()))

    def num_running(self, link: Hashable) -> int:
        return sum(fetch.link == link for fetch in self._running.values())

    def ask(
        self,
        leg: LegId,
        link: Hashable,
        predicted_ms: float,
        now_ms: int,
        is_spare: bool = False,
        staging_bytes: int = 0,
    ) -> bool:
        """False: it would have to wait, behind more than `max_behind_ms` of others on this link;
        it is not in the queue then."""
        assert leg not in self._waiting
        assert leg not in self._running
        behind_ms = sum(
            fetch.predicted_ms
            for fetch in (*self._running.values(), *self._waiting.values())
            if fetch.link == link
        )
        if not self._has_room(link) and behind_ms > self._max_behind_ms:
            return False
        due_ms = now_ms + predicted_ms
        self._waiting[leg] = _Fetch(leg, link, predicted_ms, is_spare, due_ms, staging_bytes)
        return True

    def leave(self, leg: LegId) -> None:
        """It has ended, or waits no more. Unknown legs are ignored."""
        self._waiting.pop(leg, None)
        self._running.pop(leg, None)

    def admit(self) -> list[LegId]:
        """Those that may begin now; they count as running from here on."""
        admitted: list[LegId] = []
        for fetch in sorted(self._waiting.values(), key=lambda fetch: fetch.order):
            if not self._has_room(fetch.link):
                continue
            if self._running and not self._has_staging(fetch):
                break  # nobody smaller passes it: it would wait for ever
            del self._waiting[fetch.leg]
            self._running[fetch.leg] = fetch
            admitted.append(fetch.leg)
        return admitted

    def _has_staging(self, fetch: _Fetch) -> bool:
        return self.staging_bytes + fetch.staging_bytes <= self._max_staging_bytes

    def _has_room(self, link: Hashable) -> bool:
        has_total = len(self._running) < self._max_fetches
        return has_total and self.num_running(link) < self._max_per_link
