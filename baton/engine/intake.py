"""What each command does; see `baton.engine.commands` for what they mean."""

from dataclasses import replace

from baton.engine import commands as c
from baton.engine.admission import check_request
from baton.engine.block_pool import BlockPool
from baton.engine.config import EngineConfig
from baton.engine.legs import Legs
from baton.engine.report import Report
from baton.engine.scheduler import Scheduler
from baton.engine.sequence import Leg, LegKind, Sequence, SequenceStatus
from baton.errors import BatonError, Cause
from baton.types import LegId

_OTHER_IDS = "the leg that runs here has other tokens"


class Intake:
    """Applies commands between steps. Commands for unknown legs have crossed the leg's end and are
    ignored."""

    def __init__(
        self,
        config: EngineConfig,
        pool: BlockPool,
        scheduler: Scheduler,
        legs: Legs,
        report: Report,
    ) -> None:
        self._config = config
        self._pool = pool
        self._scheduler = scheduler
        self._legs = legs
        self._report = report

    def apply(self, command: c.Command) -> None:
        match command:
            case c.AddPrefill() | c.AddDecode() | c.AddLocal() | c.Share():
                self._open(command)
            case c.Advance():
                self._advance(command)
            case c.PrefixArrived() | c.PinPrefix() | c.UnpinPrefix():
                self._on_prefix(command)
            case c.KVImported():
                self._kv_imported(command)
            case c.KVFailed():
                self._kv_failed(command)
            case c.ComputeHere():
                self._compute_here(command)
            case c.Retain():
                self._retain(command.leg)
            case c.Pin():
                self._pin(command.leg)
            case c.Release() | c.Abort(choice=None):
                self._close(command.leg, command.in_flight)
            case c.Abort():
                self._abort_choice(command)
            case c.Quiesced():
                self._pool.quiesce(command.leg)

    # ── opening ──────────────────────────────────────────────────────────────────────────────────

    def _open(self, command: c.AddPrefill | c.AddDecode | c.AddLocal | c.Share) -> None:
        match command:
            case c.AddPrefill():
                self._add_prefill(command)
            case c.AddDecode():
                self._add_decode(command)
            case c.AddLocal():
                self._add_local(command)
            case c.Share():
                self._share(command)

    def _add_prefill(self, command: c.AddPrefill) -> None:
        leg = self._legs.open(LegKind.PREFILL, command.leg, command.request)
        if leg is not None:
            leg.num_fetch_tokens = command.num_fetch_tokens
            self._scheduler.enqueue(self._legs.new_trunk(leg))

    def _add_local(self, command: c.AddLocal) -> None:
        leg = self._legs.open(LegKind.LOCAL, command.leg, command.request)
        if leg is not None:
            leg.num_fetch_tokens = command.num_fetch_tokens
            self._compute(leg)

    def _compute(self, leg: Leg) -> None:
        """Line up the open choices; the trunk, if there is one, has KV already."""
        for choice in sorted(leg.open_choices):
            self._legs.settle(leg, choice)
        if not leg.open_choices:
            self._legs.close(leg, SequenceStatus.FINISHED_STOPPED, in_flight=False)
            return
        trunk = leg.trunk or self._legs.new_trunk(leg)
        if len(leg.open_choices) == 1:
            self._legs.narrow(leg, trunk)
        # Tokens are sampled from the last known token's logits, so that one is run in any case.
        trunk.num_computed_tokens = min(trunk.num_computed_tokens, trunk.num_tokens - 1)
        self._scheduler.enqueue(trunk)

    def _add_decode(self, command: c.AddDecode) -> None:
        leg = self._legs.open(LegKind.DECODE, command.leg, command.request)
        if leg is None:
            return
        trunk = self._legs.new_trunk(leg)
        num_prompt = leg.num_prompt_tokens
        leg.num_fetched_tokens = num_prompt if command.num_tokens is None else command.num_tokens
        if leg.num_fetched_tokens > num_prompt:
            trunk.output_token_ids += leg.request.shared_token_ids[num_prompt:]
        self._scheduler.park(trunk)
        num_cached = self._scheduler.admission.reserve(trunk, self._scheduler.num_decoding())
        if num_cached is None:
            self._legs.close(leg, SequenceStatus.FINISHED_ABORTED, in_flight=False)
            self._report.refused(command.leg, self._pool.num_free)
        else:
            leg.num_verified_tokens = num_cached
            self._report.reserved(leg, trunk.block_ids, num_cached)

    # ── to another worker, and from one ──────────────────────────────────────────────────────────

    def _share(self, command: c.Share) -> None:
        known = command.request.shared_token_ids
        source = self._legs.get(command.source)
        wanted = tuple(command.request.open_choices())
        branches = source.branches if source is not None else {}
        able = [branches[choice] for choice in wanted if choice in branches]
        if not able:
            self._report.refused(command.leg, self._pool.num_free)
            return
        branch = max(able, key=lambda seq: seq.num_computed_tokens)
        num_blocks = min(branch.num_computed_tokens, len(known)) // self._config.block_size
        num_tokens = num_blocks * self._config.block_size
        if not num_blocks:
            self._report.refused(command.leg, self._pool.num_free)
        elif tuple(branch.tokens(0, num_tokens)) != known[:num_tokens]:
            self._report.failed(command.leg, Cause.TOKENS_MISMATCH, _OTHER_IDS)
        else:
            leg = self._legs.open(LegKind.PREFILL, command.leg, command.request)
            if leg is not None:
                self._legs.hold(leg, branch.block_ids[:num_blocks], num_tokens)

    def _advance(self, command: c.Advance) -> None:
        leg = self._legs.get(command.leg)
        if leg is None:
            return
        leg.request = replace(leg.request, output_token_ids=command.output_token_ids)
        try:
            check_request(self._config, leg.kind, leg.request)
        except BatonError as error:
            self._legs.fail(leg, error.cause, error.message)
            return
        for choice, branch in tuple(leg.branches.items()):
            known, own = leg.request.committed(choice), branch.output_token_ids
            num_common = min(len(known), len(own))
            if list(known[:num_common]) != own[:num_common]:
                self._legs.fail(leg, Cause.TOKENS_MISMATCH, _OTHER_IDS)
                return
            if num_common < len(known):
                self._scheduler.extend(branch, known[num_common:])

    # ── waiting for KV ───────────────────────────────────────────────────────────────────────────

    def _waiting_for_kv(self, leg_id: LegId) -> tuple[Leg, Sequence] | None:
        leg = self._legs.get(leg_id)
        if leg is None or leg.trunk is None:
            return None
        return (leg, leg.trunk) if leg.trunk.status is SequenceStatus.WAITING_FOR_KV else None

    def _kv_imported(self, command: c.KVImported) -> None:
        found = self._waiting_for_kv(command.leg)
        if found is None:
            return
        leg, trunk = found
        if leg.num_fetched_tokens != leg.num_prompt_tokens:
            leg.num_verified_tokens = leg.num_fetched_tokens
            self._go_on(leg, trunk)
            return
        first_tokens = {
            chunk.choice: (chunk.token_ids[0], chunk.logprobs[0] if chunk.logprobs else None)
            for chunk in command.first_tokens
            if chunk.start == 0
            and chunk.token_ids
            and 0 <= chunk.token_ids[0] < self._config.vocab_size
        }
        for choice in sorted(leg.open_choices):
            if choice not in first_tokens and not leg.request.committed(choice):
                detail = f"no valid first token for choice {choice}"
                self._legs.fail(leg, Cause.PROTOCOL, detail)
                return
        trunk.num_computed_tokens = leg.num_prompt_tokens
        self._scheduler.admission.publish(trunk)
        self._legs.fork(leg, first_tokens)

    def _kv_failed(self, command: c.KVFailed) -> None:
        found = self._waiting_for_kv(command.leg)
        if found is not None:
            leg, trunk = found
            own = trunk.num_published_blocks * self._config.block_size
            leg.num_verified_tokens = min(max(command.valid_tokens, own), leg.num_fetched_tokens)

    def _compute_here(self, command: c.ComputeHere) -> None:
        found = self._waiting_for_kv(command.leg)
        if found is not None:
            self._go_on(*found)

    def _go_on(self, leg: Leg, trunk: Sequence) -> None:
        """Compute here what is behind the verified tokens."""
        leg.kind = LegKind.LOCAL
        trunk.num_computed_tokens = leg.num_verified_tokens
        self._scheduler.admission.publish(trunk)
        self._scheduler.leave(trunk, SequenceStatus.HELD)
        self._compute(leg)

    # ── prefixes by hash ─────────────────────────────────────────────────────────────────────────

    def _on_prefix(self, command: c.PrefixArrived | c.PinPrefix | c.UnpinPrefix) -> None:
        match command:
            case c.PrefixArrived():
                self._prefix_arrived(command)
            case c.PinPrefix(pin, hashes):
                self._report.prefix_pinned(pin, self._pool.pin_prefix(pin, hashes))
            case c.UnpinPrefix(pin):
                self._pool.unpin_prefix(pin)

    def _prefix_arrived(self, command: c.PrefixArrived) -> None:
        leg = self._legs.get(command.leg)
        if leg is None or leg.kind is LegKind.DECODE:
            return
        for seq in leg.sequences():
            if seq.status is SequenceStatus.WAITING_FOR_KV:
                leg.is_exposed = False
                self._scheduler.unpark(seq, min(command.valid_tokens, leg.num_prompt_tokens - 1))

    # ── held ─────────────────────────────────────────────────────────────────────────────────────

    def _retain(self, leg_id: LegId) -> None:
        leg = self._legs.get(leg_id)
        trunk = leg.trunk if leg is not None else None
        if leg is None or trunk is None or trunk.status is not SequenceStatus.HELD:
            return
        if not leg.is_retained:
            leg.is_retained = True
            self._pool.retain(leg_id, self._scheduler.take_blocks(trunk))

    def _pin(self, leg_id: LegId) -> None:
        leg = self._legs.get(leg_id)
        if leg is None or leg.kind is not LegKind.PREFILL:
            self._report.lease_evicted(leg_id)
            return
        if leg.is_retained and leg.trunk is not None:
            leg.is_retained = False
            leg.trunk.block_ids = self._pool.pin(leg_id)
        self._report.pinned(leg_id)

    # ── ending ───────────────────────────────────────────────────────────────────────────────────

    def _close(self, leg_id: LegId, in_flight: bool) -> None:
        leg = self._legs.get(leg_id)
        if leg is not None:
            self._legs.close(leg, SequenceStatus.FINISHED_ABORTED, in_flight=in_flight)

    def _abort_choice(self, command: c.Abort) -> None:
        leg = self._legs.get(command.leg)
        if leg is None or command.choice not in leg.open_choices:
            return
        if leg.kind is LegKind.PREFILL:
            leg.open_choices.discard(command.choice)  # held all the same: somebody may be reading
        elif leg.open_choices == {command.choice}:
            self._close(command.leg, command.in_flight)
        elif command.choice in leg.branches:
            self._legs.finish(leg.branches[command.choice], SequenceStatus.FINISHED_ABORTED)
        else:
            leg.open_choices.discard(command.choice)
