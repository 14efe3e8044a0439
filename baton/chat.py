"""`baton chat`: a conversation in the terminal, over the gateway's own HTTP API."""

import json
import sys
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import httpx

HELP = "Enter sends · /reset forgets the conversation · Ctrl-C stops an answer · Ctrl-D leaves"
# Reading has no deadline: the first token of a long prompt may take its time. Ctrl-C is there.
_TIMEOUT = httpx.Timeout(10.0, read=None)


class ChatError(Exception):
    """The server refused, broke off, or cannot be reached."""


class Conversation:
    """The messages so far, and the server that answers them."""

    def __init__(self, client: httpx.Client, system: str | None = None, **options: Any) -> None:
        """`options` go into every request; those that are None are left to the server."""
        self._client = client
        self._options = {name: value for name, value in options.items() if value is not None}
        self._start = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._start)
        self.num_tokens = 0  # of the last answer, as the server counts them

    def reset(self) -> None:
        self.messages = list(self._start)

    def ask(self, text: str) -> Generator[str]:
        """The answer in pieces. What has come of it joins the conversation, even if the caller
        stops early; a question without any answer does not.

        Raises:
            ChatError
        """
        question = {"role": "user", "content": text}
        answer: list[str] = []
        self.num_tokens = 0
        try:
            for piece in self._stream([*self.messages, question]):
                answer.append(piece)
                yield piece
        except (httpx.HTTPError, ValueError, LookupError) as error:
            raise ChatError(f"{self._client.base_url}: {error}") from error
        finally:
            if answer:
                reply = {"role": "assistant", "content": "".join(answer)}
                self.messages += [question, reply]

    def _stream(self, messages: list[dict[str, str]]) -> Iterator[str]:
        body = {
            **self._options,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.is_error:
                response.read()
                raise ChatError(_message(response))
            for line in response.iter_lines():
                data = line.removeprefix("data:").strip()
                if not line.startswith("data:") or data == "[DONE]":
                    continue
                yield from self._pieces(json.loads(data))

    def _pieces(self, chunk: dict[str, Any]) -> Iterator[str]:
        if "error" in chunk:
            raise ChatError(chunk["error"]["message"])
        if usage := chunk.get("usage"):
            self.num_tokens = usage["completion_tokens"]
        for choice in chunk["choices"]:
            if content := choice["delta"].get("content"):
                yield content


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}: {response.text[:200]}"


def _first_model(client: httpx.Client) -> str:
    try:
        response = client.get("/v1/models")
        if response.is_error:
            raise ChatError(_message(response))
        return str(response.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise ChatError(f"{client.base_url} does not answer as a gateway: {error}") from error


def run_chat(
    base_url: str,
    *,
    model: str | None = None,
    system: str | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    api_key: str | None = None,
    read: Callable[[str], str] = input,
    transport: httpx.BaseTransport | None = None,
) -> int:
    """Talk until the user leaves; the exit status. `model` None = the first one that is served."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    with httpx.Client(
        base_url=base_url, headers=headers, timeout=_TIMEOUT, transport=transport
    ) as client:
        try:
            model = model or _first_model(client)
        except ChatError as error:
            print(error, file=sys.stderr)
            return 1
        print(f"{model} at {base_url}\n{HELP}")
        conversation = Conversation(
            client, system, model=model, max_tokens=max_tokens, temperature=temperature
        )
        while True:
            try:
                text = read("\n> ").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return 0
            if text == "/reset":
                conversation.reset()
            elif text:
                _answer(conversation, text)


def _answer(conversation: Conversation, text: str) -> None:
    started, first = time.monotonic(), None
    pieces = conversation.ask(text)
    try:
        for piece in pieces:
            first = first or time.monotonic()
            print(piece, end="", flush=True)
    except ChatError as error:
        print(f"\n{error}", file=sys.stderr)
        return
    except KeyboardInterrupt:
        print(" …", end="")
    finally:
        pieces.close()  # ends the request at the server
    print()
    if first is not None and conversation.num_tokens > 1:
        rate = (conversation.num_tokens - 1) / max(time.monotonic() - first, 1e-9)
        print(
            f"[{conversation.num_tokens} tokens, first after {first - started:.2f} s, "
            f"{rate:.1f} tok/s]"
        )
