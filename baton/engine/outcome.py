"""What a step's results mean for the sequences that were in it."""

from collections.abc import Mapping

from baton.engine.batch import GRAMMAR_FAILED, NOTHING_ALLOWED, Sampled, ScheduledRow
from baton.engine.legs import Legs
from baton.engine.report import Report
from baton.engine.scheduler import Scheduler
from baton.engine.sequence import Leg, LegKind, Sequence, SequenceStatus
from baton.engine.step import Step
from baton.errors import Cause


class Outcome:
    """Applies a step's results, in the order of its rows."""

    def __init__(self, scheduler: Scheduler, legs: Legs, report: Report) -> None:
        self._scheduler = scheduler
        self._legs = legs
        self._report = report

    def apply(self, step: Step, sampled: Mapping[int, tuple[Sampled, ...]]) -> None:
        for seq, row in zip(step.seqs, step.rows, strict=True):
            if seq.status is not SequenceStatus.RUNNING:
                continue  # a sibling took its leg down, earlier in this loop
            results = sampled.get(row.row_id, ())
            if any(result.token_id < 0 for result in results):
                self._refuse(seq.leg, min(result.token_id for result in results))
                continue
            results = self._take_scored(seq.leg, row, results)
            seq.num_computed_tokens = row.num_context_tokens
            self._scheduler.admission.publish(seq)
            self._report.computed(seq, row.start)
            if seq.num_uncomputed_tokens == 0:
                self._complete(seq, row, results)

    def _take_scored(
        self, leg: Leg, row: ScheduledRow, results: tuple[Sampled, ...]
    ) -> tuple[Sampled, ...]:
        """Tell what belongs to the prompt; the rest belongs to `samples`."""
        if row.scoring is None:
            return results
        num_scored = len(row.scoring.token_ids)
        logprobs = tuple(one.logprobs for one in results[:num_scored] if one.logprobs is not None)
        self._report.scored(leg, row.start + 1, logprobs)
        return results[num_scored:]

    def _refuse(self, leg: Leg, why: int) -> None:
        """A row without a token takes its leg down."""
        if why == GRAMMAR_FAILED:
            detail = "the output does not fit the grammar, or the grammar is too complex"
            self._legs.fail(leg, Cause.INVALID_REQUEST, detail)
        elif why == NOTHING_ALLOWED:
            detail = "the request's constraints leave no token to choose from"
            self._legs.fail(leg, Cause.INVALID_REQUEST, detail)
        else:
            self._legs.poison(leg)
            self._legs.fail(leg, Cause.NON_FINITE_LOGITS, "the logits were not finite")

    def fail(self, step: Step, detail: str) -> None:
        """The runner raised: whoever was in the step is over."""
        for seq in step.seqs:
            if not seq.status.is_finished:
                self._legs.fail(seq.leg, Cause.STEP_FAILED, detail)

    def _complete(self, seq: Sequence, row: ScheduledRow, results: tuple[Sampled, ...]) -> None:
        """Every known token of `seq` has its KV."""
        leg = seq.leg
        if not seq.is_trunk:
            self._legs.append(seq, results[0].token_id, results[0].logprobs)
            return
        choices = [sample.choice for sample in row.samples]
        if leg.kind is LegKind.PREFILL:
            self._scheduler.leave(seq, SequenceStatus.HELD)
            self._hand_over(leg, dict(zip(choices, results, strict=True)))
        else:
            pairs = zip(choices, results, strict=True)
            self._legs.fork(leg, {choice: (r.token_id, r.logprobs) for choice, r in pairs})

    def _hand_over(self, leg: Leg, results: Mapping[int, Sampled]) -> None:
        """First tokens of a leg that is decoded elsewhere."""
        for choice, result in results.items():
            finish = self._legs.check_stop(leg, (result.token_id,))
            self._report.token(leg, choice, 0, result.token_id, result.logprobs, finish)
