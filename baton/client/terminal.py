"""What `baton chat` and `baton complete` share: one stream at a time, shown as it comes."""

import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any, NamedTuple, TypedDict, Unpack

import httpx

from baton.client.urls import server_root

# Reading has no deadline: the first token of a long prompt may take its time. Ctrl-C is there.
_TIMEOUT = httpx.Timeout(10.0, read=None)


class ServerError(Exception):
    """The server refused, broke off, or cannot be reached."""


def open_client(
    url: str, api_key: str | None, transport: httpx.BaseTransport | None = None
) -> httpx.Client:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return httpx.Client(
        base_url=server_root(url), headers=headers, timeout=_TIMEOUT, transport=transport
    )


def first_model(client: httpx.Client) -> str:
    """
    Raises:
        ServerError
    """
    try:
        response = client.get("/v1/models")
        if response.is_error:
            raise ServerError(_message(response))
        return str(response.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise ServerError(f"{client.base_url} does not answer as a gateway: {error}") from error


class Piece(NamedTuple):
    """One chunk of a stream."""

    chunk: dict[str, Any]
    num_tokens: int | None  # of the whole answer, as the server counts them; at the end


def stream(client: httpx.Client, path: str, body: dict[str, Any]) -> Generator[Piece]:
    """
    Raises:
        ServerError
    """
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        with client.stream("POST", path, json=body) as response:
            if response.is_error:
                response.read()
                raise ServerError(_message(response))
            for line in response.iter_lines():
                data = line.removeprefix("data:").strip()
                if line.startswith("data:") and data != "[DONE]":
                    yield _piece(json.loads(data))
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise ServerError(f"{client.base_url}: {error}") from error


def _piece(chunk: dict[str, Any]) -> Piece:
    if "error" in chunk:
        raise ServerError(chunk["error"]["message"])
    usage = chunk.get("usage")
    return Piece(chunk, usage["completion_tokens"] if usage else None)


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}: {response.text[:200]}"


class Shown(NamedTuple):
    ok: bool
    first_s: float | None  # None: nothing came
    total_s: float


def show(pieces: Generator[str]) -> Shown:
    """Print an answer as it comes. Ctrl-C ends it, here and at the server."""
    started, first_s = time.monotonic(), None
    ok = True
    try:
        for piece in pieces:
            first_s = time.monotonic() - started if first_s is None else first_s
            print(piece, end="", flush=True)
    except ServerError as error:
        print(f"\n{error}" if first_s is not None else error, file=sys.stderr)
        ok = False
    except KeyboardInterrupt:
        print(" …", end="")
    finally:
        pieces.close()
    return Shown(ok, first_s, time.monotonic() - started)


def print_rate(shown: Shown, num_tokens: int) -> None:
    if shown.first_s is None or num_tokens < 2:
        return
    rate = (num_tokens - 1) / max(shown.total_s - shown.first_s, 1e-9)
    print(f"[{num_tokens} tokens, first after {shown.first_s:.2f} s, {rate:.1f} tok/s]")


class Talk(ABC):
    """A server that is asked one thing at a time."""

    def __init__(self, client: httpx.Client, **options: Any) -> None:
        """`options` go into every request; those that are None are left to the server."""
        self._client = client
        self._options = {name: value for name, value in options.items() if value is not None}
        self.num_tokens = 0  # of the last answer, as the server counts them

    @abstractmethod
    def ask(self, text: str) -> Generator[str]:
        """The answer in pieces.

        Raises:
            ServerError
        """

    def obey(self, line: str) -> bool:
        """Whether what was typed is a command; then it is done."""
        return False

    def _pieces(
        self, path: str, body: dict[str, Any], text_of: Callable[[dict[str, Any]], str | None]
    ) -> Generator[str]:
        """`text_of`: what a choice of a chunk adds."""
        self.num_tokens = 0
        with closing(stream(self._client, path, {**self._options, **body})) as chunks:
            for chunk, num_tokens in chunks:
                if num_tokens is not None:
                    self.num_tokens = num_tokens
                for choice in chunk["choices"]:
                    if text := text_of(choice):
                        yield text


class TerminalOptions(TypedDict, total=False):
    model: str | None  # None = the first one that is served
    api_key: str | None
    quick: str | None  # asked alone
    read: Callable[[str], str]  # shows its argument; raises EOFError when the user leaves
    transport: httpx.BaseTransport | None


def run_terminal(
    base_url: str,
    talk_to: Callable[[httpx.Client, str], Talk],
    help_line: str,
    **options: Unpack[TerminalOptions],
) -> int:
    """Ask until the user leaves, or `quick` alone; the exit status. `talk_to` gets the model."""
    read, quick = options.get("read", input), options.get("quick")
    with open_client(base_url, options.get("api_key"), options.get("transport")) as client:
        try:
            model = options.get("model") or first_model(client)
        except ServerError as error:
            print(error, file=sys.stderr)
            return 1
        talk = talk_to(client, model)
        if quick is not None:
            shown = show(talk.ask(quick))
            print()
            return 0 if shown.ok else 1
        print(f"{model} at {base_url}\n{help_line}")
        while True:
            try:
                line = read("\n> ")
            except (EOFError, KeyboardInterrupt):
                print()
                return 0
            if line.strip() and not talk.obey(line):
                shown = show(talk.ask(line))
                print()
                print_rate(shown, talk.num_tokens)
