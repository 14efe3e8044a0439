"""The requests that are being answered now, and how soon room is made for more."""

import math
from typing import Protocol

from baton.errors import BatonError, Cause

_SMOOTHING = 0.2  # weight of the newest interval between two endings
_MAX_RETRY_AFTER_S = 60


class Answer(Protocol):
    def fail(self, error: BatonError) -> None:
        """End with this error instead of the rest."""
        ...


class InFlight:
    """Times are the caller's monotonic seconds."""

    def __init__(self) -> None:
        self._open: set[Answer] = set()
        self._interval_s: float | None = None  # between two endings, smoothed
        self._last_end_s: float | None = None
        self._down_since_s: float | None = None
        self._drain_until_s: float | None = None

    def __len__(self) -> int:
        return len(self._open)

    def begin(self, answer: Answer) -> None:
        self._open.add(answer)

    def end(self, answer: Answer, now_s: float) -> None:
        """Idempotent."""
        if answer not in self._open:
            return
        self._open.remove(answer)
        self._down_since_s = None
        if self._last_end_s is not None:
            interval_s = now_s - self._last_end_s
            last = interval_s if self._interval_s is None else self._interval_s
            self._interval_s = last + _SMOOTHING * (interval_s - last)
        self._last_end_s = now_s if self._open else None  # idle time is no interval

    def drains_until(self, until_s: float) -> None:
        self._drain_until_s = until_s

    def fail_all(self, error: BatonError) -> None:
        for answer in list(self._open):
            answer.fail(error)

    def retry_after_s(self, cause: Cause, now_s: float) -> int:
        """Whole seconds, at least 1, after which a request refused with `cause` has a chance.

        Draining: when this gateway is gone and another has its address. No worker: as long as it
        has lasted already. No room: until half of what is open has ended, at the present rate.
        """
        if cause is Cause.DRAINING and self._drain_until_s is not None:
            wait_s = self._drain_until_s - now_s
        elif cause is Cause.NO_WORKER:
            if self._down_since_s is None:
                self._down_since_s = now_s
            wait_s = now_s - self._down_since_s
        else:
            wait_s = (self._interval_s or 0.0) * len(self._open) / 2
        return min(max(math.ceil(wait_s), 1), _MAX_RETRY_AFTER_S)
