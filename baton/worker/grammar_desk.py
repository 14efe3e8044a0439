"""Legs whose grammar is not compiled yet wait here, and hold up nobody else."""

import asyncio
from collections.abc import Callable

from baton.engine.commands import AddDecode, AddLocal, AddPrefill, LegCommand
from baton.errors import BatonError
from baton.grammar_pool import GrammarPool
from baton.types import LegId, StructuredOutput

Post = Callable[[LegCommand], None]
Refuse = Callable[[LegId, BatonError], None]


class GrammarDesk:
    """In front of the engine: all commands of legs pass through `post`, in their order per leg."""

    def __init__(self, pool: GrammarPool, post: Post, refuse: Refuse) -> None:
        """
        Args:
            post: to the engine.
            refuse: told instead, of a leg that the engine will never hear of.
        """
        self._pool = pool
        self._post = post
        self._refuse = refuse
        self._held: dict[LegId, list[LegCommand]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def post(self, command: LegCommand) -> None:
        held = self._held.get(command.leg)
        if held is not None:
            held.append(command)
            return
        spec = _grammar_of(command)
        if spec is None or spec in self._pool.grammars:
            self._post(command)
            return
        self._held[command.leg] = [command]
        task = asyncio.create_task(self._prepare(command.leg, spec))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _prepare(self, leg: LegId, spec: StructuredOutput) -> None:
        try:
            await self._pool.prepare(spec)
        except BatonError as error:
            del self._held[leg]
            self._refuse(leg, error)
            return
        for command in self._held.pop(leg):
            self._post(command)

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._pool.close()


def _grammar_of(command: LegCommand) -> StructuredOutput | None:
    if isinstance(command, AddPrefill | AddDecode | AddLocal):
        return command.request.sampling.structured_outputs
    return None
