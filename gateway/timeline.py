"""What a request did and when, gathered for its report."""

from dataclasses import replace
from typing import Any

from baton.errors import Cause
from baton.gateway.backend import (
    Migration,
    MigrationCause,
    MigrationResult,
    PrefillPath,
    RequestReport,
)
from baton.messages import PrefixFetched
from baton.types import TransferStats


class Timeline:
    """Times are the caller's monotonic milliseconds."""

    def __init__(self, opened_ms: float) -> None:
        self.num_attempts = 0
        self._report = RequestReport()
        self._news: dict[str, Any] = {}  # not in `_report` yet
        self._opened_ms = opened_ms
        self._admitted_ms: float | None = None
        self._has_token = False

    @property
    def report(self) -> RequestReport:
        """Made when it is asked for, because much changes at once and a copy is not cheap."""
        if self._news:
            self._report = replace(self._report, **self._news)
            self._news = {}
        return self._report

    @property
    def is_decoding(self) -> bool:
        """Tokens came, and from where is known: another one changes nothing."""
        return self._has_token and self.report.path is not PrefillPath.NONE

    def next_attempt(self) -> int:
        self.num_attempts += 1
        self._news["num_attempts"] = self.num_attempts
        return self.num_attempts

    def prefills_on(self, worker_id: str) -> None:
        self._news["prefill_worker"] = worker_id

    def decodes_on(self, worker_id: str) -> None:
        self._news["decode_worker"] = worker_id

    def admitted(
        self, num_cached_tokens: int, began_ms: float, prefix: PrefixFetched | None = None
    ) -> None:
        """A worker began with the prompt; only the first time counts, except for a prefix that was
        fetched."""
        if prefix is not None:
            self._news["prefixes"] = (*self.report.prefixes, prefix)
        if self._admitted_ms is None:
            self._admitted_ms = now_ms = max(began_ms, self._opened_ms)
            self._news["num_cached_tokens"] = num_cached_tokens
            self._news["queue_ms"] = now_ms - self._opened_ms

    def imported(self, stats: TransferStats) -> None:
        known = self.report
        if known.path is PrefillPath.NONE:
            self._news["path"] = PrefillPath.REMOTE
        self._news["transfers"] = (*known.transfers, stats)

    def migrated(self, cause: MigrationCause, result: MigrationResult, num_bytes: int) -> None:
        migration = Migration(cause, result, num_bytes)
        self._news["migrations"] = (*self.report.migrations, migration)

    def failed(self, cause: Cause) -> None:
        """A leg or a fetch ended early, and the request goes on if it can."""
        self._news["failures"] = (*self.report.failures, cause)

    def committed(self, now_ms: float, computed_here: bool) -> None:
        """Tokens came; `computed_here`: from the worker that decodes, which fetched nothing."""
        if computed_here and self.report.path is PrefillPath.NONE:
            self._news["path"] = PrefillPath.LOCAL
        if not self._has_token and self._admitted_ms is not None:
            self._news["prefill_ms"] = now_ms - self._admitted_ms
        self._has_token = True
