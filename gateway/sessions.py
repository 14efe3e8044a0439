"""One `Worker.Session` stream per worker: kept open, watched, and never read slowly.

A session is up between its Hello and its loss. What arrives is handed to the listener at once,
which only puts it into buffers; what is sent waits in a bounded queue. Heartbeats go both ways; a
peer that is silent for too long, or takes nothing for too long, is lost. After a loss the session
connects again, with back-off, until it is closed.
"""

import asyncio
import logging
import random
import time
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import grpc

from baton.errors import BatonError, Cause
from baton.messages import Failed, GatewayMessage, Heartbeat, Hello, StepBatch
from baton.rpc import ClusterToken, connect, to_baton_error
from baton.session_wire import open_session
from baton.types import PROTOCOL_MAJOR, BlockHash, WorkerInfo, WorkerSnapshot
from baton.v1 import kv_pb2, kv_pb2_grpc
from baton.v1.worker_pb2 import GatewayMessage as GatewayPb
from baton.wire import gateway_message_to_pb, worker_message_from_pb

log = logging.getLogger(__name__)

SessionCall: TypeAlias = "grpc.aio.StreamStreamCall[Any, Any]"

_HASH_BYTES = 32
_MAX_INVENTORY = 1 << 22  # hashes


@dataclass(frozen=True, slots=True)
class SessionConfig:
    heartbeat_s: float = 0.5
    silence_s: float = 2.5  # without a message from the worker: lost
    max_outgoing: int = 4096  # messages; a worker that takes none for so long is lost
    min_backoff_s: float = 0.1
    max_backoff_s: float = 2.0


class SessionListener(Protocol):
    """Told in order: up, any number of batches, lost; and again."""

    def session_up(self, info: WorkerInfo) -> None: ...

    def session_batch(self, worker_id: str, batch: StepBatch) -> None: ...

    def session_lost(self, worker_id: str, reason: str) -> None: ...


