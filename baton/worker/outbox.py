"""Collects what one event makes a worker do: messages per session, everything else in order."""

from baton.engine.commands import Command
from baton.messages import LegMessage, StepBatch
from baton.types import StepTiming, WorkerSnapshot
from baton.worker.effects import Effect, Post, Send, SessionId


class Outbox:
    """Filled by both sides of a worker while it handles an event, emptied at the end of it."""

    def __init__(self) -> None:
        self._messages: dict[SessionId, list[LegMessage]] = {}
        self._effects: list[Effect] = []

    def tell(self, session: SessionId, message: LegMessage) -> None:
        self._messages.setdefault(session, []).append(message)

    def post(self, command: Command) -> None:
        self._effects.append(Post(command))

    def emit(self, effect: Effect) -> None:
        self._effects.append(effect)

    def forget(self, session: SessionId) -> None:
        """Nobody is there to be told."""
        self._messages.pop(session, None)

    @property
    def has_messages(self) -> bool:
        return bool(self._messages)

    def take(self, snapshot: WorkerSnapshot | None, timing: StepTiming | None) -> list[Effect]:
        """Everything since the last call, all messages to one session as one batch.

        Args:
            snapshot: goes into every batch; may be None when there are no messages.
        """
        effects, self._effects = self._effects, []
        if self._messages:
            assert snapshot is not None
            messages, self._messages = self._messages, {}
            effects += [
                Send(session, StepBatch(tuple(batch), snapshot, timing))
                for session, batch in messages.items()
            ]
        return effects
