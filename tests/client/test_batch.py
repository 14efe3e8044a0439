import json
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from baton.cli import main
from baton.client import batch
from baton.client.batch import run_batch
from baton.config import ServeConfig
from baton.private_fleet import private_fleet
from tests.client.server import Answer, refusal, serving


def request(name: str, **fields: Any) -> dict[str, Any]:
    body = {"prompt": name, "max_tokens": 2}
    return {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body} | (fields)


def write(path: Path, *lines: object) -> Path:
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("\n".join(texts) + "\n")
    return path


def answers(path: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["custom_id"] for line in lines}) == len(lines)
    return {line["custom_id"]: line for line in lines}


def echo(path: str, body: dict[str, Any]) -> Answer:
    return Answer({"id": f"cmpl-{body['prompt']}", "choices": [{"text": body["prompt"]}]})


def run(url: str | AbstractContextManager[str], source: Path, output: Path, **options: Any) -> int:
    options = {"max_inflight": 4, "use_tqdm": False, "patience_s": 0.0} | options
    return run_batch(url, source, output, **options)


def test_every_request_gets_its_answer(tmp_path: Path) -> None:
    ids = [f"r{i}" for i in range(40)]
    source = write(tmp_path / "in.jsonl", *map(request, ids))
    with serving(lambda path, body: Answer(echo(path, body).body, delay_s=0.01)) as server:
        code = run(f"{server.url}/v1/", source, tmp_path / "out.jsonl", api_key="k", model="m")
        assert code == 0
        assert 1 < server.most_open <= 4
        assert {body["model"] for _, body in server.requests} == {"m"}
        assert {headers["Authorization"] for headers in server.headers} == {"Bearer k"}
    found = answers(tmp_path / "out.jsonl")
    assert found.keys() == set(ids)
    for custom_id, line in found.items():
        assert line["error"] is None
        assert line["response"]["status_code"] == 200
        assert line["response"]["request_id"] == f"cmpl-{custom_id}"
        assert line["response"]["body"]["choices"][0]["text"] == custom_id


def test_a_rerun_asks_only_for_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in.jsonl", *map(request, "abcde"))
    output = tmp_path / "out.jsonl"

    def decide(path: str, body: dict[str, Any]) -> Answer:
        match body["prompt"]:
            case "b":
                return refusal(400, "context_length_exceeded", "too long")
            case "c" | "d":
                return refusal(503, "no_room", **{"Retry-After": "99"})
        return echo(path, body)

    with serving(decide) as server:
        assert run(server.url, source, output) == 1
    shown = capsys.readouterr().err
    assert "2 answered, 3 refused" in shown
    assert "2 × 503 no_room" in shown
    assert "1 × 400 context_length_exceeded" in shown
    assert answers(output)["b"]["response"]["body"]["error"]["message"] == "too long"
    with output.open("a") as file:
        file.write('{"custom_id": "d", "respo')  # the end of a process that was killed
    with serving(echo) as server:
        assert run(server.url, source, output) == 1, "one is refused for good"
        assert "2 answered, 3 were done before, 1 of them refused" in capsys.readouterr().err
        assert sorted(body["prompt"] for _, body in server.requests) == ["c", "d"]
    found = answers(output)
    assert {name: found[name]["response"]["status_code"] for name in "abcde"} == {
        "a": 200,
        "b": 400,
        "c": 200,
        "d": 200,
        "e": 200,
    }


