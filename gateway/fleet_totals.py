"""What all workers have counted while this gateway was there."""

from baton.totals import WorkerTotals
from baton.types import WorkerInfo


class FleetTotals:
    """`sum` only grows: a worker's counts begin anew with each start of it, and what one had
    counted before this gateway first heard of it is left out."""

    def __init__(self) -> None:
        self.sum = WorkerTotals()
        self._last: dict[str, tuple[bytes, WorkerTotals]] = {}  # by worker: incarnation, its word

    def heard(self, info: WorkerInfo, totals: WorkerTotals) -> None:
        incarnation, before = self._last.get(info.worker_id, (b"", totals))
        if incarnation == info.incarnation:
            self.sum += totals - before
        self._last[info.worker_id] = (info.incarnation, totals)

    def forget(self, worker_id: str) -> None:
        self._last.pop(worker_id, None)
