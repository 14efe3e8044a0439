"""Runs an engine to the end of a list of requests, in this thread."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from baton.engine.admission import check_request
from baton.engine.commands import Abort, AddLocal
from baton.engine.core import EngineCore
from baton.engine.events import LegAdmitted, LegEvent, LegFailed, LegScored, LegTokens
from baton.engine.sequence import LegKind
from baton.errors import BatonError, Cause
from baton.outputs import CompletionOutput, Logprob, RequestOutput
from baton.text import OutputText, Tokenizer
from baton.types import FinishReason, LegId, Logprobs, Request, TokenChunk

_FINISH_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.REPETITION: "repetition",
}
OnFinished = Callable[[RequestOutput], None]


class Choice:
    """One choice as it grows; what a stop string leaves behind it is dropped."""

    def __init__(self, index: int, request: Request, tokenizer: Tokenizer) -> None:
        self.index = index
        self.finish_reason: str | None = None
        self._sampling = request.sampling
        self._tokenizer = tokenizer
        self._output = OutputText(tokenizer, request.sampling)
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[Logprobs] = []
        self._stop_token_id: int | None = None

    @property
    def stop_string(self) -> str | None:
        return self._output.stop_string

    @property
    def first_logprobs(self) -> Logprobs:
        return self._logprobs[0]

    def push(self, chunk: TokenChunk) -> None:
        before = self._output.num_tokens
        assert chunk.start == before, "the engine's tokens come in order"
        self._text.append(self._output.push(chunk.token_ids, stop_token_id=chunk.stop_token_id))
        num_new = self._output.num_tokens - before
        self._token_ids += chunk.token_ids[:num_new]
        self._logprobs += chunk.logprobs[:num_new]
        if self.stop_string is None and chunk.finish_reason is not None:
            self._text.append(self._output.finish())
            self._stop_token_id = chunk.stop_token_id
            self.finish_reason = _FINISH_REASONS[chunk.finish_reason]
        if self.stop_string is not None:
            self.finish_reason = "stop"

    def output(self) -> CompletionOutput:
        assert self.finish_reason is not None, "an unfinished choice has no output"
        wanted = self._sampling.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text="".join(self._text),
            token_ids=self._token_ids,
            cumulative_logprob=sum(entry.logprob for entry in self._logprobs) if wanted else None,
            logprobs=[logprob_entry(self._tokenizer, *pair) for pair in self._pairs()]
            if wanted
            else None,
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason(),
        )

    def _pairs(self) -> Iterator[tuple[int, Logprobs]]:
        return zip(self._token_ids, self._logprobs, strict=True)

    def _stop_reason(self) -> int | str | None:
        if self.stop_string is not None:
            return self.stop_string
        is_stop_id = self._stop_token_id in self._sampling.stop_token_ids
        return self._stop_token_id if is_stop_id else None


def logprob_entry(tokenizer: Tokenizer, token_id: int, logprobs: Logprobs) -> dict[int, Logprob]:
    """The token itself first, then the most likely, then those asked for by id."""

    def entry(of: int, value: float, rank: int | None) -> Logprob:
        return Logprob(value, rank, tokenizer.token_bytes(of).decode(errors="replace"))

    entries = {token_id: entry(token_id, logprobs.logprob, logprobs.rank)}
    for rank, (other, value) in enumerate(logprobs.top, 1):
        entries.setdefault(other, entry(other, value, rank))
    for other, value in logprobs.asked:
        entries.setdefault(other, entry(other, value, None))
    return entries


@dataclass(slots=True)
class Job:
    """One request on its way through the engine."""

    request: Request
    prompt: str | None
    choices: list[Choice]
    tokenizer: Tokenizer
    num_cached_tokens: int = 0
    scores: list[Logprobs] = field(default_factory=list)  # of prompt tokens 1, 2, …
    open_choices: set[int] = field(init=False)

    def __post_init__(self) -> None:
        self.open_choices = {choice.index for choice in self.choices}

    @property
    def leg(self) -> LegId:
        return LegId(self.request.request_id, 0)

    def output(self) -> RequestOutput:
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self.prompt,
            prompt_token_ids=list(self.request.prompt_token_ids),
            prompt_logprobs=self._prompt_logprobs(),
            outputs=[choice.output() for choice in self.choices],
            finished=True,
            num_cached_tokens=self.num_cached_tokens,
        )

    def _prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        if self.request.sampling.prompt_logprobs is None:
            return None
        pairs = zip(self.request.prompt_token_ids[1:], self.scores, strict=True)
        return [None, *(logprob_entry(self.tokenizer, *pair) for pair in pairs)]


class OfflineEngine:
    """Feeds an EngineCore and turns its events into outputs. Not thread-safe."""

    def __init__(self, core: EngineCore, tokenizer: Tokenizer) -> None:
        self.core = core
        self._tokenizer = tokenizer
        self._jobs: dict[LegId, Job] = {}

    def check(self, request: Request) -> None:
        """
        Raises:
            BatonError: the engine can never serve this request.
        """
        check_request(self.core.config, LegKind.LOCAL, request)

    def run(
        self, requests: Sequence[tuple[Request, str | None]], on_finished: OnFinished
    ) -> list[RequestOutput]:
        """Outputs in the order of `requests` (each with its prompt's text, where it had one).

        Whatever ends this, the engine holds nothing of these requests afterwards.

        Raises:
            BatonError: a request failed; the others are given up.
        """
        waiting = deque(self._job(request, prompt) for request, prompt in requests)
        order = [job.leg for job in waiting]
        outputs: dict[LegId, RequestOutput] = {}
        try:
            while waiting or self._jobs:
                self._feed(waiting)
                for job in self._step():
                    outputs[job.leg] = job.output()
                    on_finished(outputs[job.leg])
        finally:
            self._give_up()
        return [outputs[leg] for leg in order]

    def next_logprobs(self, requests: Sequence[Request]) -> list[Logprobs]:
        """Of the first token of each request, which asks for one token with logprobs."""
        jobs = deque(self._job(request, None) for request in requests)
        order = list(jobs)
        try:
            while jobs or self._jobs:
                self._feed(jobs)
                deque(self._step(), maxlen=0)
        finally:
            self._give_up()
        return [job.choices[0].first_logprobs for job in order]

    def _job(self, request: Request, prompt: str | None) -> Job:
        choices = [Choice(i, request, self._tokenizer) for i in range(request.sampling.n)]
        return Job(request, prompt, choices, self._tokenizer)

    def _feed(self, waiting: deque[Job]) -> None:
        """Enough for the batch and a queue behind it; the engine's own queue is bounded."""
        room = 2 * self.core.config.max_num_seqs
        room -= sum(len(job.open_choices) for job in self._jobs.values())
        while waiting and room > 0:
            job = waiting.popleft()
            self._jobs[job.leg] = job
            self.core.apply(AddLocal(job.leg, job.request))
            room -= len(job.choices)

    def _step(self) -> Iterator[Job]:
        """The jobs that one engine step finishes."""
        output = self.core.step()
        if output is None and not self.core.has_work:
            raise BatonError(Cause.INTERNAL, "the engine has stalled")
        for event in output.events if output is not None else ():
            job = self._jobs.get(event.leg if not isinstance(event, LegTokens) else event.chunk.leg)
            if job is not None:
                self._apply(job, event)
                if not job.open_choices:
                    yield self._jobs.pop(job.leg)

    def _apply(self, job: Job, event: LegEvent) -> None:
        match event:
            case LegAdmitted():
                job.num_cached_tokens = event.num_cached_tokens
            case LegFailed():
                raise BatonError(event.cause, event.detail)
            case LegScored(_, start, logprobs):
                assert start == len(job.scores) + 1, "scores come in order"
                job.scores += logprobs
            case LegTokens(chunk) if chunk.choice in job.open_choices:
                choice = job.choices[chunk.choice]
                choice.push(chunk)
                if choice.finish_reason is not None:
                    job.open_choices.remove(chunk.choice)
                if choice.stop_string is not None and chunk.finish_reason is None:
                    self.core.apply(Abort(job.leg, chunk.choice))

    def _give_up(self) -> None:
        for leg in self._jobs:
            self.core.apply(Abort(leg))
        self._jobs.clear()
        while self.core.has_work:
            self.core.step()