def test_busy_servers_are_asked_again(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", request("a"))
    left = [refusal(429, "server_is_overloaded"), Answer(cut=True)]
    with serving(lambda path, body: left.pop() if left else echo(path, body)) as server:
        assert run(server.url, source, tmp_path / "out", patience_s=30.0) == 0
        assert len(server.requests) == 3


def test_a_server_that_goes_away_ends_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in.jsonl", *map(request, "abcd"))
    output = tmp_path / "out.jsonl"
    lost = lambda path, body: Answer(cut=True) if body["prompt"] > "b" else echo(path, body)  # noqa: E731
    with serving(lost) as server:
        assert run(server.url, source, output, max_inflight=1) == 1
    shown = capsys.readouterr().err
    assert "2 answered, 2 left" in shown
    assert "connection lost" in shown
    assert answers(output).keys() == {"a", "b"}
    assert run(server.url, source, output) == 1
    assert "connection refused" in capsys.readouterr().err


def test_an_interrupt_keeps_what_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "in.jsonl", *map(request, "abc"))
    output = tmp_path / "out.jsonl"
    written = batch.BatchRun._write

    def write_one(self: batch.BatchRun, custom_id: str, status: int, body: Any) -> None:
        written(self, custom_id, status, body)
        if custom_id == "b":
            threading.Timer(0.05, _interrupt).start()

    monkeypatch.setattr(batch.BatchRun, "_write", write_one)
    slow = lambda path, body: Answer(  # noqa: E731
        echo(path, body).body, delay_s=30.0 if body["prompt"] == "c" else 0.0
    )
    # A shell starts background jobs with the signal ignored, and this suite may be one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with serving(slow) as server:
            assert run(server.url, source, output, max_inflight=1) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "goes on where this ended" in capsys.readouterr().err
    assert answers(output).keys() == {"a", "b"}


def _interrupt() -> None:
    # To the thread that waits: one sent to another ends no wait.
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGINT)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: no JSON"),
        ("[1]", "line 2: no JSON object"),
        (request("b", custom_id=7), "line 2: custom_id must be a text"),
        (request("b", method="GET"), "line 2: method must be POST"),
        (request("b", url="/v1/files"), "line 2: url must be one of /v1/completions"),
        (request("b", body=[]), "line 2: body must be an object"),
        (request("b", body={"stream": True}), "line 2: body.stream"),
        (request("a"), "line 2: custom_id 'a' is that of line 1 too"),
    ],
)
def test_a_bad_line_starts_nothing(
    tmp_path: Path, line: object, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in.jsonl", request("a"), line)
    with serving(echo) as server:
        assert run(server.url, source, tmp_path / "out.jsonl") == 2
        assert server.requests == []
    shown = capsys.readouterr().err
    assert message in shown
    assert len(shown.splitlines()) == 1
    assert not (tmp_path / "out.jsonl").exists()


def test_files_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in.jsonl", request("a"))
    other = write(tmp_path / "notes.txt", "not an output")
    url = "http://127.0.0.1:9"
    assert run(url, tmp_path / "missing", tmp_path / "out") == 2
    assert run(url, write(tmp_path / "empty", ""), tmp_path / "out") == 2
    assert run(url, source, other) == 2
    assert run(url, source, tmp_path / "no" / "out") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert other.read_text() == "not an output\n"


def test_a_fleet_of_its_own(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", request("a"))
    entered: list[str] = []

    @contextmanager
    def fleet(url: str) -> Iterator[str]:
        entered.append("start")
        yield url
        entered.append("stop")

    with serving(echo) as server:
        assert run(fleet(server.url), source, tmp_path / "out.jsonl") == 0
        assert entered == ["start", "stop"]
        bad = write(tmp_path / "bad.jsonl", "nope")
        assert run(fleet(server.url), bad, tmp_path / "none.jsonl") == 2
        assert run(fleet(server.url), source, tmp_path / "out.jsonl") == 0
        assert entered == ["start", "stop"], "only for good input that is not answered yet"


def test_a_fleet_that_does_not_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in.jsonl", request("a"))
    fleet = private_fleet(ServeConfig(model=str(tmp_path / "nowhere"), device="cpu"))
    assert run(fleet, source, tmp_path / "out.jsonl") == 1
    assert "did not start" in capsys.readouterr().err


def test_engine_options_need_a_fleet_of_its_own(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", request("a"))
    files = ["-i", str(source), "-o", str(tmp_path / "out.jsonl")]
    result = CliRunner().invoke(main, ["run-batch", *files, "--max-num-seqs", "4"])
    assert result.exit_code == 2
    assert "--max-num-seqs" in result.output
