"""The work behind one HTTP request: tokenize, open a stream per prompt, merge them, make text."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from baton.errors import BatonError, Cause, InvalidRequest
from baton.gateway.accounting import RequestRecord
from baton.gateway.backend import RequestStream, ServedModel
from baton.gateway.beams import BeamStream
from baton.gateway.choice import Choice, Delta
from baton.gateway.context import Context
from baton.gateway.prompts import Prompt, TokenIds
from baton.gateway.scores import PromptScores
from baton.types import Logprobs, Request, SamplingParams, TokenChunk

Encode = Callable[[ServedModel], Awaitable[Sequence[Prompt]]]


@dataclass(frozen=True, slots=True)
class Job:
    """What a body asks for, validated as far as that goes without its token ids."""

    id: str  # minted here: "cmpl-…"; the only one that anything is looked up by
    public_id: str  # in the answer; the client may have chosen a part of it
    model: ServedModel
    sampling: SamplingParams  # max_tokens None: up to the model's length
    encode: Encode
    prompt_param: str  # the field that prompts come from
    salt: bytes
    priority: int = 0
    beam_length_penalty: float | None = None  # None: no beam search
    structured_param: str = "structured_outputs"  # the field that `sampling`'s comes from
    wants_output: bool = True  # False: the prompt alone is of interest


@dataclass(frozen=True, slots=True)
class Usage:
    """`prompt_tokens` counts each prompt once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Generation:
    """Runs one job. `deltas` is iterated once; `close` ends it in any state.

    After `abort` (the client is gone) the iteration ends without an error and without the rest;
    after `fail` with that error.
    """

    def __init__(self, context: Context, job: Job, record: RequestRecord) -> None:
        self.job = job
        self.record = record
        self.aborted = False
        self.prompts: Sequence[Prompt] = ()
        # Per prompt, of its tokens but the first; empty unless `prompt_logprobs` asks for them.
        self.prompt_logprobs: Sequence[tuple[Logprobs, ...]] = ()
        self._scores: PromptScores | None = None
        self._context = context
        self._failure: BatonError | None = None
        self._streams: list[RequestStream] = []
        self._choices: list[Choice] = []
        self._first: RequestStream | None = None  # the stream of the first token
        context.inflight.begin(self)

    def prompt_of(self, index: int) -> Prompt:
        """Of the choice with this index."""
        return self.prompts[index // self.job.sampling.n]

    def scores_of(self, index: int) -> tuple[Logprobs, ...]:
        """Prompt logprobs, which must have been asked for, of the choice with this index."""
        return self.prompt_logprobs[index // self.job.sampling.n]

    def first_byte(self) -> None:
        """The client was given its first token just now."""
        if self._first is not None:
            self.record.first_byte(self._first.report)

    def abort(self) -> None:
        self.aborted = True
        self._stop()

    def fail(self, error: BatonError) -> None:
        self._failure = error
        self._stop()

    def close(self) -> None:
        """Nothing of this job runs afterwards, here or on a worker."""
        self._stop()
        self.record.close([stream.report for stream in self._streams])
        self._context.inflight.end(self, time.monotonic())

    def _stop(self) -> None:
        if self._scores is not None:
            self._scores.cancel()
        for stream in self._streams:
            stream.abort()

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=sum(len(prompt.token_ids) for prompt in self.prompts),
            completion_tokens=sum(choice.num_tokens for choice in self._choices),
            cached_tokens=sum(stream.report.num_cached_tokens for stream in self._streams),
        )

    async def deltas(self) -> AsyncGenerator[Delta]:
        """
        Raises:
            BatonError: the job cannot be served, or failed.
        """
        requests = await self.prepare()
        if self.aborted or self._failure is not None:
            self._raise_failure()
            return
        if self.job.sampling.prompt_logprobs is not None:
            requests = await self._scored(requests)
        if self.aborted or self._failure is not None:
            self._raise_failure()
            return
        self.record.opened(sum(len(prompt.token_ids) for prompt in self.prompts))
        if not self.job.wants_output:
            for index in range(len(requests) * self.job.sampling.n):
                yield Delta(index, "", (), (), True, "length")
            return
        self._open(requests)
        if len(self._streams) == 1:  # no task for each token
            async for chunk in self._streams[0]:
                if (delta := self._delta(0, chunk)) is not None:
                    yield delta
        else:
            async with aclosing(_merge(self._streams)) as chunks:
                async for number, chunk in chunks:
                    if (delta := self._delta(number, chunk)) is not None:
                        yield delta
        self._raise_failure()
        if not self.aborted and not all(choice.finished for choice in self._choices):
            raise BatonError(Cause.INTERNAL, "a stream ended before its choices did")

    def _delta(self, number: int, chunk: TokenChunk) -> Delta | None:
        """What a chunk of the stream with this number brings the client; None: it is surplus behind
        a stop string."""
        choice = self._choices[number * self.job.sampling.n + chunk.choice]
        if choice.finished:
            return None
        delta = choice.push(chunk)
        if choice.stopped_by_string:
            self._streams[number].finish_choice(chunk.choice)
        if not self.record.has_token:
            self._first = self._streams[number]
        self.record.token(delta)
        return delta

    async def prepare(self) -> Sequence[Request]:
        """What workers are to be asked, one for each prompt.

        Raises:
            BatonError: the job cannot be served.
        """
        self.prompts = await self.job.encode(self.job.model)
        sampling = await self._resolved(self.job.sampling)
        requests = [
            self._request(number, prompt, self._fit(prompt.token_ids, sampling))
            for number, prompt in enumerate(self.prompts)
        ]
        self._check_budget(requests)
        return requests

    async def _scored(self, requests: Sequence[Request]) -> list[Request]:
        """Fill `prompt_logprobs`; the requests without what is done by that.

        Raises:
            BatonError
        """
        self._scores = PromptScores(self._context.backend)
        try:
            self.prompt_logprobs = await self._scores.fetch(requests)
        except asyncio.CancelledError:
            if not self.aborted and self._failure is None:
                raise
        return [
            replace(request, sampling=replace(request.sampling, prompt_logprobs=None))
            for request in requests
        ]

    def _raise_failure(self) -> None:
        if self._failure is not None and not self.aborted:
            raise self._failure

    async def _resolved(self, sampling: SamplingParams) -> SamplingParams:
        """`sampling` as workers want it: words as ids, and a grammar that compiles.

        Raises:
            BatonError
        """
        context, job = self._context, self.job
        if sampling.structured_outputs is not None:
            tokenizer = context.tokenizers.tokenizer
            spec, param = sampling.structured_outputs, job.structured_param
            await context.grammars.check(spec, job.model, tokenizer, param)
        if sampling.bad_words:
            ids = await context.tokenizers.bad_words_token_ids(sampling.bad_words)
            sampling = replace(sampling, bad_words_token_ids=ids)
        return sampling

    def _request(self, number: int, prompt: Prompt, sampling: SamplingParams) -> Request:
        deadline_ms = int(self._context.settings.request_timeout_s * 1e3)
        return Request(
            request_id=f"{self.job.id}-{number}",
            prompt_token_ids=prompt.token_ids,
            sampling=sampling,
            salt=self.job.salt,
            priority=self.job.priority,
            deadline_ms=deadline_ms,
            traceparent=self.record.traceparent,
        )

    def _fit(self, prompt: TokenIds, sampling: SamplingParams) -> SamplingParams:
        """`sampling` with max_tokens cut to what the model's length leaves, as vLLM does.

        Raises:
            InvalidRequest: the prompt is empty or too long, or it or `sampling` has ids that the
                model lacks.
        """
        model, param = self.job.model, self.job.prompt_param
        if not prompt:
            raise InvalidRequest("The prompt has no tokens.", param)
        if max(prompt) >= model.vocab_size or min(prompt) < 0:
            raise InvalidRequest("The prompt has a token id out of the vocabulary.", param)
        largest, field = sampling.max_token_id()
        if largest >= model.vocab_size:
            raise InvalidRequest(f"{field} has a token id out of the vocabulary.", field)
        room = model.max_model_len - len(prompt)
        if room < 1:
            raise InvalidRequest(
                f"This model's maximum context length is {model.max_model_len} tokens, prompt and "
                f"output together, but the prompt has {len(prompt)}.",
                param,
                Cause.CONTEXT_LENGTH_EXCEEDED,
            )
        longest = self._context.defaults.max_new_tokens
        bounds = (room, sampling.max_tokens, longest)
        max_tokens = min(bound for bound in bounds if bound is not None)
        if max_tokens == sampling.max_tokens and sampling.min_tokens <= max_tokens:
            return sampling  # as nearly always; a copy is validated anew
        return replace(
            sampling, max_tokens=max_tokens, min_tokens=min(sampling.min_tokens, max_tokens)
        )

    def _check_budget(self, requests: Sequence[Request]) -> None:
        """
        Raises:
            InvalidRequest: prompts and outputs together are more than one request may take.
        """
        budget = self._context.limits.max_request_tokens
        num_tokens = sum(
            len(request.prompt_token_ids) + request.sampling.n * (request.sampling.max_tokens or 0)
            for request in requests
        )
        if num_tokens > budget:
            raise InvalidRequest(
                f"Prompts and n × max_tokens come to {num_tokens} tokens; one request may have "
                f"{budget}.",
                "max_tokens",
            )

    def _open(self, requests: Sequence[Request]) -> None:
        num_choices = len(requests) * self.job.sampling.n
        self._choices = [self._choice(index) for index in range(num_choices)]
        backend, penalty = self._context.backend, self.job.beam_length_penalty
        for request in requests:
            if penalty is None:
                self._streams.append(backend.open(request))
            else:
                eos = self.job.model.eos_token_ids
                self._streams.append(BeamStream(backend, request, penalty, eos))

    def _choice(self, index: int) -> Choice:
        job = self.job
        return Choice(
            index,
            self._context.tokenizers.tokenizer,
            job.sampling,
            job.model.eos_token_ids,
        )


async def _merge(streams: Sequence[RequestStream]) -> AsyncGenerator[tuple[int, TokenChunk]]:
    """(number of the stream, chunk) as they come. Raises what the first failing stream raises."""
    pending = {asyncio.create_task(_next(stream)): n for n, stream in enumerate(streams)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number = pending.pop(task)
                if (next_chunk := task.result()) is not None:
                    pending[asyncio.create_task(_next(streams[number]))] = number
                    yield number, next_chunk
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


async def _next(stream: RequestStream) -> TokenChunk | None:
    try:
        return await stream.__anext__()
    except StopAsyncIteration:
        return None
