"""How likely a worker's model finds a prompt: log-probabilities in bulk, beside the sessions.

A call is a local leg of one greedy token that reads no prefix cache; what it computes is there for
the request itself, which usually follows.
"""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace

from baton.engine.commands import Abort, AddLocal, Command
from baton.engine.events import LegEvent, LegFailed, LegScored, LegTokens, StepOutput
from baton.errors import BatonError
from baton.messages import GatewayMessage, WorkerMessage
from baton.types import LegId, Logprobs, Request, SamplingParams, WorkerInfo
from baton.worker.checks import check_request

Scored = tuple[int, tuple[Logprobs, ...]]  # index of the first prompt token, and theirs


class ScoreDesk:
    """An `Observer` of the engine's steps; lives on the event loop."""

    def __init__(self, info: WorkerInfo, post: Callable[[Command], None]) -> None:
        """`post`: to the engine; may raise BatonError."""
        self._info = info
        self._post = post
        self._numbers = itertools.count()
        self._inboxes: dict[LegId, asyncio.Queue[LegEvent]] = {}

    def __len__(self) -> int:
        return len(self._inboxes)

    async def score(self, request: Request) -> AsyncGenerator[Scored]:
        """Prompt tokens from index 1 on, in order, as they are computed.

        Raises:
            BatonError: it cannot be served, or failed.
        """
        num_top = request.sampling.prompt_logprobs or 0
        params = SamplingParams(temperature=0.0, seed=0, max_tokens=1, prompt_logprobs=num_top)
        request = replace(
            request, sampling=params, output_token_ids=(), finished_choices=frozenset()
        )
        check_request(request, self._info)
        leg = LegId(f"score:{next(self._numbers)}", 0)
        inbox = self._inboxes[leg] = asyncio.Queue()
        is_open = False
        try:
            self._post(AddLocal(leg, request))
            is_open = True
            while True:
                match await inbox.get():
                    case LegScored(_, start, logprobs):
                        yield start, logprobs
                    case LegFailed(_, cause, detail):
                        is_open = False
                        raise BatonError(cause, detail)
                    case LegTokens():  # the one token, behind every score
                        is_open = False
                        return
        finally:
            del self._inboxes[leg]
            if is_open:
                self._post(Abort(leg))

    def stepped(self, output: StepOutput) -> None:
        if not self._inboxes:
            return
        for event in output.events:
            leg = event.chunk.leg if isinstance(event, LegTokens) else event.leg
            inbox = self._inboxes.get(leg)
            if inbox is not None:
                inbox.put_nowait(event)

    def received(self, message: GatewayMessage) -> None:
        pass

    def sent(self, message: WorkerMessage) -> None:
        pass
