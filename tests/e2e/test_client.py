"""What talks to a fleet, on a real one: LLM(base_url=…), run-batch, bench serve."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from baton import LLM, BeamSearchParams, SamplingParams, StructuredOutput
from baton.config import ServeConfig
from baton.errors import Cause, InvalidRequest
from baton.outputs import RequestOutput

DEMO_MODEL = ServeConfig().model_source
PROMPTS: list[Any] = ["def main(", [40, 41, 42, 43], {"prompt": "import os\n"}, "class A:"]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi there"}]
PARAMS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=12),
    "seeds drawn": SamplingParams(temperature=0.9, max_tokens=10, n=2),
    "logprobs": SamplingParams(
        seed=4, max_tokens=6, logprobs=3, prompt_logprobs=2, logprob_token_ids=(7, 300)
    ),
    "stops": SamplingParams(temperature=0.0, max_tokens=40, stop=("\n",), min_tokens=2),
    "bias": SamplingParams(
        temperature=0.0, max_tokens=6, logit_bias={50: 100}, presence_penalty=2.0, bad_words=("a",)
    ),
    "structured": SamplingParams(
        temperature=0.0, max_tokens=12, structured_outputs=StructuredOutput.of(choice=["yes", "no"])
    ),
}


@pytest.fixture(scope="module")
def fleet(plain_fleet: Any) -> Any:
    return plain_fleet


@pytest.fixture(scope="module")
def local() -> Iterator[LLM]:
    # One thread: with more, each step waits for the slowest of a busy machine.
    options: dict[str, Any] = {"max_model_len": 1024, "batch_invariant": True, "threads": 1}
    with LLM(DEMO_MODEL, dtype="float32", kv_cache_memory_bytes="32MiB", **options) as llm:
        yield llm


def url(fleet: Any) -> str:
    return f"http://127.0.0.1:{fleet.port}"


def told(outputs: list[RequestOutput]) -> list[RequestOutput]:
    """Without what differs by nature: ids, and what happened to be cached. Log-probabilities to
    six digits."""
    return [
        replace(
            output,
            request_id="",
            num_cached_tokens=0,
            outputs=[
                replace(c, cumulative_logprob=_rounded(c.cumulative_logprob), logprobs=_all(c))
                for c in output.outputs
            ],
            prompt_logprobs=output.prompt_logprobs and list(map(_entry, output.prompt_logprobs)),
        )
        for output in outputs
    ]


def _all(choice: Any) -> Any:
    return choice.logprobs and list(map(_entry, choice.logprobs))


def _entry(entry: Any) -> Any:
    if entry is None:
        return None
    return {i: replace(e, logprob=_rounded(e.logprob)) for i, e in entry.items()}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def test_a_remote_llm_says_what_one_in_process_says(fleet: Any, local: LLM) -> None:
    """Drawn seeds too: both have made the same calls."""
    series = ("baton_remote_prefills_total", "baton_kv_transfer_bytes_total")
    before = [fleet.metric(name) for name in series]
    with LLM(base_url=f"{url(fleet)}/v1") as remote:
        assert isinstance(remote, LLM)
        assert remote.get_default_sampling_params() == local.get_default_sampling_params()
        for name, params in PARAMS.items():
            ours = remote.generate(PROMPTS, params, use_tqdm=False)
            assert told(ours) == told(local.generate(PROMPTS, params, use_tqdm=False)), name
        greedy = PARAMS["greedy"]
        assert told(remote.chat(CHAT, greedy, use_tqdm=False)) == told(
            local.chat(CHAT, greedy, use_tqdm=False)
        )
        beams = BeamSearchParams(3, 8)
        for ours, theirs in zip(
            remote.beam_search(PROMPTS, beams), local.beam_search(PROMPTS, beams), strict=True
        ):
            assert [b.tokens for b in ours.sequences] == [b.tokens for b in theirs.sequences]
            assert [b.text for b in ours.sequences] == [b.text for b in theirs.sequences]
            for mine, yours in zip(ours.sequences, theirs.sequences, strict=True):
                assert mine.cum_logprob == pytest.approx(yours.cum_logprob, abs=1e-3)
        there, here = remote.get_tokenizer(), local.get_tokenizer()
        ids = here.encode("a text")
        assert there.encode("a text") == ids
        assert there.decode(ids) == here.decode(ids)
        assert there.encode_chat(CHAT) == here.encode_chat(CHAT)
        assert there.token_text(ids[0]) == here.token_bytes(ids[0]).decode()
    assert all(fleet.metric(name) > value for name, value in zip(series, before, strict=True))
    fleet.assert_no_leak()


def test_errors_are_those_of_llm(fleet: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        LLM("nope", base_url=url(fleet))
    assert caught.value.cause is Cause.MODEL_NOT_FOUND
    with pytest.raises(ValueError, match="the fleet decides: dtype"):
        LLM(base_url=url(fleet), dtype="float32")
    with LLM(base_url=url(fleet)) as llm:
        with pytest.raises(InvalidRequest) as caught:
            llm.generate(["ok", "x" * 50_000], use_tqdm=False)
        assert caught.value.cause is Cause.CONTEXT_LENGTH_EXCEEDED
        with pytest.raises(InvalidRequest):
            llm.generate([""], use_tqdm=False)
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate("a")


def test_a_batch_that_is_killed_is_taken_up_again(fleet: Any, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = []
    for number in range(30):
        body = {"prompt": [40 + number, 41], "max_tokens": 24, "ignore_eos": True, "temperature": 0}
        request = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/completions"}
        lines.append(json.dumps({**request, "body": body}))
    source.write_text("\n".join(lines))
    command = [sys.executable, "-m", "baton.cli", "run-batch", "-i", str(source), "-o", str(output)]
    command += ["--url", url(fleet), "--max-inflight", "2", "--disable-tqdm"]
    first = subprocess.Popen(command)
    deadline = time.monotonic() + 120
    while not (output.exists() and output.read_bytes().count(b"\n") >= 3):
        assert first.poll() is None, "it must not be over yet"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = [json.loads(line)["id"] for line in output.read_text().splitlines(keepends=True)[:3]]
    again = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert again.returncode == 0, again.stderr
    assert "were done before" in again.stderr
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert sorted(line["custom_id"] for line in answers) == sorted(f"r{n}" for n in range(30))
    assert [line["id"] for line in answers[:3]] == done
    for line in answers:
        assert line["response"]["body"]["usage"]["completion_tokens"] == 24
    fleet.assert_no_leak()


def test_a_benchmark_counts_what_it_asked_for(fleet: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "baton.cli", "bench", "serve", "--base-url", url(fleet)]
    command += ["--num-prompts", "8", "--random-input-len", "40", "--random-output-len", "12"]
    command += ["--ignore-eos", "--request-rate", "4", "--num-warmups", "1", "--disable-tqdm"]
    command += ["--goodput", "ttft:1", "--save-result", "--save-detailed"]
    command += ["--result-dir", str(tmp_path), "--result-filename", "result.json"]
    before = fleet.metric("baton_remote_prefills_total")
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "result.json").read_text())
    assert (found["completed"], found["failed"]) == (8, 0)
    assert found["input_lens"] == [40] * 8
    assert found["output_lens"] == [12] * 8
    assert found["duration"] >= 2.0, "8 requests at 4 a second"
    assert found["request_goodput"] == 0.0, "no first token within a millisecond"
    for ttft, itl in zip(found["ttfts"], found["itls"], strict=True):
        assert 0 < ttft <= found["duration"]
        assert 1 <= len(itl) <= 11
    assert fleet.metric("baton_remote_prefills_total") >= before + 9
