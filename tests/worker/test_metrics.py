import urllib.request
from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

from prometheus_client import CollectorRegistry

from baton.engine.events import LegFailed, LegPreempted, StepOutput
from baton.errors import Cause
from baton.kvtransfer.lease import COUNTS
from baton.kvtransfer.staging import StagingBudget
from baton.messages import Imported, KvFailed, StepBatch
from baton.telemetry import WorkerMetrics
from baton.types import LegId, Role, StepTiming, TransferStats, WorkerSnapshot
from baton.worker.metrics import MetricsObserver, MetricsServer

LEG = LegId("r", 1)
SNAPSHOT = WorkerSnapshot(
    Role.DECODE, num_running=3, num_waiting=2, free_blocks=5, total_blocks=9, num_leases=4
)


def test_what_a_worker_did_is_served() -> None:
    server = MetricsServer("127.0.0.1", 0)
    events = (LegPreempted(LEG), LegFailed(LEG, Cause.STEP_FAILED, "boom"))
    server.observer.stepped(StepOutput(events, SNAPSHOT, StepTiming(7, 0, 1, 10, 5.0)))
    imported = Imported(LEG, TransferStats("ucx", num_bytes=100, num_frames=4, duration_ms=3.0))
    failed = KvFailed(LEG, 0, Cause.FRAME_CORRUPT, "checksum differs")
    server.observer.sent(StepBatch((imported, failed), SNAPSHOT))
    url = f"http://127.0.0.1:{server.port}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    server.close()
    for expected in (
        'baton_kv_blocks{state="free"} 5.0',
        'baton_kv_blocks{state="total"} 9.0',
        'baton_sequences{state="running"} 3.0',
        "baton_open_leases 4.0",
        "baton_preemptions_total 1.0",
        "baton_prefill_tokens_total 7.0",
        'baton_leg_failures_total{cause="step_failed"} 1.0',
        'baton_prefills_total{kind="remote"} 1.0',
        'baton_kv_transfer_bytes_total{transport="ucx"} 100.0',
        'baton_kv_transfer_seconds_count{transport="ucx"} 1.0',
        "baton_step_seconds_count 1.0",
        'baton_kv_frames_total{transport="ucx"} 4.0',
        'baton_kv_fetch_failures_total{cause="frame_corrupt"} 1.0',
    ):
        assert expected in lines


class Fetches(list[int]):
    num_waiting = 1
    staging_bytes = 600


def test_what_the_exchange_counts_is_passed_on_once() -> None:
    registry = CollectorRegistry()
    observer = MetricsObserver(WorkerMetrics(registry))
    leases, refusals = Counter({"opened": 2}), Counter({Cause.TICKET_FORGED: 1})
    exports, fetches = [1, 2], Fetches([3, 4, 5])
    producer = SimpleNamespace(leases=SimpleNamespace(counts=leases), refusals=refusals)
    staging = StagingBudget()
    staging.use(500)
    observer.watch(cast("Any", producer), exports, fetches, staging)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"baton_kv_{name}_total", labels)

    assert registry.get_sample_value("baton_kv_attachments") == 2
    assert registry.get_sample_value("baton_kv_fetches", {"state": "running"}) == 2
    assert registry.get_sample_value("baton_kv_fetches", {"state": "waiting"}) == 1
    assert registry.get_sample_value("baton_kv_staging_bytes", {"side": "export"}) == 500
    assert registry.get_sample_value("baton_kv_staging_bytes", {"side": "import"}) == 600
    assert [value("lease_events", event=name) for name in COUNTS] == [0.0] * len(COUNTS)
    for _ in range(2):
        observer.sent(StepBatch((), SNAPSHOT))
    leases.update(opened=1, expired=1)
    observer.stepped(StepOutput((), SNAPSHOT, None))
    assert value("lease_events", event="opened") == 3
    assert value("lease_events", event="expired") == 1
    assert value("attach_refusals", cause="ticket_forged") == 1
