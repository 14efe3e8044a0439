import json
from collections.abc import Callable, Iterator

import httpx
import pytest

from baton.client.chat import Conversation, run_chat
from baton.client.terminal import ServerError


def sse(*chunks: object) -> httpx.Response:
    lines = [f"data: {c if isinstance(c, str) else json.dumps(c)}\n\n" for c in chunks]
    return httpx.Response(200, text=": keep-alive\n\n" + "".join(lines))


def delta(text: str) -> dict:
    return {"choices": [{"index": 0, "delta": {"content": text}}], "usage": None}


ANSWER = (
    {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
    delta("Hel"),
    delta("lo"),
    {"choices": [], "usage": {"completion_tokens": 2}},
    "[DONE]",
)


class Server:
    """Answers like a gateway and keeps what it was asked."""

    def __init__(self, *answers: httpx.Response) -> None:
        self.answers = list(answers)
        self.requests: list[dict] = []
        self.headers: list[httpx.Headers] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.headers.append(request.headers)
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "demo"}]})
        assert request.url.path == "/v1/chat/completions"
        self.requests.append(json.loads(request.content))
        return self.answers.pop(0)


def conversation(server: Server, **options: object) -> Conversation:
    client = httpx.Client(base_url="http://test", transport=httpx.MockTransport(server))
    return Conversation(client, **options)  # type: ignore[arg-type]


def typing(*lines: str) -> Callable[[str], str]:
    left: Iterator[str] = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    return read


def test_answers_stream_and_join_the_conversation() -> None:
    server = Server(sse(*ANSWER), sse(*ANSWER))
    talk = conversation(server, system="Be brief.", model="m", temperature=None)
    assert list(talk.ask("Hi")) == ["Hel", "lo"]
    assert talk.num_tokens == 2
    list(talk.ask("Again"))
    body = server.requests[1]
    assert [m["content"] for m in body["messages"]] == ["Be brief.", "Hi", "Hello", "Again"]
    assert body["model"] == "m"
    assert body["stream"] is True
    assert "temperature" not in body
    talk.reset()
    assert [m["content"] for m in talk.messages] == ["Be brief."]


def test_a_stopped_answer_keeps_what_was_read() -> None:
    talk = conversation(Server(sse(*ANSWER)))
    pieces = talk.ask("Hi")
    next(pieces)
    pieces.close()
    assert [m["content"] for m in talk.messages] == ["Hi", "Hel"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (httpx.Response(429, json={"error": {"message": "too busy"}}), "too busy"),
        (httpx.Response(502, text="bad gateway"), "HTTP 502: bad gateway"),
        (sse({"error": {"message": "broke"}}), "broke"),
    ],
)
def test_errors_are_told_and_the_question_is_forgotten(
    answer: httpx.Response, message: str
) -> None:
    talk = conversation(Server(answer))
    with pytest.raises(ServerError, match=message):
        list(talk.ask("Hi"))
    assert talk.messages == []


def test_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    refused = httpx.Response(400, json={"error": {"message": "no"}})
    server = Server(sse(*ANSWER), refused, sse(*ANSWER))
    code = run_chat(
        "http://test",
        api_key="key",
        max_tokens=9,
        read=typing("Hi", "", "bad", "/reset", "Hi"),
        transport=httpx.MockTransport(server),
    )
    shown = capsys.readouterr()
    assert code == 0
    assert "demo at http://test" in shown.out
    assert "Hello" in shown.out
    assert "2 tokens" in shown.out
    assert "no" in shown.err
    assert all(headers["authorization"] == "Bearer key" for headers in server.headers)
    assert [r["max_tokens"] for r in server.requests] == [9, 9, 9]
    assert [m["content"] for m in server.requests[2]["messages"]] == ["Hi"]


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("connection refused")

    assert run_chat("http://test", read=typing(), transport=httpx.MockTransport(refuse)) == 1
    assert "connection refused" in capsys.readouterr().err
