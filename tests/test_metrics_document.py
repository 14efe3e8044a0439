"""docs/metrics.md names exactly what the processes expose: series, types and labels."""

import re
import urllib.request
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.metrics import MetricWrapperBase

from baton.gateway.link_metrics import LinkMetrics
from baton.histogram import LoopHistogram
from baton.telemetry import GatewayMetrics, WorkerMetrics
from baton.vllm_metrics import VllmMetrics
from baton.worker.metrics import MetricsServer

DOCUMENT = Path(__file__).parents[1] / "docs/metrics.md"
NAME = r"`(?P<name>(baton_|vllm:)\w+)`"
ROW = re.compile(rf"^\| {NAME} \| (?P<type>\w+) \| (?P<labels>[^|]*)\| \S.* \|$")

Series = dict[str, tuple[str, tuple[str, ...]]]  # name → type, labels


def documented(section: str) -> Series:
    text = DOCUMENT.read_text(encoding="utf-8")
    (body,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    lines = [line for line in body.splitlines() if line.startswith("| `")]
    rows = [row for line in lines if (row := ROW.match(line))]
    assert len(rows) == len(lines), "a row has another shape"
    return {
        row["name"]: (row["type"], tuple(re.findall(r"`(\w+)`", row["labels"]))) for row in rows
    }


def named(name: str, kind: str, labels: Iterable[str]) -> Series:
    return {name + "_total" * (kind == "counter"): (kind, tuple(labels))}


def declared(registry: CollectorRegistry) -> Series:
    found: Series = {}
    for collector in registry._collector_to_names:
        if isinstance(collector, LoopHistogram):
            found |= of_families(collector.describe())
            continue
        assert isinstance(collector, MetricWrapperBase)
        (metric,) = collector.describe()
        found |= named(metric.name, metric.type, collector._labelnames)
    return found


def of_families(metrics: Iterable[Metric]) -> Series:
    found: Series = {}
    for metric in metrics:
        found |= named(metric.name, metric.type, metric._labelnames)  # type: ignore[attr-defined]
    return found


def exposed(text: str) -> dict[str, str]:
    """Name → type of Baton's own series in what `/metrics` answers, without those of histograms'
    and counters' creation times."""
    types = re.findall(r"^# TYPE (baton_\w+) (\w+)$", text, re.MULTILINE)
    return {name: kind for name, kind in types if not name.endswith("_created")}


def test_the_gateways() -> None:
    registry = CollectorRegistry()
    GatewayMetrics(registry)
    links = of_families(LinkMetrics(lambda: ()).collect())
    assert documented("Gateway") == declared(registry) | links


def test_the_gateways_under_vllms_names() -> None:
    registry = CollectorRegistry()
    VllmMetrics(registry)
    common = ("model_name", "engine")
    found = {
        name: (kind, tuple(label for label in labels if label not in common))
        for name, (kind, labels) in declared(registry).items()
    }
    assert documented("Under vLLM's names") == found


def test_every_series_is_set_somewhere() -> None:
    root = DOCUMENT.parents[1]
    rooms = ("baton", "gateway", "kvtransfer", "prefill_worker", "decode_worker")
    files = {file for room in rooms for file in (root / room).rglob("*.py")}
    files.remove(root / "baton/telemetry.py")
    code = "\n".join(file.read_text(encoding="utf-8") for file in sorted(files))
    for metrics in (GatewayMetrics(CollectorRegistry()), WorkerMetrics(CollectorRegistry())):
        names = {name for name, it in vars(metrics).items() if isinstance(it, MetricWrapperBase)}
        assert names
        assert {name for name in names if not re.search(rf"\.{name}\b", code)} == set()


def test_a_workers() -> None:
    server = MetricsServer("127.0.0.1", 0)
    try:
        registry = CollectorRegistry()
        WorkerMetrics(registry)
        with urllib.request.urlopen(
            f"http://127.0.0.1:{server.port}/metrics", timeout=10
        ) as answer:
            types = exposed(answer.read().decode())
    finally:
        server.close()
    rows = documented("Worker")
    assert rows == declared(registry)
    assert {name: kind for name, (kind, _) in rows.items()} == types
