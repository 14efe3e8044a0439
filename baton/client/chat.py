"""`baton chat`: a conversation in the terminal, over the gateway's own HTTP API."""

import sys
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any

import httpx

from baton.client.terminal import ServerError, first_model, open_client, print_rate, show, stream

HELP = "Enter sends · /reset forgets the conversation · Ctrl-C stops an answer · Ctrl-D leaves"


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
            ServerError
        """
        question = {"role": "user", "content": text}
        answer: list[str] = []
        self.num_tokens = 0
        try:
            for piece in self._pieces([*self.messages, question]):
                answer.append(piece)
                yield piece
        finally:
            if answer:
                reply = {"role": "assistant", "content": "".join(answer)}
                self.messages += [question, reply]

    def _pieces(self, messages: list[dict[str, str]]) -> Generator[str]:
        body = {**self._options, "messages": messages}
        with closing(stream(self._client, "/v1/chat/completions", body)) as chunks:
            for chunk, num_tokens in chunks:
                if num_tokens is not None:
                    self.num_tokens = num_tokens
                for choice in chunk["choices"]:
                    if content := choice["delta"].get("content"):
                        yield content


def run_chat(
    base_url: str,
    *,
    model: str | None = None,
    system: str | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    api_key: str | None = None,
    quick: str | None = None,
    read: Callable[[str], str] = input,
    transport: httpx.BaseTransport | None = None,
) -> int:
    """Talk until the user leaves, or answer `quick` alone; the exit status. `model` None = the
    first one that is served."""
    with open_client(base_url, api_key, transport) as client:
        try:
            model = model or first_model(client)
        except ServerError as error:
            print(error, file=sys.stderr)
            return 1
        conversation = Conversation(
            client, system, model=model, max_tokens=max_tokens, temperature=temperature
        )
        if quick is not None:
            shown = show(conversation.ask(quick))
            print()
            return 0 if shown.ok else 1
        print(f"{model} at {base_url}\n{HELP}")
        while True:
            try:
                text = read("\n> ").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return 0
            if text == "/reset":
                conversation.reset()
            elif text:
                shown = show(conversation.ask(text))
                print()
                print_rate(shown, conversation.num_tokens)
