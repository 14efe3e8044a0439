"""`baton bench` as a user types it, against a server whose answers are known."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from baton.benchmarks import plot
from baton.benchmarks.datasets import ordinary_text
from baton.cli import main
from tests.client.server import Answer, FakeServer, refusal, serving

QUICK = ["--num-prompts", "6", "--random-input-len", "5", "--random-output-len", "3"]


def answer(path: str, body: dict[str, Any]) -> Answer:
    if path == "/tokenize":
        return Answer({"tokens": [ord(char) for char in body["prompt"]]})
    if path == "/detokenize":
        return Answer({"prompt": "".join(map(chr, body["tokens"]))})
    is_chat = path == "/v1/chat/completions"
    num = body["max_completion_tokens" if is_chat else "max_tokens"]
    piece = {"delta": {"content": "x"}} if is_chat else {"text": "x"}
    usage = {"prompt_tokens": 5, "completion_tokens": num}
    chunks = [(0.0, {"choices": [piece]})] * num
    return Answer(events=[*chunks, (0.0, {"choices": [], "usage": usage})])


def bench(*args: str) -> Result:
    result = CliRunner().invoke(main, ["bench", *args], prog_name="baton")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result


def bench_serve(server: FakeServer, *args: str) -> Result:
    return bench("serve", "--base-url", server.url, "--disable-tqdm", *args)


def asked(server: FakeServer) -> list[dict[str, Any]]:
    return [body for path, body in server.requests if path.startswith("/v1/")]


def test_a_run_and_its_result(tmp_path: Path) -> None:
    with serving(answer) as server:
        result = bench_serve(
            server,
            *QUICK,
            *("--goodput", "ttft:60000", "tpot:60000", "--metadata", "gpu=none", "n=2"),
            *("--percentile-metrics", "ttft,e2el", "--metric-percentiles", "50,99.9"),
            *("--save-result", "--save-detailed", "--result-dir", str(tmp_path / "deep")),
            *("--plot", str(tmp_path / "run.png"), "--max-concurrency", "2", "--num-warmups", "1"),
            *("--ignore-eos", "--temperature", "0.5", "--extra-body", '{"top_k": 7}'),
            *("--header", "X-Tenant=a", "--api-key", "k"),
        )
        assert result.exit_code == 0, result.output
        bodies = asked(server)
        headers = server.headers[-1]
    assert len(bodies) == 7
    assert {len(body["prompt"]) for body in bodies} == {5}
    assert {token for body in bodies for token in body["prompt"]} <= set(map(ord, ordinary_text()))
    for body in bodies:
        expected = {"model": "demo", "max_tokens": 3, "ignore_eos": True, "temperature": 0.5}
        assert {name: body[name] for name in expected} == expected
        assert (body["top_k"], body["stream"]) == (7, True)
    assert headers["Authorization"] == "Bearer k"
    assert headers["X-Tenant"] == "a"
    (path,) = (tmp_path / "deep").iterdir()
    assert path.name.startswith("openai-infqps-concurrency2-demo-")
    saved = json.loads(path.read_text())
    expected = {
        "backend": "openai",
        "model_id": "demo",
        "num_prompts": 6,
        "request_rate": "inf",
        "max_concurrency": 2,
        "completed": 6,
        "failed": 0,
        "total_input_tokens": 30,
        "total_output_tokens": 18,
        "output_lens": [3] * 6,
        "generated_texts": ["xxx"] * 6,
        "gpu": "none",
        "n": "2",
    }
    assert {name: saved[name] for name in expected} == expected
    assert saved["request_goodput"] == saved["request_throughput"]
    assert saved["max_concurrent_requests"] <= 2
    assert {"p50_ttft_ms", "p99.9_e2el_ms"} <= saved.keys()
    assert "mean_tpot_ms" not in saved
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    assert "Successful requests:" in result.output
    assert "P99.9 E2EL (ms):" in result.output


def test_chats_and_a_trace(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    line = {"timestamp": 100, "input_length": 5, "output_length": 2, "hash_ids": [1]}
    trace.write_text("\n".join(json.dumps(line | {"timestamp": at}) for at in (100, 400)))
    with serving(answer) as server:
        result = bench_serve(
            server,
            *("--backend", "openai-chat", "--dataset-name", "timed_trace"),
            *("--dataset-path", str(trace), "--save-result", "--result-dir", str(tmp_path)),
            *("--result-filename", "out.json", "--label", "l"),
        )
        assert result.exit_code == 0, result.output
        first, second = asked(server)
    assert first["messages"] == second["messages"]
    assert len(first["messages"][0]["content"]) == 5
    saved = json.loads((tmp_path / "out.json").read_text())
    assert saved["duration"] >= 0.3
    assert saved["label"] == "l"


def test_refusals_are_counted_by_cause() -> None:
    left = [refusal(429, "server_is_overloaded"), refusal(503, "no_room"), refusal(503, "no_room")]

    def decide(path: str, body: dict[str, Any]) -> Answer:
        return left.pop() if left and path == "/v1/completions" else answer(path, body)

    with serving(decide) as server:
        result = bench_serve(server, *QUICK)
        assert result.exit_code == 0
        for row in ("Failed requests: 3", "503 no_room: 2", "429 server_is_overloaded: 1"):
            assert row in " ".join(result.output.split())
        server.decide = lambda path, body: (
            refusal(400, "never_fits") if path == "/v1/completions" else answer(path, body)
        )
        result = bench_serve(server, *QUICK)
    assert result.exit_code == 1
    assert "400 never_fits: 6" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--goodput", "ttft:1", "itl:3"], "--goodput: 'itl' is none of"),
        (["--goodput", "ttft"], "--goodput: 'ttft' is not NAME:VALUE"),
        (["--goodput", "ttft:x"], "--goodput: 'x' is no number"),
        (["--percentile-metrics", "ttft,foo"], "'foo' is none of ttft, tpot, itl, e2el"),
        (["--metric-percentiles", "101"], "101 is no percentile"),
        (["--extra-body", "{"], "--extra-body: no JSON"),
        (["--extra-body", "[]"], "--extra-body: no JSON object"),
        (["--request-rate", "0"], "--request-rate"),
        (["--num-prompts", "0"], "--num-prompts"),
        (["--dataset-name", "sharegpt"], "needs --dataset-path"),
        (["--dataset-name", "timed_trace", "--dataset-path", "none.jsonl"], "No such file"),
        (["--plot", "x.gif"], "--plot: x.gif ends in none of"),
        (["--tokenizer", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_input_is_a_line_and_status_2(args: list[str], message: str) -> None:
    with serving(answer) as server:
        result = bench_serve(server, *QUICK, *args)
        assert asked(server) == []
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())


def test_no_server_and_no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    result = bench("serve", "--port", "9", *QUICK)
    assert result.exit_code == 1
    assert result.stderr.strip() == "http://127.0.0.1:9: connection refused"
    monkeypatch.setattr(plot, "is_available", lambda: False)
    result = bench("serve", "--port", "9", *QUICK, "--plot", "x.png")
    assert result.exit_code == 2
    assert "baton[plot]" in result.stderr


ENGINE = ("--device", "cpu", "--dtype", "float32", "--kv-cache-memory-bytes", "4MiB")


def test_latency_and_throughput_in_process(tiny_model: Path, tmp_path: Path) -> None:
    engine = ("--model", str(tiny_model), *ENGINE, "--max-model-len", "128")
    out = tmp_path / "out.json"
    lengths = ("--input-len", "6", "--output-len", "4")
    iterations = ("--num-iters", "3", "--num-iters-warmup", "1", "--batch-size", "2")
    args = (*lengths, *iterations, *engine, "--output-json", str(out), "--disable-tqdm")
    result = bench("latency", *args)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert len(found["latencies"]) == 3
    assert found["percentiles"].keys() == {"10", "25", "50", "75", "90", "99"}
    assert min(found["latencies"]) <= found["avg_latency"] <= max(found["latencies"])
    args = (*lengths, "--num-prompts", "5", *engine, "--output-json", str(out), "--disable-tqdm")
    result = bench("throughput", *args)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert (found["num_requests"], found["total_num_tokens"]) == (5, 50)
    result = bench("latency", *engine[:2], "--block-size", "7", "--num-iters", "1")
    assert result.exit_code == 2
    assert "--block-size" in result.stderr
    too_long = ("--input-len", "500", "--num-prompts", "1", *engine, "--disable-tqdm")
    result = bench("throughput", *too_long)
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr
    assert "500 prompt tokens" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("param", [None, "model"])
def test_a_server_without_a_tokenizer_is_told_from_one_without_the_model(param: str | None) -> None:
    body = {"error": {"message": "no", "code": "x", "param": param}}
    with serving(lambda path, _: Answer(body, 404)) as server:
        result = bench_serve(server, *QUICK, "--model", "nope")
    assert result.exit_code == 2
    assert "/tokenize: no" in result.output
    assert ("--tokenizer DIR" in result.output) is (param is None)
