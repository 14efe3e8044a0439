"""/metrics under vLLM's names: what its dashboards and inference routers read."""

import httpx
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from baton.totals import WorkerTotals
from baton.types import Role, SamplingParams, WorkerSnapshot
from baton.vllm_metrics import ChoiceSpan, RequestSpan, VllmMetrics

COMPLETIONS = "/v1/completions"
# The series that the panels of vLLM's shipped Grafana board ask for.
BOARD = (
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:request_time_per_output_token_seconds_bucket",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:kv_cache_usage_perc",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_generation_tokens_bucket",
    "vllm:request_success_total",
    "vllm:request_queue_time_seconds_sum",
    "vllm:request_prefill_time_seconds_sum",
    "vllm:request_decode_time_seconds_sum",
    "vllm:request_max_num_generation_tokens_sum",
)


def samples(text: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


async def test_the_board_finds_its_series(client: httpx.AsyncClient) -> None:
    answer = (await client.post(COMPLETIONS, json={"prompt": "Hi"})).json()
    await client.post(COMPLETIONS, json={"prompt": "Hi", "stream": True})
    await client.post(COMPLETIONS, json={"prompt": ""})
    found = samples((await client.get("/metrics")).text)
    model = answer["model"]
    for name in BOARD:
        assert name in found, name
        assert all(labels["model_name"] == model for labels, _ in found[name])
    [(labels, count)] = found["vllm:request_success_total"]
    assert (labels["finished_reason"], count) == (answer["choices"][0]["finish_reason"], 2)
    assert found["vllm:prompt_tokens_total"][0][1] == 2 * answer["usage"]["prompt_tokens"]
    assert found["vllm:generation_tokens_total"][0][1] == 2 * answer["usage"]["completion_tokens"]
    assert found["vllm:nixl_bytes_transferred_sum"][0][1] == 8192
    cache = found["vllm:cache_config_info"][0][0]
    assert cache["num_gpu_blocks"] == "18"
    http = {
        (labels["handler"], labels["status"]): value
        for labels, value in found["http_requests_total"]
    }
    assert http == {(COMPLETIONS, "2xx"): 2, (COMPLETIONS, "4xx"): 1}


def span(
    *reasons: str | None,
    is_error: bool = False,
    sampling: SamplingParams | None = None,
    num_fetched_tokens: int = 0,
) -> RequestSpan:
    """Opened at 1 s, queued to 2 s, first tokens at 4 s, five tokens a choice until 8 s."""
    return RequestSpan(
        started_s=0.0,
        opened_s=1.0,
        ended_s=9.0,
        queue_s=1.0,
        num_prompt_tokens=100,
        num_cached_tokens=32,
        num_fetched_tokens=num_fetched_tokens,
        sampling=sampling or SamplingParams(),
        choices=[ChoiceSpan(4.0, 8.0, 5, reason) for reason in reasons],
        is_error=is_error,
        transfers=(),
    )


@pytest.mark.parametrize(
    ("finished", "expected"),
    [
        (span("stop", "length"), {"stop": 1, "length": 1}),
        (span("stop", None), {"stop": 1, "abort": 1}),
        (span(None, is_error=True), {"error": 1}),
        (span(), {"abort": 1}),
        (span(is_error=True), {"error": 1}),
    ],
)
def test_how_choices_ended(finished: RequestSpan, expected: dict[str, float]) -> None:
    registry = CollectorRegistry()
    VllmMetrics(registry).finished("m", finished)
    for reason in ("stop", "length", "abort", "error"):
        labels = {"model_name": "m", "engine": "0", "finished_reason": reason}
        value = registry.get_sample_value("vllm:request_success_total", labels)
        assert (value or 0) == expected.get(reason, 0)


def test_phases_add_up() -> None:
    registry = CollectorRegistry()
    VllmMetrics(registry).finished("m", span("stop"))
    labels = {"model_name": "m", "engine": "0"}

    def total(phase: str) -> float | None:
        return registry.get_sample_value(f"vllm:{phase}_seconds_sum", labels)

    assert total("request_queue_time") == 1.0
    assert total("request_prefill_time") == 2.0
    assert total("request_decode_time") == 4.0
    assert total("request_inference_time") == 6.0
    assert total("e2e_request_latency") == 9.0
    assert total("request_time_per_output_token") == 1.0
    computed = registry.get_sample_value("vllm:request_prefill_kv_computed_tokens_sum", labels)
    assert computed == 68


def test_the_fleet_is_one_engine() -> None:
    registry = CollectorRegistry()
    metrics = VllmMetrics(registry)
    loads = [
        WorkerSnapshot(Role.DECODE, num_running=3, num_waiting=1, free_blocks=5, total_blocks=10),
        WorkerSnapshot(Role.PREFILL, num_waiting_for_kv=2, free_blocks=10, total_blocks=10),
    ]
    metrics.show("m", 16, loads, WorkerTotals(), num_parked=4)
    labels = {"model_name": "m", "engine": "0"}
    assert registry.get_sample_value("vllm:num_requests_running", labels) == 3
    assert registry.get_sample_value("vllm:num_requests_waiting", labels) == 7
    by_reason = "vllm:num_requests_waiting_by_reason"
    assert registry.get_sample_value(by_reason, {**labels, "reason": "capacity"}) == 5
    assert registry.get_sample_value(by_reason, {**labels, "reason": "deferred"}) == 2
    assert registry.get_sample_value("vllm:kv_cache_usage_perc", labels) == 0.25


def test_each_prompt_token_has_one_source() -> None:
    registry = CollectorRegistry()
    metrics = VllmMetrics(registry)
    metrics.finished("m", span("stop", num_fetched_tokens=12))
    metrics.finished("m", span("stop"))
    labels = {"model_name": "m", "engine": "0"}

    def total(name: str, **more: str) -> float | None:
        return registry.get_sample_value(f"vllm:{name}_total", {**labels, **more})

    by_source = {
        source: total("prompt_tokens_by_source", source=source)
        for source in ("local_compute", "local_cache_hit", "external_kv_transfer")
    }
    assert by_source == {"local_compute": 136, "local_cache_hit": 52, "external_kv_transfer": 12}
    assert total("prompt_tokens") == 200
    assert total("prompt_tokens_cached") == 64
    assert total("prompt_tokens_cached_by_source", source="device") == 52
    assert total("prompt_tokens_cached_by_source", source="p2p") == 12
    assert (total("prefix_cache_queries"), total("prefix_cache_hits")) == (200, 52)
    external = total("external_prefix_cache_queries"), total("external_prefix_cache_hits")
    assert external == (148, 12)


def test_what_workers_count_is_shown_once() -> None:
    registry = CollectorRegistry()
    metrics = VllmMetrics(registry)
    labels = {"model_name": "m", "engine": "0"}
    steps = [0] * 14
    steps[0], steps[2], steps[-1] = 5, 3, 1  # of 1, of 9 to 16, of more than 16384 tokens
    totals = WorkerTotals(4, 3, 2, 20_050, tuple(steps))
    for shown in (totals, totals, totals + WorkerTotals(num_preemptions=1)):
        metrics.show("m", 16, [], shown, 0)

    def value(name: str, **more: str) -> float | None:
        return registry.get_sample_value(f"vllm:{name}", {**labels, **more})

    assert value("num_preemptions_total") == 5
    assert value("nixl_num_failed_transfers_total") == 3
    assert value("nixl_num_kv_expired_reqs_total") == 2
    buckets = {le: value("iteration_tokens_total_bucket", le=le) for le in ("1.0", "8.0", "16.0")}
    assert buckets == {"1.0": 5, "8.0": 5, "16.0": 8}
    assert value("iteration_tokens_total_bucket", le="16384.0") == 8
    assert value("iteration_tokens_total_count") == 9
    assert value("iteration_tokens_total_sum") == 20_050
