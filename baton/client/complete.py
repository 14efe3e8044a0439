"""`baton complete`: texts that the model goes on with, in the terminal."""

from collections.abc import Generator
from typing import Unpack

from baton.client.terminal import Talk, TerminalOptions, run_terminal

HELP = "Enter completes · Ctrl-C stops an answer · Ctrl-D leaves"


class Completer(Talk):
    """Each prompt by itself; nothing is remembered."""

    def ask(self, text: str) -> Generator[str]:
        return self._pieces("/v1/completions", {"prompt": text}, lambda choice: choice.get("text"))


def run_complete(
    base_url: str,
    *,
    max_tokens: int | None = None,
    temperature: float | None = None,
    **options: Unpack[TerminalOptions],
) -> int:
    """See `run_terminal`."""
    return run_terminal(
        base_url,
        lambda client, model: Completer(
            client, model=model, max_tokens=max_tokens, temperature=temperature
        ),
        HELP,
        **options,
    )
