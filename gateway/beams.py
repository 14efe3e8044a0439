"""Beam search as a stream of its own: every step opens one ordinary request per beam for one token,
which a prefill worker answers alone (nothing is left to decode). What the beams share is in its
prefix cache; routing, retries and limits are those of any request."""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from baton.beam_search import Beam, BeamSearch, BeamSearchParams
from baton.errors import BatonError, Cause
from baton.gateway.backend import Backend, RequestReport, RequestStream
from baton.types import FinishReason, LegId, Logprobs, Request, TokenChunk


class BeamStream:
    """A `RequestStream`: choice i is the i-th best beam, whole, when the search is over."""

    def __init__(
        self, backend: Backend, request: Request, length_penalty: float, eos: Sequence[int]
    ) -> None:
        """
        Args:
            request: `sampling.n` is the beam width; of the rest only `max_tokens`, `ignore_eos`,
                `allowed_token_ids` and `logit_bias` count.
        """
        sampling = request.sampling
        assert sampling.max_tokens is not None, "resolved by now"
        params = BeamSearchParams(
            sampling.n,
            sampling.max_tokens,
            sampling.ignore_eos,
            length_penalty=length_penalty,
            allowed_token_ids=sampling.allowed_token_ids,
        )
        self._backend = backend
        self._request = request
        self._search = BeamSearch(params, eos)
        self._num_steps = 0
        self._streams: list[RequestStream] = []
        self._chunks: deque[TokenChunk] | None = None  # None: still searching
        self._aborted = False
        self._report = RequestReport()

    @property
    def report(self) -> RequestReport:
        """Of the prompt, which is most of the work."""
        return self._report

    def __aiter__(self) -> "BeamStream":
        return self

    async def __anext__(self) -> TokenChunk:
        if self._chunks is None:
            await self._run()
        if self._aborted or not self._chunks:
            raise StopAsyncIteration
        return self._chunks.popleft()

    async def _run(self) -> None:
        while not self._search.is_over and not self._aborted:
            try:
                self._search.advance(await self._step())
            except BatonError:
                if not self._aborted:
                    raise
            finally:
                self._stop()
        results = [] if self._aborted else self._search.results
        self._chunks = deque(self._chunk(number, beam) for number, beam in enumerate(results))

    async def _step(self) -> list[Logprobs]:
        self._num_steps += 1
        for number, beam in enumerate(self._search.beams):
            request = replace(
                self._request,
                request_id=f"{self._request.request_id}-{self._num_steps}.{number}",
                prompt_token_ids=(*self._request.prompt_token_ids, *beam.token_ids),
                sampling=replace(
                    self._search.next_params(), logit_bias=self._request.sampling.logit_bias
                ),
            )
            self._streams.append(self._backend.open(request))
        nexts = await asyncio.gather(*map(_first, self._streams))
        if self._num_steps == 1:
            self._report = self._streams[0].report
        return nexts

    def _chunk(self, number: int, beam: Beam) -> TokenChunk:
        ended = beam.finish_reason is FinishReason.STOP
        return TokenChunk(
            LegId(self._request.request_id, 0),
            number,
            0,
            beam.token_ids,
            beam.logprobs if self._request.sampling.logprobs is not None else (),
            beam.finish_reason,
            beam.token_ids[-1] if ended else None,
        )

    def finish_choice(self, choice: int) -> None:
        """Nothing to do: choices come whole."""

    def abort(self) -> None:
        self._aborted = True
        self._stop()

    def _stop(self) -> None:
        streams, self._streams = self._streams, []
        for stream in streams:
            stream.abort()


async def _first(stream: RequestStream) -> Logprobs:
    async for chunk in stream:
        if chunk.logprobs:
            return chunk.logprobs[0]
    raise BatonError(Cause.CANCELLED, "a beam ended without a token")