class WorkerSession:
    """`info` is what discovery said; Hello brings the worker's own word."""

    def __init__(
        self,
        info: WorkerInfo,
        token: ClusterToken,
        listener: SessionListener,
        config: SessionConfig,
    ) -> None:
        self.info = info
        self.is_up = False
        self._token = token
        self._listener = listener
        self._config = config
        self._outgoing: asyncio.Queue[GatewayMessage] = asyncio.Queue(config.max_outgoing)
        self._dropped: asyncio.Future[str] | None = None
        self._last_heard_s = 0.0
        self._snapshot = _unknown_load(info)
        self._task = asyncio.create_task(self._run(), name=f"session {info.worker_id}")

    def send(self, message: GatewayMessage) -> None:
        """Never waits. Without a session the message is void: the worker will know no such leg."""
        if not self.is_up:
            return
        try:
            self._outgoing.put_nowait(message)
        except asyncio.QueueFull:
            self.drop("it does not take its messages")

    def drop(self, reason: str) -> None:
        """End the present stream; everything of this gateway there is aborted by that."""
        if self._dropped is not None and not self._dropped.done():
            self._dropped.set_result(reason)

    async def close(self) -> None:
        """For good. The loss is told if it was up."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        backoff_s = self._config.min_backoff_s
        while True:
            was_up, reason = await self._serve()
            if was_up:
                log.warning("session with %s lost: %s", self.info.worker_id, reason)
                backoff_s = self._config.min_backoff_s
            else:
                log.debug("no session with %s: %s", self.info.worker_id, reason)
            await asyncio.sleep(backoff_s * random.uniform(0.75, 1.25))
            backoff_s = min(2 * backoff_s, self._config.max_backoff_s)

    async def _serve(self) -> tuple[bool, str]:
        """One stream, from connecting to its end: (was it up, why did it end)."""
        connection = connect(self.info.address, self._token)
        call: SessionCall = open_session(connection)
        self._dropped = asyncio.get_running_loop().create_future()
        self._outgoing = asyncio.Queue(self._config.max_outgoing)
        tasks = [
            asyncio.create_task(self._read(call)),
            asyncio.create_task(self._write(call)),
            asyncio.create_task(self._beat()),
            asyncio.create_task(self._watch()),
        ]
        reason = "closed"
        try:
            done, _ = await asyncio.wait(
                [*tasks, self._dropped], return_when=asyncio.FIRST_COMPLETED
            )
            reason = self._why(next(iter(done)))
        finally:
            was_up, self.is_up = self.is_up, False
            for task in tasks:
                task.cancel()
            if was_up:
                self._listener.session_lost(self.info.worker_id, reason)
            call.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await connection.close()
        return was_up, reason

    def _why(self, ended: asyncio.Future[str]) -> str:
        """Why a stream ended. A defect of ours ends it too, but not what connects again."""
        error = ended.exception()
        if error is None:
            return ended.result()
        log.error("the session with %s is broken", self.info.worker_id, exc_info=error)
        return f"{type(error).__name__} in its handling"

    async def _read(self, call: SessionCall) -> str:
        try:
            async for raw in call:
                self._last_heard_s = time.monotonic()
                self._take(worker_message_from_pb(raw))
        except grpc.aio.AioRpcError as error:
            return to_baton_error(error).message
        except BatonError as error:
            return f"it sent what no correct worker sends: {error.message}"
        return "it ended the session"

    def _take(self, message: Hello | StepBatch) -> None:
        if isinstance(message, StepBatch):
            if not self.is_up:
                raise BatonError(Cause.PROTOCOL, "a batch before Hello")
            self._snapshot = message.snapshot
            self._listener.session_batch(self.info.worker_id, message)
            return
        info = message.info
        if self.is_up or info.worker_id != self.info.worker_id:
            raise BatonError(Cause.PROTOCOL, f"Hello from {info.worker_id!r}")
        if info.protocol[0] != PROTOCOL_MAJOR:
            raise BatonError(Cause.UNSUPPORTED, f"protocol {info.protocol[0]}.{info.protocol[1]}")
        self.info = info
        self._snapshot = _unknown_load(info)
        self.is_up = True
        self._listener.session_up(info)

    async def _write(self, call: SessionCall) -> str:
        try:
            while True:
                encoded = self._encoded(await self._outgoing.get())
                if encoded is not None:
                    await call.write(encoded)
        except grpc.aio.AioRpcError as error:
            return to_baton_error(error).message
        except asyncio.InvalidStateError:
            return "the stream is closed"

    def _encoded(self, message: GatewayMessage) -> GatewayPb | None:
        """None: it has no form on the wire. A defect, but of one request, which is told so."""
        try:
            return gateway_message_to_pb(message)
        except (TypeError, ValueError):
            if isinstance(message, Heartbeat):
                raise
            log.exception("a message for %s cannot be sent", self.info.worker_id)
        failed = Failed(message.leg, Cause.INTERNAL, "the message cannot be sent")
        batch = StepBatch((failed,), self._snapshot)
        self._listener.session_batch(self.info.worker_id, batch)
        return None

    async def _beat(self) -> str:
        seq = 0
        while True:
            await asyncio.sleep(self._config.heartbeat_s)
            seq += 1
            self.send(Heartbeat(seq))

    async def _watch(self) -> str:
        """Silence, counted in looks at the clock, so that a pause of this process (a stopped
        container, a slept laptop) does not look like the death of everybody else."""
        look_s = self._config.heartbeat_s / 2
        heard_s, silence_s = self._last_heard_s, 0.0
        while silence_s < self._config.silence_s:
            before_s = time.monotonic()
            await asyncio.sleep(look_s)
            if self._last_heard_s != heard_s:
                heard_s, silence_s = self._last_heard_s, 0.0
            else:
                silence_s += min(time.monotonic() - before_s, 2 * look_s)
        return f"silent for {silence_s:.1f} s"


def _unknown_load(info: WorkerInfo) -> WorkerSnapshot:
    """Until it says how it is."""
    return WorkerSnapshot(info.role, free_blocks=0, total_blocks=info.num_blocks)


async def fetch_inventory(info: WorkerInfo, token: ClusterToken) -> tuple[int, list[BlockHash]]:
    """Every prefix hash the worker can serve, and the locality sequence number it is as new as.

    Raises:
        BatonError: it cannot be reached, or sends what no correct worker sends.
    """
    connection = connect(info.address, token)
    hashes: list[BlockHash] = []
    seq = 0
    try:
        stub = kv_pb2_grpc.KVStub(connection.channel)  # type: ignore[no-untyped-call]
        call = stub.Inventory(kv_pb2.InventoryRequest(), metadata=connection.metadata, timeout=10.0)
        async for reply in call:
            seq = reply.seq
            hashes.extend(BlockHash(value) for value in reply.hashes)
            is_sound = all(len(value) == _HASH_BYTES for value in reply.hashes)
            if not is_sound or len(hashes) > _MAX_INVENTORY:
                raise BatonError(Cause.PROTOCOL, "malformed inventory")
    except grpc.aio.AioRpcError as error:
        raise to_baton_error(error) from None
    finally:
        await connection.close()
    return seq, hashes
