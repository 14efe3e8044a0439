"""How long things take, learned online: the one model that router, admission and planner share.

A step of a worker is a sum of parts, each proportional to one thing that it did:

    step_ms = c0 + c1·prefill_tokens + c2·prefill_tokens·(cached + prefill_tokens / 2)
              + c3·decodes + c4·context_tokens

(linear layers, attention of the prompt, per-sequence work, reading the KV cache). The coefficients
are the non-negative least-squares fit of the *relative* error over an exponentially forgotten past,
pulled towards a prior while there is little evidence. Steps far off the prediction weigh less
(Huber), and the first few, which pay for warm-up, not at all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from baton.types import StepTiming, TransferStats

NUM_FEATURES = 5
_HUBER = 0.5  # relative error beyond which a step's weight falls as 1 / error
_REFIT_EVERY = 4  # observations between two fits
_SWEEPS = 10  # of coordinate descent over five coefficients, from where they are
_MIN_LINK_BYTES = 64 * 1024
_STALL_FACTOR = 4.0  # slower than it was taken to be: as patience goes
_PLAUSIBLE_MS = (1e-3, 1e7)  # a duration outside says that a clock is broken
HALF_LIFE_MS = 30_000.0  # of what was learned, while nothing confirms it
_MIN_EVIDENCE = 0.5  # that stays, in steps: more than the prior has
_EARLY = 9.0  # steps of evidence up to which everything is news


@dataclass(frozen=True, slots=True)
class LatencyPrior:
    """What to believe of a worker that has not been seen at work, in ms per unit (see the module's
    formula)."""

    coefficients: tuple[float, ...] = (2.0, 0.05, 1e-6, 0.2, 2e-4)
    strength: float = 1e-6  # of the pull towards these, against one observation's 1
    chunk_tokens: int = 512  # prefill tokens per step until more have been seen in one


def _is_plausible(duration_ms: float) -> bool:
    return _PLAUSIBLE_MS[0] <= duration_ms <= _PLAUSIBLE_MS[1]  # False for NaN, too


def _features(prefill: float, cached: float, decodes: float, context: float) -> list[float]:
    return [1.0, prefill, prefill * (cached + prefill / 2), decodes, context]


def unseen_for(seen_at_ms: float, newest_ms: float) -> float:
    """How long others of its kind were seen at work, the newest at `newest_ms`, and this one was
    not. Rest ages nothing."""
    return 0.0 if newest_ms == -math.inf else max(newest_ms - seen_at_ms, 0.0)


def trust_in(unseen_ms: float) -> float:
    """1 … 0: what is left of an estimate. Full for one half-life, so that what is used now and then
    loses nothing."""
    return float(0.5 ** max(unseen_ms / HALF_LIFE_MS - 1, 0.0))


@dataclass(slots=True)
class LatencyModel:
    """Of one worker. Fed with StepTiming, asked for predictions; all in ms, finite and never
    negative."""

    prior: LatencyPrior = LatencyPrior()
    forgetting: float = 0.98  # weight of the past after one more step
    num_warmup: int = 3
    evidence: float = 0.0  # in steps
    num_steps: int = 0
    num_prefill_steps: int = 0
    _gram: list[list[float]] = field(default_factory=list)
    _moment: list[float] = field(default_factory=list)
    _coefficients: list[float] = field(default_factory=list)
    _chunk_tokens: int = 0
    _unfitted: int = 0

    def __post_init__(self) -> None:
        self._gram = [[0.0] * NUM_FEATURES for _ in range(NUM_FEATURES)]
        self._moment = [0.0] * NUM_FEATURES
        self._coefficients = list(self.prior.coefficients)

    def observe(self, timing: StepTiming) -> None:
        """Learn from one step. Ignores steps that did nothing, warm-up and impossible durations."""
        work = timing.num_prefill_tokens + timing.num_decodes
        if work <= 0 or not _is_plausible(timing.duration_ms):
            return
        self.num_steps += 1
        if self.num_steps <= self.num_warmup:
            return
        self._chunk_tokens = max(self._chunk_tokens, timing.num_prefill_tokens)
        self.num_prefill_steps += timing.num_prefill_tokens > 0
        row = _features(
            timing.num_prefill_tokens,
            timing.num_cached_tokens,
            timing.num_decodes,
            timing.context_tokens,
        )
        error = abs(_dot(self._coefficients, row) / timing.duration_ms - 1.0)
        trusted = self.evidence > _EARLY
        weight = _HUBER / error if trusted and error > _HUBER else 1.0
        self._accumulate([x / timing.duration_ms for x in row], weight)

    def age(self, unseen_ms: float) -> None:
        """Nothing was observed for so long: what was before weighs less against what comes now."""
        if unseen_ms <= 0 or self.evidence <= _MIN_EVIDENCE:
            return
        kept = max(0.5 ** (unseen_ms / HALF_LIFE_MS), _MIN_EVIDENCE / self.evidence)
        self.evidence *= kept
        for i in range(NUM_FEATURES):
            self._gram[i] = [kept * x for x in self._gram[i]]
            self._moment[i] *= kept

    def step_ms(self, timing: StepTiming) -> float:
        """Predicted duration of a step that does what `timing` says; its own is ignored."""
        return self._predict(
            timing.num_prefill_tokens,
            timing.num_cached_tokens,
            timing.num_decodes,
            timing.context_tokens,
        )

    def prefill_ms(self, num_uncached_tokens: int, num_cached_tokens: int = 0) -> float:
        """Time to prefill that many tokens after a cached prefix, chunk by chunk, alone on the
        worker."""
        if num_uncached_tokens <= 0:
            return 0.0
        chunks = math.ceil(num_uncached_tokens / self.chunk_tokens)
        whole = self._predict(num_uncached_tokens, num_cached_tokens, 0, 0)
        return whole + (chunks - 1) * self._fitted()[0]

    @property
    def chunk_tokens(self) -> int:
        """The most prefill tokens seen in one step."""
        return self._chunk_tokens or self.prior.chunk_tokens

    def decode_step_ms(self, batch: int, context_tokens: int) -> float:
        """Time of one step that decodes `batch` sequences with `context_tokens` tokens of context
        in all."""
        return self._predict(0, 0, max(batch, 0), max(context_tokens, 0)) if batch > 0 else 0.0

    def _predict(self, prefill: float, cached: float, decodes: float, context: float) -> float:
        return _dot(self._fitted(), _features(prefill, cached, decodes, context))

    def _accumulate(self, row: Sequence[float], weight: float) -> None:
        forgetting = self.forgetting
        for i, gram in enumerate(self._gram):
            scaled = weight * row[i]
            gram[:] = [forgetting * old + scaled * x for old, x in zip(gram, row, strict=True)]
            # Every duration is scaled to 1, so that the relative error is what is minimised.
            self._moment[i] = forgetting * self._moment[i] + scaled
        self.evidence = forgetting * self.evidence + 1.0
        self._unfitted += 1

    def _fitted(self) -> Sequence[float]:
        """The coefficients, refitted if enough has been seen since: projected coordinate descent
        from where they are.

        The prior enters as a ridge in each coefficient's own unit, so that what has not been
        exercised (decode on a prefill worker) stays at its prior instead of drifting.
        """
        early = self.evidence <= _EARLY + 1
        if self._unfitted == 0 or (self._unfitted < _REFIT_EVERY and not early):
            return self._coefficients
        self._unfitted = 0
        c = self._coefficients
        rows = []
        for i, prior in enumerate(self.prior.coefficients):
            ridge = self.prior.strength / max(prior, 1e-12) ** 2
            gram = self._gram[i]
            others = (*gram[:i], 0.0, *gram[i + 1 :])
            rows.append((i, others, self._moment[i], ridge * prior, gram[i] + ridge))
        for _ in range(_SWEEPS):
            for i, others, moment, pull, curvature in rows:
                c[i] = max((moment - _dot(others, c) + pull) / curvature, 0.0)
        return c


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    """Written out: it is most of what a fit and a prediction cost."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3] + a[4] * b[4]


