"""Tokenization off the event loop."""

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from baton.errors import BatonError, Cause
from baton.text.bad_words import bad_words_token_ids
from baton.text.tokenizer import Tokenizer

T = TypeVar("T")

# A text of so many characters is tokenized in at most a third of a millisecond, about what a
# thread's turn costs.
_AT_ONCE_CHARS = 256


class TokenizerPool:
    """Runs a tokenizer in its own threads, so that a long prompt never delays a token stream.

    Bounded: at most `max_pending` calls wait or run; more are refused at once.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, num_threads: int = 2, max_pending: int = 1024
    ) -> None:
        self.tokenizer = tokenizer
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenizer")
        self._room = threading.BoundedSemaphore(max_pending)

    async def encode(
        self, text: str, *, add_special_tokens: bool = True, is_only: bool = False
    ) -> list[int]:
        """`Tokenizer.encode`.

        Args:
            is_only: no other text comes with it, so a short one need not wait for a thread.

        Raises:
            BatonError: OVERLOADED, too many calls are pending.
        """

        def call() -> list[int]:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

        if is_only and len(text) <= _AT_ONCE_CHARS:
            return call()
        return await self._run(call)

    async def encode_input(
        self, text: str, second: str | None = None, **options: Any
    ) -> tuple[list[int], int | None]:
        """`Tokenizer.encode_input`; raises as `encode`."""
        return await self._run(lambda: self.tokenizer.encode_input(text, second, **options))

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """`Tokenizer.decode`; raises as `encode`."""
        return await self._run(
            lambda: self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        )

    async def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """`Tokenizer.encode_chat`.

        Raises:
            InvalidRequest: param "messages".
            BatonError: OVERLOADED.
        """
        return await self._run(lambda: self.tokenizer.encode_chat(messages, **options))

    async def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """`Tokenizer.render_chat`; raises as `encode_chat`."""
        return await self._run(lambda: self.tokenizer.render_chat(messages, **options))

    async def bad_words_token_ids(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """`baton.text.bad_words.bad_words_token_ids`.

        Raises:
            InvalidRequest: param "bad_words".
            BatonError: OVERLOADED.
        """
        return await self._run(lambda: bad_words_token_ids(self.tokenizer, words))

    def close(self) -> None:
        """Drops what waits; returns when what runs is done."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    async def _run(self, call: Callable[[], T]) -> T:
        if not self._room.acquire(blocking=False):
            raise BatonError(Cause.OVERLOADED, "too many prompts are waiting to be tokenized")
        future = self._executor.submit(call)
        # Counted until the thread is done with it, not until the caller stops waiting: a client
        # that goes away does not free the thread.
        future.add_done_callback(lambda _: self._room.release())
        return await asyncio.wrap_future(future)
