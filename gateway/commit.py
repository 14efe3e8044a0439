"""The commit rule: which output tokens of a request the gateway has, and what a new chunk adds to
them."""

from dataclasses import dataclass, field, replace

from baton.types import LegId, Request, TokenChunk


@dataclass(slots=True)
class _Choice:
    token_ids: list[int] = field(default_factory=list)
    finished: bool = False
    finished_by: LegId | None = None  # None: the gateway ended it


class OutputLog:
    """Committed output of every choice, strictly in index order.

    A token is committed when the gateway has it. What comes again is dropped; if it differs, that
    is counted in `num_defects`, because every leg must produce the same tokens.
    """

    def __init__(self, num_choices: int) -> None:
        self._choices = [_Choice() for _ in range(num_choices)]
        self.num_defects = 0

    def append(self, chunk: TokenChunk) -> bool:
        """Commit a chunk that is the next tokens of a choice and not its end, as nearly all are.
        False for every other, which `commit` has to look at."""
        if chunk.choice >= len(self._choices) or chunk.finish_reason is not None:
            return False
        choice = self._choices[chunk.choice]
        if choice.finished or chunk.start != len(choice.token_ids) or not chunk.token_ids:
            return False
        choice.token_ids += chunk.token_ids
        return True

    def commit(self, chunk: TokenChunk) -> TokenChunk | None:
        """Append what is new and return it; None when nothing is.

        Raises:
            ValueError: the chunk leaves a gap, or names a choice that does not exist.
        """
        if not 0 <= chunk.choice < len(self._choices):
            raise ValueError(f"choice {chunk.choice} of {len(self._choices)}")
        choice = self._choices[chunk.choice]
        known = len(choice.token_ids)
        stop = chunk.start + len(chunk.token_ids)
        if choice.finished:
            return None  # surplus behind a stop string or an abort
        if chunk.start > known:
            raise ValueError(f"index {chunk.start} after {known} committed tokens")
        again = min(known, stop) - chunk.start
        if again and self.contradicts(chunk):
            self.num_defects += 1
        new = chunk.token_ids[again:]
        choice.token_ids.extend(new)
        ends = chunk.finish_reason is not None and stop == len(choice.token_ids)
        if ends:
            choice.finished, choice.finished_by = True, chunk.leg
        if not new and not ends:
            return None
        if not again and ends == (chunk.finish_reason is not None):
            return chunk
        return chunk._replace(
            start=stop - len(new),
            token_ids=new,
            logprobs=chunk.logprobs[again:],
            finish_reason=chunk.finish_reason if ends else None,
        )

    def contradicts(self, chunk: TokenChunk) -> bool:
        """Does it have another id at a committed index?"""
        if not 0 <= chunk.choice < len(self._choices):
            return False
        token_ids = self._choices[chunk.choice].token_ids
        if chunk.start >= len(token_ids):
            return False
        known = token_ids[chunk.start :]
        return any(a != b for a, b in zip(chunk.token_ids, known, strict=False))

    def finish(self, choice: int) -> bool:
        """The gateway ends a choice; False when it was over already."""
        entry = self._choices[choice]
        fresh = not entry.finished
        entry.finished = True
        return fresh

    def ended_by(self, leg: LegId) -> bool:
        """Every choice is over, and it was this leg that said so."""
        return all(choice.finished and choice.finished_by == leg for choice in self._choices)

    @property
    def all_finished(self) -> bool:
        return all(choice.finished for choice in self._choices)

    @property
    def any_committed(self) -> bool:
        return any(choice.token_ids for choice in self._choices)

    @property
    def token_ids(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(choice.token_ids) for choice in self._choices)

    @property
    def open_choices(self) -> tuple[int, ...]:
        return tuple(i for i, choice in enumerate(self._choices) if not choice.finished)

    @property
    def finished_choices(self) -> frozenset[int]:
        return frozenset(i for i, choice in enumerate(self._choices) if choice.finished)

    def length(self, choice: int) -> int:
        return len(self._choices[choice].token_ids)


def resumed(request: Request, output: OutputLog, left_ms: float) -> Request:
    """The request as of now, for whoever goes on with it. `left_ms`: until its deadline."""
    return replace(
        request,
        output_token_ids=output.token_ids if output.any_committed else (),
        finished_choices=output.finished_choices,
        deadline_ms=None if request.deadline_ms is None else max(int(left_ms), 1),
    )