@dataclass(slots=True)
class LinkModel:
    """Of one (producer, consumer) pair: measured rate and what is in flight.

    What waits for the prefill says nothing of the link; what was ready when a fetch began does.
    Even so a slow fetch may be another's doing: the estimate follows faster ones quickly and slower
    ones slowly.
    """

    bytes_per_ms: float = 500_000.0  # 500 MB/s until measured
    overhead_ms: float = 1.0  # opening a fetch and joining
    in_flight_bytes: int = 0
    num_measured: int = 0

    def transfer_ms(self, num_bytes: int, bytes_per_ms: float | None = None) -> float:
        """Time until that many bytes are there, behind those in flight, at the measured rate or
        another one."""
        rate = bytes_per_ms or self.bytes_per_ms
        return self.overhead_ms + (self.in_flight_bytes + max(num_bytes, 0)) / rate

    def backlog_ms(self) -> float:
        return self.in_flight_bytes / self.bytes_per_ms

    def started(self, num_bytes: int) -> None:
        self.in_flight_bytes += num_bytes

    def ended(self, num_bytes: int) -> None:
        self.in_flight_bytes = max(0, self.in_flight_bytes - num_bytes)

    def learn(self, stats: TransferStats) -> None:
        """From a finished fetch: as `observe`, from the part that was ready when it began. All of
        it together shows that the link is no slower than that."""
        if stats.ready_bytes >= _MIN_LINK_BYTES:
            self.observe(stats.ready_bytes, stats.ready_ms)
        elif stats.num_bytes > self.bytes_per_ms * stats.duration_ms:
            self.observe(stats.num_bytes, stats.duration_ms)

    def stalled(self) -> None:
        """A fetch was given up because too little came in time: the next one is given more."""
        self.bytes_per_ms /= _STALL_FACTOR
        self.num_measured += 1

    def observe(self, num_bytes: int, duration_ms: float) -> None:
        """Learn from what came without a wait. Too little says more of latency than of rate and is
        ignored."""
        if num_bytes < _MIN_LINK_BYTES or not _is_plausible(duration_ms):
            return
        rate = num_bytes / duration_ms
        gain = 1.0 if self.num_measured == 0 else 0.5 if rate > self.bytes_per_ms else 0.1
        self.bytes_per_ms += gain * (rate - self.bytes_per_ms)
        self.num_measured += 1
