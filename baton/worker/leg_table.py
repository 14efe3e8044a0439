"""What both sides of a worker know of their legs."""

from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from baton.types import LegId
from baton.worker.effects import SessionId


class Leg(Protocol):
    @property
    def session(self) -> SessionId: ...

    @property
    def deadline_at_ms(self) -> int | None: ...


AnyLeg = TypeVar("AnyLeg", bound=Leg)


class LegOwner(Generic[AnyLeg]):
    """Whose legs they are, and which of them are late."""

    def __init__(self) -> None:
        self._legs: dict[LegId, AnyLeg] = {}

    def __len__(self) -> int:
        return len(self._legs)

    def __iter__(self) -> Iterator[LegId]:
        return iter(self._legs)

    def __contains__(self, leg: LegId) -> bool:
        return leg in self._legs

    def session_of(self, leg: LegId) -> SessionId:
        return self._legs[leg].session

    def legs_of(self, session: SessionId) -> list[LegId]:
        return [leg for leg, record in self._legs.items() if record.session == session]

    def overdue(self, now_ms: int) -> list[LegId]:
        return [
            leg
            for leg, record in self._legs.items()
            if record.deadline_at_ms is not None and record.deadline_at_ms <= now_ms
        ]
