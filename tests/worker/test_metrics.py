import urllib.request

from baton.engine.events import LegFailed, LegPreempted, StepOutput
from baton.errors import Cause
from baton.messages import Imported, StepBatch
from baton.types import LegId, Role, StepTiming, TransferStats, WorkerSnapshot
from baton.worker.metrics import MetricsServer

LEG = LegId("r", 1)
SNAPSHOT = WorkerSnapshot(
    Role.DECODE, num_running=3, num_waiting=2, free_blocks=5, total_blocks=9, num_leases=4
)


def test_what_a_worker_did_is_served() -> None:
    server = MetricsServer("127.0.0.1", 0)
    events = (LegPreempted(LEG), LegFailed(LEG, Cause.STEP_FAILED, "boom"))
    server.observer.stepped(StepOutput(events, SNAPSHOT, StepTiming(7, 0, 1, 10, 5.0)))
    imported = Imported(LEG, TransferStats("ucx", num_bytes=100, duration_ms=3.0))
    server.observer.sent(StepBatch((imported,), SNAPSHOT))
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
        'baton_kv_transfer_bytes_total{direction="in",transport="ucx"} 100.0',
        'baton_kv_transfer_seconds_count{transport="ucx"} 1.0',
        "baton_step_seconds_count 1.0",
    ):
        assert expected in lines
