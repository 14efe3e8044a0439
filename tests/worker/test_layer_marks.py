"""Marks cross from threads to the loop: few, the newest, and never waiting."""

import asyncio
import threading

from baton.types import KVGroup, KVKind, KVLayout, KVRange, LegId
from baton.worker.layer_marks import LayerMarks

NUM_LAYERS = 8
LAYOUT = KVLayout((KVGroup(KVKind.FULL, NUM_LAYERS, 1, 4, "float32"),), block_size=16)
LAYER_BYTES = 2 * 4 * 4  # of a token
A, B = LegId("a", 1), LegId("b", 1)


async def told(min_bytes: int, num_tokens: int) -> list[int]:
    """How many layers each delivery of a whole step's marks covers, when the loop is quick."""
    got: list[int] = []
    marks = LayerMarks(LAYOUT, lambda _, where: got.append(where.layer_stop), min_bytes)
    for layer in range(1, NUM_LAYERS):
        marks.mark(A, KVRange(0, layer, 16, 16 + num_tokens))
        await asyncio.sleep(0)
    return got


async def test_marks_are_thinned_out_to_frames_that_are_worth_it() -> None:
    assert await told(100 * LAYER_BYTES, 100) == [1, 2, 3, 4, 5, 6, 7]
    assert await told(100 * LAYER_BYTES, 50) == [2, 4, 6]
    assert await told(100 * LAYER_BYTES, 34) == [3, 6]
    assert await told(100 * LAYER_BYTES, 300) == [1, 2, 3, 4, 5, 6, 7]


async def test_a_short_prompt_waits_for_the_end_of_its_step() -> None:
    assert await told(100 * LAYER_BYTES, 14) == []


async def test_while_the_loop_is_busy_only_the_newest_of_each_leg_waits() -> None:
    got: list[tuple[LegId, KVRange]] = []
    marks = LayerMarks(LAYOUT, lambda leg, where: got.append((leg, where)), 1)

    def engine() -> None:
        for layer in range(1, NUM_LAYERS):
            for leg in (A, B):
                marks.mark(leg, KVRange(0, layer, 0, 16))

    thread = threading.Thread(target=engine)
    thread.start()
    thread.join()  # the loop, too
    assert got == []
    await asyncio.sleep(0.01)
    newest = KVRange(0, NUM_LAYERS - 1, 0, 16)
    assert got == [(A, newest), (B, newest)]
