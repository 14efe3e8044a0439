import pytest

from baton.client.complete import run_complete
from tests.client.server import Answer, refusal, serving


def events(*texts: str) -> Answer:
    chunks = [{"choices": [{"index": 0, "text": text}]} for text in texts]
    usage = {"choices": [], "usage": {"completion_tokens": len(texts)}}
    return Answer(events=[(0.0, event) for event in (*chunks, usage)])


def test_prompts_are_completed(capsys: pytest.CaptureFixture[str]) -> None:
    answers = [events(" x", " y"), refusal(400, "bad", "too long"), events("!")]
    lines = iter(["def ", "", "bad", "hi"])

    def read(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    with serving(lambda path, body: answers.pop(0)) as server:
        assert run_complete(f"{server.url}/v1", max_tokens=7, api_key="k", read=read) == 0
    shown = capsys.readouterr()
    assert " x y\n[2 tokens" in shown.out
    assert "too long" in shown.err
    assert [path for path, _ in server.requests] == ["/v1/completions"] * 3
    first = server.requests[0][1]
    assert {name: first[name] for name in ("prompt", "max_tokens", "model", "stream")} == {
        "prompt": "def ",
        "max_tokens": 7,
        "model": "demo",
        "stream": True,
    }
    assert "temperature" not in first
    assert {headers["Authorization"] for headers in map(_canonical, server.headers)} == {"Bearer k"}


def _canonical(headers: dict[str, str]) -> dict[str, str]:
    return {name.title(): value for name, value in headers.items()}


def test_quick_answers_one_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda path, body: events(" z")) as server:
        assert run_complete(server.url, model="m", quick="a") == 0
        assert capsys.readouterr().out == " z\n"
        server.decide = lambda path, body: refusal(404, "model_not_found", "no such model")
        assert run_complete(server.url, model="m", quick="a") == 1
    assert capsys.readouterr().err.strip() == "no such model"
