"""`baton complete`: texts that the model goes on with, in the terminal."""

import sys
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any

import httpx

from baton.client.terminal import ServerError, first_model, open_client, print_rate, show, stream

HELP = "Enter completes · Ctrl-C stops an answer · Ctrl-D leaves"


class Completer:
    """Each prompt by itself; nothing is remembered."""

    def __init__(self, client: httpx.Client, **options: Any) -> None:
        """`options` go into every request; those that are None are left to the server."""
        self._client = client
        self._options = {name: value for name, value in options.items() if value is not None}
        self.num_tokens = 0  # of the last answer, as the server counts them

    def complete(self, prompt: str) -> Generator[str]:
        """What follows the prompt, in pieces.

        Raises:
            ServerError
        """
        self.num_tokens = 0
        body = {**self._options, "prompt": prompt}
        with closing(stream(self._client, "/v1/completions", body)) as chunks:
            for chunk, num_tokens in chunks:
                if num_tokens is not None:
                    self.num_tokens = num_tokens
                for choice in chunk["choices"]:
                    if text := choice.get("text"):
                        yield text


def run_complete(
    base_url: str,
    *,
    model: str | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    api_key: str | None = None,
    quick: str | None = None,
    read: Callable[[str], str] = input,
    transport: httpx.BaseTransport | None = None,
) -> int:
    """Complete until the user leaves, or `quick` alone; the exit status. `model` None = the first
    one that is served."""
    with open_client(base_url, api_key, transport) as client:
        try:
            model = model or first_model(client)
        except ServerError as error:
            print(error, file=sys.stderr)
            return 1
        completer = Completer(client, model=model, max_tokens=max_tokens, temperature=temperature)
        if quick is not None:
            shown = show(completer.complete(quick))
            print()
            return 0 if shown.ok else 1
        print(f"{model} at {base_url}\n{HELP}")
        while True:
            try:
                prompt = read("\n> ")
            except (EOFError, KeyboardInterrupt):
                print()
                return 0
            if prompt:
                shown = show(completer.complete(prompt))
                print()
                print_rate(shown, completer.num_tokens)
