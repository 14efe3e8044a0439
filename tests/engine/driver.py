"""Drives an EngineCore over a NullRunner and keeps what it says; checks integrity after every
step."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from baton.engine.batch import Batch, OnLayers, Sampled
from baton.engine.commands import (
    Abort,
    AddDecode,
    AddLocal,
    AddPrefill,
    Command,
    KVImported,
    Release,
)
from baton.engine.config import EngineConfig
from baton.engine.core import EngineCore
from baton.engine.events import KVReserved, LegAdmitted, LegEvent, LegTokens, StepOutput
from baton.engine.null_runner import NullModel, NullRunner
from baton.types import (
    BlockHash,
    BlockId,
    FinishReason,
    KVRange,
    LegId,
    Request,
    SamplingParams,
    TokenChunk,
)

Event = TypeVar("Event")
MAX_STEPS = 10_000


def leg_id(name: str) -> LegId:
    return LegId(name, 0)


def prompt(num_tokens: int, seed: int = 0) -> tuple[int, ...]:
    """Two prompts of the same seed share the shorter one as a prefix."""
    return tuple((seed * 7919 + index * 31) % 997 for index in range(num_tokens))


def request(name: str, token_ids: tuple[int, ...], **sampling: object) -> Request:
    options: dict[str, object] = {"temperature": 0.0, "max_tokens": 8, **sampling}
    return Request(name, token_ids, SamplingParams(**options))  # type: ignore[arg-type]


@dataclass(frozen=True)
class RowSeen:
    row_id: int
    start: int
    num_tokens: int
    num_samples: int
    block_ids: tuple[BlockId, ...]


class WatchedRunner(NullRunner):
    """Keeps what it ran, and misbehaves when told to: `fault` sees each batch before it is run."""

    def __init__(
        self, num_blocks: int, block_size: int, model: NullModel, num_layers: int = 1
    ) -> None:
        super().__init__(num_blocks, block_size, model, num_layers)
        self.steps: list[list[RowSeen]] = []
        self.copies: list[tuple[tuple[BlockId, BlockId], ...]] = []
        self.fault: Callable[[Batch], None] | None = None
        self.non_finite: set[int] = set()  # row ids

    def run(
        self, batch: Batch, on_layers: OnLayers | None = None
    ) -> dict[int, tuple[Sampled, ...]]:
        self.steps.append(
            [
                RowSeen(r.row_id, r.start, len(r.token_ids), len(r.samples), tuple(r.block_ids))
                for r in batch.rows
            ]
        )
        self.copies.append(batch.copies)
        targets = [target for _, target in batch.copies]
        assert len(set(targets)) == len(targets), "two copies into one block"
        if self.fault is not None:
            self.fault(batch)
        results = super().run(batch, on_layers)
        for row_id in self.non_finite & results.keys():
            results[row_id] = tuple(Sampled(-1) for _ in results[row_id])
        return results


class Driver:
    """`tokens[leg, choice]` and `finished[leg, choice]` are what a gateway would have seen."""

    def __init__(
        self, num_blocks: int = 64, *, model: NullModel | None = None, **config: object
    ) -> None:
        self.model = model or NullModel()
        options: dict[str, object] = {
            "max_num_seqs": 8,
            "max_num_batched_tokens": 64,
            "max_model_len": 512,
            "eos_token_ids": self.model.eos_token_ids,
            "num_layers": 2,
            **config,
        }
        self.config = EngineConfig(num_blocks, **options)  # type: ignore[arg-type]
        block_size, num_layers = self.config.block_size, self.config.num_layers
        self.runner = WatchedRunner(num_blocks, block_size, self.model, num_layers)
        self.now_s = 0.0
        self.ready: list[tuple[LegId, KVRange]] = []
        self.core = EngineCore(self.config, self.runner, clock=lambda: self.now_s)
        self.core.on_kv_ready = self._on_kv_ready
        self._expected: dict[tuple[object, ...], tuple[int, ...]] = {}
        self.outputs: list[StepOutput] = []
        self.events: list[LegEvent] = []
        self.stored: set[BlockHash] = set()
        self.tokens: dict[tuple[LegId, int], list[int]] = defaultdict(list)
        self.first: dict[tuple[LegId, int], int] = {}  # index of the first token
        self.finished: dict[tuple[LegId, int], FinishReason] = {}

    def _on_kv_ready(self, leg_id: LegId, ready: KVRange) -> None:
        """Inside a step: what is said to be there must be there, and be right."""
        self.ready.append((leg_id, ready))
        leg = self.core._legs.get(leg_id)
        assert leg is not None
        assert leg.trunk is not None
        blocks, start, stop = leg.trunk.block_ids, ready.token_start, ready.token_stop
        want = self.model.chain(None, leg.request.prompt_token_ids)[start:stop]
        for layer in range(ready.layer_start, ready.layer_stop):
            got = self.runner.export_kv(blocks, start, stop, layer)
            assert got == [value + layer for value in want], f"layer {layer} is not ready"

    # ── commands ─────────────────────────────────────────────────────────────────────────────────

    def apply(self, *commands: Command) -> None:
        for command in commands:
            self.core.apply(command)
            self.core.check_integrity()

    def prefill(self, request: Request) -> LegId:
        self.apply(AddPrefill(leg_id(request.request_id), request))
        return leg_id(request.request_id)

    def decode(self, request: Request) -> LegId:
        self.apply(AddDecode(leg_id(request.request_id), request))
        return leg_id(request.request_id)

    def local(self, request: Request) -> LegId:
        self.apply(AddLocal(leg_id(request.request_id), request))
        return leg_id(request.request_id)

    def release(self, leg: LegId, *, in_flight: bool = False) -> None:
        self.apply(Release(leg, in_flight))

    def abort(self, leg: LegId, choice: int | None = None, *, in_flight: bool = False) -> None:
        self.apply(Abort(leg, choice, in_flight))

    def write_kv(
        self, leg: LegId, request: Request, start: int = 0, stop: int | None = None
    ) -> None:
        """What a transfer does: the right KV in the blocks that KVReserved told."""
        values = self.model.chain(None, request.prompt_token_ids)
        self.import_kv(self.last(KVReserved, leg).block_ids, start, values[start:stop])

    def import_kv(self, block_ids: Sequence[BlockId], start: int, values: Sequence[int]) -> None:
        """Into all layers."""
        for layer in range(self.config.num_layers):
            layer_values = [value + layer for value in values]
            self.runner.import_kv(block_ids, start, layer_values, layer)

    def imported(self, leg: LegId, request: Request) -> KVImported:
        """With the first tokens that P would have sampled."""
        return KVImported(
            leg, tuple(self.first_token(leg, request, c) for c in request.open_choices())
        )

    def first_token(self, leg: LegId, request: Request, choice: int) -> TokenChunk:
        token_ids = self.expected(request, choice)[:1]
        return TokenChunk(leg, choice, 0, token_ids)

    def expected(self, request: Request, choice: int = 0) -> tuple[int, ...]:
        key = (request.prompt_token_ids, request.sampling, choice)
        if key not in self._expected:
            self._expected[key] = self.model.generate(*key, self.config.max_model_len)
        return self._expected[key]

    def reserved(self, request: Request) -> LegId:
        leg = self.decode(request)
        self.step()
        return leg

    def joined(self, request: Request) -> LegId:
        """A decode leg whose KV has come."""
        leg = self.reserved(request)
        self.write_kv(leg, request)
        self.apply(self.imported(leg, request))
        return leg

    def know(self, num_tokens: int, seed: int = 0) -> None:
        """Put a prompt into the prefix cache."""
        self.local(request(f"known{num_tokens}", prompt(num_tokens, seed), max_tokens=1))
        self.run()
        self.runner.num_tokens_computed = 0

    # ── steps ────────────────────────────────────────────────────────────────────────────────────

    def step(self) -> tuple[LegEvent, ...]:
        output = self.core.step()
        self.core.check_integrity()
        if output is None:
            assert not self.core.has_work, "work that is not done"
            return ()
        self.outputs.append(output)
        self.events += output.events
        self._keep_tokens(output)
        self._keep_hashes(output)
        return output.events

    def run(self) -> list[LegEvent]:
        """Until there is nothing to do; what happened."""
        start = len(self.events)
        for _ in range(MAX_STEPS):
            if not self.core.has_work:
                return self.events[start:]
            self.step()
        raise AssertionError("no end in sight")

    def run_until_decoding(self) -> None:
        """Until a step only decodes."""
        while not self.outputs or self.outputs[-1].snapshot.queued_prefill_tokens:
            self.step()

    def _keep_tokens(self, output: StepOutput) -> None:
        for event in output.events:
            if isinstance(event, LegTokens):
                chunk = event.chunk
                key = (chunk.leg, chunk.choice)
                assert key not in self.finished, "a token after the end"
                seen = self.tokens[key]
                first = self.first.setdefault(key, chunk.start)
                assert chunk.start == first + len(seen), "a gap"
                seen += chunk.token_ids
                if chunk.finish_reason is not None:
                    self.finished[key] = chunk.finish_reason

    def _keep_hashes(self, output: StepOutput) -> None:
        assert not set(output.stored) & self.stored, "stored twice"
        assert set(output.removed) <= self.stored, "removed what was not stored"
        self.stored = (self.stored | set(output.stored)) - set(output.removed)
        assert self.stored == set(self.core.pool.cache.ready_hashes())

    # ── what happened ────────────────────────────────────────────────────────────────────────────

    def of(self, kind: type[Event], leg: LegId | None = None) -> list[Event]:
        return [
            event
            for event in self.events
            if isinstance(event, kind) and (leg is None or getattr(event, "leg", None) == leg)
        ]

    def last(self, kind: type[Event], leg: LegId) -> Event:
        return self.of(kind, leg)[-1]

    def num_cached(self, leg: LegId) -> int:
        """Prompt tokens that were in the pool when the leg was admitted."""
        for event in self.events:
            if isinstance(event, LegAdmitted | KVReserved) and event.leg == leg:
                return event.num_cached_tokens
        raise AssertionError(f"{leg} was not admitted")

    def kv_of(self, leg: LegId) -> list[int]:
        """What a reader of an admitted leg finds in its blocks."""
        event = self.last(LegAdmitted, leg)
        return self.runner.export_kv(event.block_ids, 0, event.num_tokens)

    def assert_complete(self, leg: LegId, request: Request) -> None:
        """Every open choice ended with exactly the oracle's tokens."""
        for choice in request.open_choices():
            got = tuple(self.tokens[leg, choice])
            want = self.expected(request, choice)[len(request.committed(choice)) :]
            assert got == want, f"{leg} choice {choice}"
            assert (leg, choice) in self.finished

    def assert_idle(self) -> None:
        """Nothing runs, nothing is held, nothing leaks."""
        self.run()
        snapshot = self.core.snapshot()
        assert not self.core.has_work
        assert snapshot.free_blocks == snapshot.total_blocks
        assert snapshot.num_running == snapshot.num_waiting == snapshot.num_waiting_for_kv == 0
        assert snapshot.num_leases == snapshot.num_quarantined_blocks == 0
        assert snapshot.queued_prefill_tokens == snapshot.context_tokens == 0
