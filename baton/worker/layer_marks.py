"""From the engine's threads to the event loop: which layers of the running step are ready."""

import asyncio
import threading
from collections.abc import Callable

from baton.types import KVLayout, KVRange, LegId

MIN_BYTES = 512 << 10  # of one leg's new KV that are worth a frame; see docs/performance.md


class LayerMarks:
    """Never blocks, and holds one mark per leg at most: a later one covers those before it.

    Marks are thinned out: what a step adds to a leg in a layer or two is often less than a frame
    should carry, and then waits for more layers, or for the end of the step.
    """

    def __init__(
        self,
        layout: KVLayout,
        deliver: Callable[[LegId, KVRange], None],
        min_bytes: int = MIN_BYTES,
    ) -> None:
        """
        Args:
            deliver: called on the event loop that runs now.
        """
        self._layer_bytes = layout.token_bytes // layout.num_layers  # of one token
        self._deliver = deliver
        self._min_bytes = min_bytes
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._newest: dict[LegId, KVRange] = {}

    def mark(self, leg: LegId, where: KVRange) -> None:
        """An `OnKVReady`; from any thread."""
        layer_bytes = where.num_tokens * self._layer_bytes
        before = (where.layer_stop - 1) * layer_bytes // self._min_bytes
        if where.layer_stop * layer_bytes // self._min_bytes == before:
            return
        with self._lock:
            is_first = not self._newest
            self._newest[leg] = where
        if is_first:
            self._loop.call_soon_threadsafe(self._on_loop)

    def _on_loop(self) -> None:
        with self._lock:
            newest, self._newest = self._newest, {}
        for leg, where in newest.items():
            self._deliver(leg, where)
