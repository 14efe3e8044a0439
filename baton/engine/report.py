"""What one step has to tell: events are collected here, in order, by everybody who makes them."""

from baton.engine.config import EngineConfig
from baton.engine.events import (
    KVReserved,
    LeaseEvicted,
    LegAdmitted,
    LegEvent,
    LegFailed,
    LegPinned,
    LegPreempted,
    LegRefused,
    LegScored,
    LegTokens,
    PrefillProgress,
    PrefixPinned,
    PrefixReserved,
)
from baton.engine.sequence import Leg, LegKind, Sequence
from baton.errors import Cause
from baton.types import HASH_TOKENS, BlockId, FinishReason, LegId, Logprobs, TokenChunk


class Report:
    """The events since the previous StepOutput."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._events: list[LegEvent] = []
        self._pinned: list[PrefixPinned] = []

    def __bool__(self) -> bool:
        return bool(self._events or self._pinned)

    def take(self) -> tuple[LegEvent, ...]:
        events = tuple(self._events)
        self._events.clear()
        return events

    def admitted(self, seq: Sequence) -> None:
        """Once per leg, though a preempted one is admitted again."""
        leg = seq.leg
        if not leg.is_admitted:
            leg.is_admitted = True
            leg.is_exposed = leg.kind is LegKind.PREFILL
            num_prompt = seq.num_prompt_tokens
            num_cached = min(seq.num_computed_tokens, num_prompt)
            blocks = tuple(seq.block_ids[: self._config.num_blocks_for(num_prompt)])
            self._events.append(LegAdmitted(leg.leg_id, blocks, num_prompt, num_cached))

    def prefix_reserved(self, seq: Sequence, num_fetch_tokens: int) -> None:
        leg = seq.leg
        leg.is_exposed = True
        blocks = tuple(seq.block_ids[: self._config.num_blocks_for(seq.num_prompt_tokens)])
        num_hashes = seq.num_prompt_tokens // HASH_TOKENS
        self._events.append(
            PrefixReserved(
                leg.leg_id,
                blocks,
                tuple(seq.hashes[:num_hashes]),
                seq.num_computed_tokens,
                num_fetch_tokens,
            )
        )

    def prefix_pinned(self, pin: int, block_ids: list[BlockId]) -> None:
        num_tokens = len(block_ids) * self._config.block_size
        self._pinned.append(PrefixPinned(pin, tuple(block_ids), num_tokens))

    def take_pinned(self) -> tuple[PrefixPinned, ...]:
        pinned = tuple(self._pinned)
        self._pinned.clear()
        return pinned

    def reserved(self, leg: Leg, block_ids: list[BlockId], num_cached_tokens: int) -> None:
        leg.is_admitted = leg.is_exposed = True
        blocks = tuple(block_ids)
        event = KVReserved(leg.leg_id, blocks, leg.num_fetched_tokens, num_cached_tokens)
        self._events.append(event)

    def shared(self, leg: Leg, block_ids: list[BlockId], num_tokens: int) -> None:
        leg.is_admitted = leg.is_exposed = True
        blocks = tuple(block_ids)
        self._events.append(LegAdmitted(leg.leg_id, blocks, num_tokens, num_tokens))

    def refused(self, leg: LegId, num_free_blocks: int) -> None:
        self._events.append(LegRefused(leg, num_free_blocks))

    def failed(self, leg: LegId, cause: Cause, detail: str) -> None:
        self._events.append(LegFailed(leg, cause, detail))

    def preempted(self, leg: LegId) -> None:
        self._events.append(LegPreempted(leg))

    def pinned(self, leg: LegId) -> None:
        self._events.append(LegPinned(leg))

    def lease_evicted(self, leg: LegId) -> None:
        self._events.append(LeaseEvicted(leg))

    def computed(self, seq: Sequence, start: int) -> None:
        """The KV of tokens [start, num_computed_tokens) is new in the pool."""
        leg, num_prompt = seq.leg, seq.num_prompt_tokens
        stop = min(seq.num_computed_tokens, num_prompt)
        if start >= stop or leg.has_emitted or seq.output_token_ids:
            return
        self._events.append(PrefillProgress(leg.leg_id, stop))

    def token(
        self,
        leg: Leg,
        choice: int,
        index: int,
        token_id: int,
        logprobs: Logprobs | None,
        finish: tuple[FinishReason | None, int | None],
    ) -> None:
        leg.has_emitted = True
        extra = () if logprobs is None else (logprobs,)
        chunk = TokenChunk(leg.leg_id, choice, index, (token_id,), extra, *finish)
        self._events.append(LegTokens(chunk))

    def scored(self, leg: Leg, start: int, logprobs: tuple[Logprobs, ...]) -> None:
        """Of prompt tokens [start, …); what is told already (a preempted leg computes it again) is
        left out."""
        first = max(start, leg.num_scored_tokens)
        new = logprobs[first - start :]
        if new:
            leg.num_scored_tokens = first + len(new)
            self._events.append(LegScored(leg.leg_id, first, new))

    def finished(self, leg: Leg, choice: int, index: int, reason: FinishReason) -> None:
        """A choice that needs no more tokens than it came with."""
        leg.has_emitted = True
        chunk = TokenChunk(leg.leg_id, choice, index, (), (), reason)
        self._events.append(LegTokens(chunk))
