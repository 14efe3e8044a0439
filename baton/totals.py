"""What a worker has counted since it started; gateways add it up for the whole fleet."""

from dataclasses import dataclass, fields

STEP_TOKENS = (1, *(2**power for power in range(3, 15)))  # upper bounds of `steps_by_tokens`
_NONE = (0,) * (len(STEP_TOKENS) + 1)


@dataclass(frozen=True, slots=True)
class WorkerTotals:
    num_preemptions: int = 0
    num_failed_fetches: int = 0  # as a consumer
    num_expired_leases: int = 0  # as a producer
    num_step_tokens: int = 0  # computed in all steps: of prompts, and one for each decode
    steps_by_tokens: tuple[int, ...] = _NONE  # steps with that many, not cumulated; the last: more

    def __add__(self, more: "WorkerTotals") -> "WorkerTotals":
        return self._with(more, 1)

    def __sub__(self, earlier: "WorkerTotals") -> "WorkerTotals":
        """What came since; never less than nothing."""
        return self._with(earlier, -1)

    def _with(self, other: "WorkerTotals", sign: int) -> "WorkerTotals":
        def joined(left: int, right: int) -> int:
            return max(left + sign * right, 0)

        numbers = {
            field.name: joined(getattr(self, field.name), getattr(other, field.name))
            for field in fields(self)
            if field.name != "steps_by_tokens"
        }
        pairs = zip(self.steps_by_tokens, other.steps_by_tokens, strict=True)
        return WorkerTotals(steps_by_tokens=tuple(joined(*pair) for pair in pairs), **numbers)


NO_TOTALS = WorkerTotals()
