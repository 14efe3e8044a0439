"""The consumer side of a fetch: verifies frames and writes their KV into reserved blocks."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from baton.errors import BatonError, Cause
from baton.kvtransfer.base import DeviceFrame, Incoming
from baton.kvtransfer.frames import Frame, FrameKind, FrameReader, covered, is_small_end
from baton.types import BlockId, KVRange

if TYPE_CHECKING:  # it needs torch; what is here does not
    from baton.kvtransfer.memory import KVMemory

INITIAL_RATE_BYTES_S = 50e6  # of a link nothing is known about
_MIN_PATIENCE_S = 2.0
_PATIENCE_FACTOR = 4.0


class Importer:
    """A `FrameSink` for one fetch; a refetch needs a new one.

    Within a layer, frames must bring ascending, adjacent token ranges, so what is there is always
    one number per layer. The blocks may be touched again when the fetch has returned or raised.
    """

    def __init__(
        self,
        memory: "KVMemory",
        block_ids: Sequence[BlockId],
        where: KVRange,
        rate_bytes_s: float = INITIAL_RATE_BYTES_S,
        clock: Callable[[], float] = time.monotonic,
        takes_less: bool = False,
    ) -> None:
        """
        Args:
            block_ids: reserved for this sequence; they cover its tokens from 0 on, in order.
            where: what was reserved and is to be fetched. `where.token_start` tokens are there
                already. No tokens at all = only the end frame is wanted.
            rate_bytes_s: measured rate of the link, for the progress deadline.
            clock: monotonic seconds.
            takes_less: by hash, the producer has what it has: it says so at opening, and what is
                beyond is not waited for.
        """
        self._memory = memory
        self._block_ids = block_ids
        self._where = where
        self._takes_less = takes_less
        self._rate_bytes_s = rate_bytes_s
        self._clock = clock
        self._started_s = 0.0
        self._num_ready_tokens = where.token_start
        self._reader: FrameReader | None = None
        self._next_token = dict.fromkeys(
            range(where.layer_start, where.layer_stop), where.token_start
        )
        self.num_bytes = 0
        self.ready_bytes = 0  # what was ready at opening, once it is all there
        self.ready_ms = 0.0
        self.end_payload: bytes | None = None

    @property
    def valid_tokens(self) -> int:
        """Prompt tokens [0, valid_tokens) are verified and in the blocks, in all layers."""
        return min(self._next_token.values())

    @property
    def is_complete(self) -> bool:
        """Everything that was reserved is there, and the end frame too."""
        return self.end_payload is not None

    def opened(self, epoch: int, num_ready_tokens: int) -> None:
        if self._reader is not None:
            raise BatonError(Cause.PROTOCOL, "opened twice")
        self._reader = FrameReader(epoch)
        if self._takes_less:
            self._where = covered(self._where, num_ready_tokens)
        self._num_ready_tokens = min(num_ready_tokens, self._where.token_stop)
        self._started_s = self._clock()

    async def frame(self, *frames: Incoming) -> bool:
        if self._reader is None:
            raise BatonError(Cause.FRAME_ORDER, "a frame before opening")
        if len(frames) == 1 and is_small_end(frames[0]):
            self._apply_all(self._reader, frames)  # nothing to copy: it need not queue for that
        else:
            await self._memory.run(self._import, self._reader, frames)
        is_timed = self._where.token_start < self._num_ready_tokens <= self.valid_tokens
        if is_timed and not self.ready_bytes:
            self.ready_bytes = self.num_bytes
            self.ready_ms = (self._clock() - self._started_s) * 1e3
        return self.is_complete

    def _apply_all(self, reader: FrameReader, frames: Sequence[Incoming]) -> None:
        """While nobody else changes this importer."""
        for data, digest in zip(frames, self._digests(frames), strict=True):
            if self.is_complete:
                raise BatonError(Cause.FRAME_ORDER, "a frame after the end frame")
            self._apply(reader.accept(data, digest))
            self.num_bytes += len(data)

    def _digests(self, frames: Sequence[Incoming]) -> list[int]:
        """Of the payloads that are on the device, together; 0 for the others."""
        beside = [frame.payload for frame in frames if isinstance(frame, DeviceFrame)]
        if not beside:
            return [0] * len(frames)
        if any(len(payload) % 4 for payload in beside):
            raise BatonError(Cause.FRAME_CORRUPT, "a payload that is no whole number of words")
        assert self._memory.device is not None, "who has no device asks for no such frames"
        digests = iter(self._memory.device.digests(beside))
        return [next(digests) if isinstance(frame, DeviceFrame) else 0 for frame in frames]

    def _import(self, reader: FrameReader, frames: Sequence[Incoming]) -> None:
        """On the transfer thread. What frames before a bad one brought is in the blocks too."""
        try:
            self._apply_all(reader, frames)
        finally:
            self._memory.settle()

    def _apply(self, frame: Frame) -> None:
        """Nothing is written before everything about the frame is known to be right."""
        if frame.kind is FrameKind.END:
            self._check_end(frame)
            assert isinstance(frame.payload, memoryview), "only data is beside its header"
            self.end_payload = bytes(frame.payload)
            return
        self._check_data(frame)
        self._memory.unpack(self._block_ids, frame.range, frame.payload)
        for layer in range(frame.range.layer_start, frame.range.layer_stop):
            self._next_token[layer] = frame.range.token_stop

    def _check_data(self, frame: Frame) -> None:
        got, where = frame.range, self._where
        is_next = (
            where.layer_start <= got.layer_start < got.layer_stop <= where.layer_stop
            and got.token_stop <= where.token_stop
            and (got.head_start, got.head_stop) == (where.head_start, where.head_stop)
            and all(
                self._next_token[layer] == got.token_start
                for layer in range(got.layer_start, got.layer_stop)
            )
        )
        if not is_next:
            raise BatonError(Cause.FRAME_ORDER, f"{got} is not what comes next of {where}")
        if len(frame.payload) != self._memory.num_bytes(got):
            raise BatonError(Cause.FRAME_CORRUPT, f"{len(frame.payload)} bytes for {got}")

    def _check_end(self, frame: Frame) -> None:
        if frame.range != self._where:
            raise BatonError(Cause.FRAME_ORDER, f"the end of {frame.range}, not of {self._where}")
        if self.valid_tokens < self._where.token_stop:
            raise BatonError(Cause.FRAME_ORDER, f"the end came after {self.valid_tokens} tokens")

    def patience_s(self) -> float | None:
        """See `FrameSink.patience_s`: finite while KV that was ready at opening is missing."""
        ready = self._num_ready_tokens
        if self.valid_tokens >= ready:
            return None
        missing = replace(self._where, token_start=self.valid_tokens, token_stop=ready)
        elapsed_s = self._clock() - self._started_s
        rate = max(self._rate_bytes_s, self.num_bytes / elapsed_s if elapsed_s > 0 else 0.0)
        return _MIN_PATIENCE_S + _PATIENCE_FACTOR * self._memory.num_bytes(missing) / rate
