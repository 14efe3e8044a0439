"""`baton chat`: a conversation in the terminal, over the gateway's own HTTP API."""

from collections.abc import Generator
from typing import Any, Unpack

import httpx

from baton.client.terminal import Talk, TerminalOptions, run_terminal

HELP = "Enter sends · /reset forgets the conversation · Ctrl-C stops an answer · Ctrl-D leaves"


class Conversation(Talk):
    """The messages so far, and the server that answers them."""

    def __init__(self, client: httpx.Client, system: str | None = None, **options: Any) -> None:
        super().__init__(client, **options)
        self._start = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._start)

    def reset(self) -> None:
        self.messages = list(self._start)

    def obey(self, line: str) -> bool:
        is_reset = line.strip() == "/reset"
        if is_reset:
            self.reset()
        return is_reset

    def ask(self, text: str) -> Generator[str]:
        """What has come of the answer joins the conversation, even if the caller stops early; a
        question without any answer does not."""
        question = {"role": "user", "content": text.strip()}
        body = {"messages": [*self.messages, question]}
        answer: list[str] = []
        try:
            for piece in self._pieces(
                "/v1/chat/completions", body, lambda choice: choice["delta"].get("content")
            ):
                answer.append(piece)
                yield piece
        finally:
            if answer:
                reply = {"role": "assistant", "content": "".join(answer)}
                self.messages += [question, reply]


def run_chat(
    base_url: str,
    *,
    system: str | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    **options: Unpack[TerminalOptions],
) -> int:
    """See `run_terminal`."""
    return run_terminal(
        base_url,
        lambda client, model: Conversation(
            client, system, model=model, max_tokens=max_tokens, temperature=temperature
        ),
        HELP,
        **options,
    )
