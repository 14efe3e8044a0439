"""Compiling grammars off the event loop."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from baton.errors import BatonError, Cause, InvalidRequest
from baton.grammar import PARAM, Grammars
from baton.types import StructuredOutput

COMPILE_S = 2.0
LOAD_S = 60.0  # of the tokenizer, before the first grammar
WAIT_S = 10.0  # for a thread
NUM_THREADS = 2


class GrammarPool:
    """Fills a `Grammars`, in its own threads, under a time limit.

    A thread cannot be stopped, so one that takes longer is waited for no more, and blocks its place
    until the compiler's own limits end it.
    """

    def __init__(self, grammars: Grammars, *, compile_s: float = COMPILE_S) -> None:
        self.grammars = grammars
        self._compile_s = compile_s
        self._executor = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammar")
        self._places = asyncio.Semaphore(NUM_THREADS)

    async def prepare(self, spec: StructuredOutput) -> None:
        """Return when `grammars` has it.

        Raises:
            InvalidRequest: param `structured_outputs`: it cannot be compiled, or not in time.
            BatonError: OVERLOADED: too many others are being compiled.
        """
        if spec in self.grammars:
            return
        try:
            async with asyncio.timeout(WAIT_S):
                await self._places.acquire()
        except TimeoutError:
            raise BatonError(Cause.OVERLOADED, "too many grammars are being compiled") from None
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._executor, self._compile, spec)
        work.add_done_callback(self._done)
        try:
            limit_s = self._compile_s if self.grammars.is_loaded else LOAD_S
            async with asyncio.timeout(limit_s):
                await asyncio.shield(work)
        except TimeoutError:
            raise InvalidRequest("it takes too long to compile", PARAM) from None

    def _compile(self, spec: StructuredOutput) -> None:
        self.grammars.matcher(spec)

    def _done(self, work: "asyncio.Future[None]") -> None:
        self._places.release()
        if not work.cancelled():
            work.exception()  # told to whoever waited

    def close(self) -> None:
        """Drop what waits."""
        self._executor.shutdown(wait=False, cancel_futures=True)
