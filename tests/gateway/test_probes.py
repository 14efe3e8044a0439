"""Everything that is not a generation: health, models, topology, metrics, documents."""

import re
import subprocess
import sys
from dataclasses import replace

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import baton
from baton.telemetry import PHASES
from tests.gateway.fakes import REPORT, FakeBackend
from tests.gateway.test_errors import COMPLETIONS, error_of


def samples(text: str) -> dict[tuple[str, ...], float]:
    """(name, label values…) → value."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.mark.parametrize("url", ["/health", "/ping"])
async def test_health_follows_the_backend(
    client: httpx.AsyncClient, backend: FakeBackend, url: str
) -> None:
    response = await client.get(url)
    assert (response.status_code, response.content) == (200, b"")
    backend.is_ready = False
    response = await client.get(url)
    error_of(response, 503)
    assert response.headers["retry-after"]


async def test_models(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    body = (await client.get("/v1/models")).json()
    (entry,) = body["data"]
    assert body["object"] == "list"
    assert (entry["id"], entry["object"], entry["max_model_len"]) == ("tiny", "model", 256)
    assert (await client.get("/v1/models/tiny")).json() == entry
    unknown = error_of(await client.get("/v1/models/some/other"), 404)
    assert (unknown["param"], unknown["code"]) == ("model", "model_not_found")
    backend.served = (replace(backend.served[0], name="some/other"),)
    assert (await client.get("/v1/models/some/other")).json()["id"] == "some/other"
    backend.served = ()
    assert (await client.get("/v1/models")).json()["data"] == []


async def test_version_and_documents(client: httpx.AsyncClient) -> None:
    assert (await client.get("/version")).json() == {"version": baton.__version__}
    assert (await client.get("/docs")).status_code == 200
    document = (await client.get("/openapi.json")).json()
    fields = document["components"]["schemas"]["CompletionRequest"]["properties"]
    assert fields.keys() >= {"prompt", "max_tokens", "stop", "cache_salt"}
    responses = document["paths"][COMPLETIONS]["post"]["responses"]
    assert responses.keys() == {"200", "4XX", "5XX"}


async def test_cluster(client: httpx.AsyncClient) -> None:
    body = (await client.get("/v1/cluster")).json()
    assert body["ready"] is True
    assert body["models"] == ["tiny"]
    assert body["disaggregation"] == {
        "state": "not_expected",
        "remote_prefills": 0,
        "local_prefills": 0,
    }
    worker = body["workers"][0]
    assert worker["kv_blocks"] == {"free": 7, "total": 9, "quarantined": 0}
    assert worker["load"]["running"] == 1
    rate = {"transport": "grpc", "same_host": True, "bytes_per_s": 5e8}
    assert worker["link_rates"] == [rate]
    expected = {"worker_id": "p0", "role": "prefill", "state": "up", "pid": 42, "device": "cpu"}
    assert worker.items() >= expected.items()
    (link,) = body["links"]
    assert (link["source"], link["target"], link["transport"]) == ("p0", "d0", "grpc")
    assert (link["num_bytes"], link["bytes_per_s"], link["in_flight_bytes"]) == (4096, 1e6, 512)
    assert link["measured"] is True
    assert (link["num_failures"], link["failures"]) == (2, {"frame_corrupt": 2})
    (conflict,) = body["conflicts"]
    assert (conflict["source"], conflict["target"]) == ("p0", "d1")
    assert conflict["cause"] == "layout_incompatible"
    assert conflict["reason"] == "head_dim 8 against 16"
    assert body["redis_reachable"] is True


async def test_what_is_wrong_with_the_fleet_is_in_the_metrics(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    found = samples((await client.get("/metrics")).text)
    assert found["baton_pair_conflicts", "layout_incompatible"] == 1
    assert found["baton_redis_reachable",] == 1
    backend.has_redis = False
    found = samples((await client.get("/metrics")).text)
    assert found["baton_redis_reachable",] == 0


async def test_metrics_of_links(client: httpx.AsyncClient) -> None:
    found = samples((await client.get("/metrics")).text)
    assert found["baton_kv_link_transfers_total", "p0", "d0", "grpc"] == 1
    assert found["baton_kv_link_bytes_total", "p0", "d0", "grpc"] == 4096
    assert found["baton_kv_link_seconds_total", "p0", "d0", "grpc"] == 0.5
    assert found["baton_kv_link_failures_total", "frame_corrupt", "p0", "d0"] == 2
    assert found["baton_kv_link_rate_bytes_per_second", "p0", "d0"] == 1e6
    assert found["baton_kv_link_in_flight_bytes", "p0", "d0"] == 512


async def test_a_token_that_contradicts_is_counted_and_said(
    client: httpx.AsyncClient, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    backend.report = replace(REPORT, num_defects=2)
    answer = (await client.post(COMPLETIONS, json={"prompt": "Hi"})).json()
    found = samples((await client.get("/metrics")).text)
    assert found["baton_token_conflicts_total",] == 2
    (line,) = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert line.startswith(f"{answer['id']} ({at_workers(backend)}): ")


def at_workers(backend: FakeBackend) -> str:
    return backend.streams[0].request.request_id.removesuffix("-0")  # of the first prompt


async def test_the_line_of_a_request_has_every_id_and_nothing_of_the_prompt(
    client: httpx.AsyncClient, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    body = {"prompt": "Hello", "request_id": "mine"}
    await client.post(COMPLETIONS, json=body, headers={"X-Request-Id": "theirs"})
    (line,) = [r.getMessage() for r in caplog.records if r.name == "baton.gateway.accounting"]
    assert line.startswith(f"{COMPLETIONS} ok cmpl-mine (theirs, {at_workers(backend)}), prompt ")
    assert "Hello" not in line
    ttft, *parts = map(float, re.findall(rf"(?:ttft|{'|'.join(PHASES)}) ([\d.]+)", line))
    assert ttft == pytest.approx(sum(parts), abs=0.3)


async def test_metrics(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    answer = (await client.post(COMPLETIONS, json={"prompt": "Hi"})).json()
    await client.post(COMPLETIONS, json={"prompt": "Hi", "stream": True})
    await client.post(COMPLETIONS, json={"prompt": ""})
    found = samples((await client.get("/metrics")).text)
    usage = answer["usage"]
    assert found["baton_requests_total", COMPLETIONS, "ok"] == 2
    assert found["baton_requests_total", COMPLETIONS, "invalid_request"] == 1
    assert found["baton_requests_open",] == 0
    assert found["baton_prompt_tokens_total",] == 2 * usage["prompt_tokens"]
    assert found["baton_generation_tokens_total",] == 2 * usage["completion_tokens"]
    assert found["baton_cached_prompt_tokens_total",] == 4
    assert found["baton_remote_prefills_total",] == 2
    assert found["baton_kv_transfer_bytes_total", "grpc"] == 8192
    assert found["baton_kv_transfer_seconds_count", "grpc"] == 2
    assert found["baton_inter_token_latency_seconds_count",] == 2 * usage["completion_tokens"] - 2
    assert found["baton_time_per_output_token_seconds_count",] == 2
    assert found["baton_e2e_request_latency_seconds_count",] == 2
    assert found["baton_fleet_kv_blocks", "free"] == 14
    assert found["baton_fleet_sequences", "running"] == 2
    assert found["baton_workers", "prefill"] == found["baton_workers", "decode"] == 1
    assert found["baton_time_to_first_token_seconds_count",] == 2
    parts = sum(found["baton_ttft_phase_seconds_sum", phase] for phase in PHASES)
    assert parts == pytest.approx(found["baton_time_to_first_token_seconds_sum",])
    assert found["baton_ttft_phase_seconds_sum", "prefill"] == pytest.approx(2 * 0.02e-3)


def test_the_gateway_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, baton.gateway.app, baton.gateway.server;"
        "print([m for m in ('torch', 'transformers', 'triton', 'ucxx') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
