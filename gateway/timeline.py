"""What a request did and when, gathered for its report."""

from dataclasses import replace

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
        self.report = RequestReport()
        self._opened_ms = opened_ms
        self._admitted_ms: float | None = None
        self._has_token = False

    @property
    def is_decoding(self) -> bool:
        """Tokens came, and from where is known: another one changes nothing."""
        return self._has_token and self.report.path is not PrefillPath.NONE

    def next_attempt(self) -> int:
        attempt = self.report.num_attempts + 1
        self.report = replace(self.report, num_attempts=attempt)
        return attempt

    def prefills_on(self, worker_id: str) -> None:
        self.report = replace(self.report, prefill_worker=worker_id)

    def decodes_on(self, worker_id: str) -> None:
        self.report = replace(self.report, decode_worker=worker_id)

    def admitted(
        self, num_cached_tokens: int, began_ms: float, prefix: PrefixFetched | None = None
    ) -> None:
        """A worker began with the prompt; only the first time counts, except for a prefix that was
        fetched."""
        if prefix is not None:
            self.report = replace(self.report, prefixes=(*self.report.prefixes, prefix))
        if self._admitted_ms is None:
            self._admitted_ms = now_ms = max(began_ms, self._opened_ms)
            self.report = replace(
                self.report,
                num_cached_tokens=num_cached_tokens,
                queue_ms=now_ms - self._opened_ms,
            )

    def imported(self, stats: TransferStats) -> None:
        known = self.report
        path = PrefillPath.REMOTE if known.path is PrefillPath.NONE else known.path
        self.report = replace(known, path=path, transfers=(*known.transfers, stats))

    def migrated(self, cause: MigrationCause, result: MigrationResult, num_bytes: int) -> None:
        migration = Migration(cause, result, num_bytes)
        self.report = replace(self.report, migrations=(*self.report.migrations, migration))

    def failed(self, cause: Cause) -> None:
        """A leg or a fetch ended early, and the request goes on if it can."""
        self.report = replace(self.report, failures=(*self.report.failures, cause))

    def committed(self, now_ms: float, computed_here: bool) -> None:
        """Tokens came; `computed_here`: from the worker that decodes, which fetched nothing."""
        if not self._has_token and self._admitted_ms is not None:
            self.report = replace(self.report, prefill_ms=now_ms - self._admitted_ms)
        self._has_token = True
        if computed_here and self.report.path is PrefillPath.NONE:
            self.report = replace(self.report, path=PrefillPath.LOCAL)
