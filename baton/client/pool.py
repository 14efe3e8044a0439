"""Many jobs, some at a time."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


async def in_order(
    jobs: Sequence[Callable[[], Awaitable[T]]],
    max_inflight: int,
    on_finished: Callable[[T], object],
) -> list[T]:
    """Results in the order of the jobs. The first failure cancels the others and is raised."""
    results: dict[int, T] = {}
    left = iter(enumerate(jobs))

    async def work() -> None:
        for number, job in left:  # shared: each takes the next
            results[number] = await job()
            on_finished(results[number])

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(max_inflight, len(jobs))):
                group.create_task(work())
    except* Exception as failed:  # noqa: BLE001 - whatever it is, it is raised again
        raise failed.exceptions[0] from None
    return [results[number] for number in range(len(jobs))]
