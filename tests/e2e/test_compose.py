"""The compose fleet against a real Docker Engine: builds, serves, scales under load, loses no
stream.
"""

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from baton import LLM
from tests.engine.tiny_pooling import save_pooling_model
from tests.tiny_tokenizer import tiny_tokenizer

ROOT = Path(__file__).parents[2]
BODY = {"model": "demo_model", "temperature": 0, "ignore_eos": True, "stream": True}
pytestmark = [pytest.mark.compose, pytest.mark.timeout(1500)]


class Compose:
    def __init__(self, port: int, **env: str) -> None:
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120.0)
        self.env = {
            **os.environ,
            "COMPOSE_PROJECT_NAME": "baton-test",
            "BATON_PORT": str(port),
            "BATON_THREADS": "1",
            "BATON_KV_CACHE_MEMORY_BYTES": "64MiB",
            "DOCKER_BUILDKIT": "0",  # needs no buildx
            **env,
        }

    def run(self, *args: str, timeout_s: float = 300) -> str:
        command = ["docker", "compose", "-f", str(ROOT / "compose/compose.yaml"), *args]
        done = subprocess.run(
            command, env=self.env, timeout=timeout_s, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def scale(self, prefill: int, decode: int) -> None:
        self.run(
            "up", "-d", "--wait", "--scale", f"prefill={prefill}", "--scale", f"decode={decode}"
        )

    def wait_workers(self, prefill: int, decode: int, timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        roles: list[str] = []
        while time.monotonic() < deadline:
            workers = self.client.get("/v1/cluster").json()["workers"]
            roles = sorted(w["role"] for w in workers if w["state"] == "up")
            if roles == ["decode"] * decode + ["prefill"] * prefill:
                return
            time.sleep(0.2)
        raise AssertionError(f"workers are {roles}")

    def stream(self, prompt: str, num_tokens: int) -> str:
        body = {**BODY, "prompt": prompt, "max_tokens": num_tokens}
        body["model"] = self.client.get("/v1/models").json()["data"][0]["id"]
        text, done = "", False
        with self.client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    done = True
                elif line.startswith("data: "):
                    data = json.loads(line.removeprefix("data: "))
                    assert "error" not in data, data
                    text += "".join(choice["text"] for choice in data["choices"])
        assert done, "the stream was cut"
        return text


@contextmanager
def built(port: int, **env: str) -> Iterator[Compose]:
    if subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:
        pytest.skip("no Docker Engine")
    running = Compose(port, **env)
    try:
        running.run("build", "gateway", timeout_s=1200)
        yield running
    finally:
        running.run("--profile", "pooling", "down", "--volumes", "--timeout", "5")
        running.client.close()


@pytest.fixture(scope="module")
def compose() -> Iterator[Compose]:
    with built(18080) as running:
        running.scale(1, 1)
        yield running


def test_a_completion_is_handed_over(compose: Compose) -> None:
    compose.wait_workers(1, 1)
    assert compose.stream("def ", 16)
    metrics = compose.client.get("/metrics").text
    assert metric(metrics, "baton_remote_prefills_total") > 0
    assert metric(metrics, "baton_kv_transfer_bytes_total") > 0


def metric(text: str, name: str) -> float:
    lines = (line for line in text.splitlines() if line.split("{")[0].split(" ")[0] == name)
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def test_scaling_under_streams_drops_none(compose: Compose) -> None:
    expected = {i: compose.stream(f"import module{i}", 300) for i in range(3)}
    stop = threading.Event()
    faults: list[Any] = []
    finished: list[int] = []

    def load(i: int) -> None:
        while not stop.is_set():
            try:
                assert compose.stream(f"import module{i}", 300) == expected[i]
                finished.append(i)
            except Exception as error:  # noqa: BLE001 - every failure is the test's to report
                faults.append(error)
                return

    threads = [threading.Thread(target=load, args=(i,)) for i in expected]
    for thread in threads:
        thread.start()
    compose.scale(2, 2)
    compose.wait_workers(2, 2)
    compose.scale(1, 1)
    compose.wait_workers(1, 1)
    compose.scale(2, 1)
    compose.wait_workers(2, 1)
    stop.set()
    for thread in threads:
        thread.join(120)
    assert not faults
    assert len(finished) >= 3


def test_an_embedding_model_on_pooling_workers(tmp_path: Path) -> None:
    folder = save_pooling_model(tmp_path / "bert", "bert", pooling="mean", normalizes=True)
    tiny_tokenizer()._backend.save(str(folder / "tokenizer.json"))
    for path in (tmp_path, *tmp_path.rglob("*")):
        path.chmod(0o755)  # the container's user is another one
    env = {"COMPOSE_PROJECT_NAME": "baton-test-pooling", "BATON_MODELS_DIR": str(tmp_path)}
    texts = ["A relay race", "pass"]
    with built(18081, BATON_MODEL="/models/bert", **env) as running:
        running.run(
            *("--profile", "pooling", "up", "-d", "--wait", "--scale", "pooling=2"),
            *("gateway", "pooling"),
        )
        answer = running.client.post("/v1/embeddings", json={"input": texts})
        assert answer.status_code == 200, answer.text
        roles = [w["role"] for w in running.client.get("/v1/cluster").json()["workers"]]
    with LLM(str(folder), dtype="float32") as llm:
        expected = [output.outputs.embedding for output in llm.embed(texts, use_tqdm=False)]
    found = [entry["embedding"] for entry in answer.json()["data"]]
    assert len(found) == len(texts)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert roles == ["pooling"] * 2
