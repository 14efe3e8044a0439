"""Finds workers and mirrors what they hold, from Redis; never on the path of a request.

Membership is polled once a second; a worker that vanished from Redis is only *reported*: whoever
owns its session decides (a live session outlives a flushed Redis). Locality streams are followed
with one blocking read; a hole in a stream's sequence numbers makes us take the worker's own
inventory, for which the other streams do not wait.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from baton.errors import BatonError
from baton.locality import (
    PrefixIndex,
    Signer,
    decode_events,
    read_registrations,
    stream_key,
)
from baton.redis_client import FAILURES, connect, reason_of, time_limit
from baton.types import BlockHash, WorkerInfo

log = logging.getLogger(__name__)

POLL_S = 1.0
READ_BLOCK_MS = 1000  # less than a call may take
Inventory = Callable[[WorkerInfo], Awaitable[tuple[int, list[BlockHash]]]]


class Discovery:
    """Keeps `members` and `index` as new as Redis allows.

    on_join: a new worker, or a new incarnation of a known one. on_leave: no longer registered.
    inventory: asks a worker for (seq, hashes); raises BatonError when it cannot be reached.
    """

    def __init__(
        self,
        redis_url: str,
        cluster: str,
        tokens: Sequence[str],
        index: PrefixIndex,
        *,
        on_join: Callable[[WorkerInfo], None],
        on_leave: Callable[[WorkerInfo], None],
        inventory: Inventory,
    ) -> None:
        self.members: dict[str, WorkerInfo] = {}
        self.reachable: bool | None = None  # None: not asked yet
        self._index = index
        self._cluster = cluster
        self._signer = Signer(tokens)
        self._redis = connect(redis_url)
        self._reader = connect(redis_url)
        self._on_join = on_join
        self._on_leave = on_leave
        self._inventory = inventory
        self._seqs: dict[str, int] = {}  # stream key → last applied; absent = needs a snapshot
        self._snapshots: dict[str, asyncio.Task[None]] = {}  # stream key → one under way
        self._refused: set[str] = set()

    async def run(self) -> None:
        """Until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._poll_loop())
                group.create_task(self._follow_loop(group))
        finally:
            await self._redis.aclose()
            await self._reader.aclose()

    async def _poll_loop(self) -> None:
        while True:
            try:
                self._update(await self._read_members())
                self._note_redis(None)
            except FAILURES as error:
                self._note_redis(error)
            await asyncio.sleep(POLL_S)

    def _note_redis(self, error: BaseException | None) -> None:
        before, self.reachable = self.reachable, error is None
        if before is self.reachable:
            return
        if error is None:
            log.info("redis is reachable")
        else:
            text = "redis cannot be used: %s; serving goes on with known workers"
            log.warning(text, reason_of(error))

    async def _read_members(self) -> dict[str, WorkerInfo]:
        found, refused = await read_registrations(self._redis, self._signer, self._cluster)
        for key, error in refused.items():
            if key not in self._refused:
                log.warning("registration %s refused: %s", key, error)
                self._refused.add(key)
        return found

    def _update(self, found: dict[str, WorkerInfo]) -> None:
        for worker_id, info in found.items():
            known = self.members.get(worker_id)
            if known is None or known.incarnation != info.incarnation:
                self._forget(known)
                self.members[worker_id] = info
                self._on_join(info)
        for worker_id in self.members.keys() - found.keys():
            info = self.members.pop(worker_id)
            self._forget(info)
            self._on_leave(info)

    def _forget(self, info: WorkerInfo | None) -> None:
        if info is not None:
            self._index.drop(info.worker_id)
            self._seqs.pop(stream_key(self._cluster, info), None)

    async def _follow_loop(self, group: asyncio.TaskGroup) -> None:
        while True:
            streams = {stream_key(self._cluster, info): info for info in self.members.values()}
            for key, info in streams.items():
                if key not in self._seqs and key not in self._snapshots:
                    self._snapshots[key] = group.create_task(self._take_snapshot(key, info))
            ids: dict[Any, Any] = {
                key: f"{self._seqs[key]}-0" for key in streams if key in self._seqs
            }
            if not ids:
                await self._first_snapshot()
                continue
            try:
                async with time_limit():
                    answer: Any = await self._reader.xread(ids, count=256, block=READ_BLOCK_MS)
            except FAILURES:
                await asyncio.sleep(POLL_S)
                continue
            for raw_key, entries in answer or ():
                key = raw_key.decode()
                if key in streams:
                    self._apply(key, streams[key], entries)

    async def _first_snapshot(self) -> None:
        """Until there may be a stream to follow."""
        if self._snapshots:
            tasks = self._snapshots.values()
            await asyncio.wait(tasks, timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED)
        else:
            await asyncio.sleep(POLL_S)

    async def _take_snapshot(self, key: str, info: WorkerInfo) -> None:
        try:
            seq, hashes = await self._inventory(info)
            current = self.members.get(info.worker_id)
            if current is not None and current.incarnation == info.incarnation:
                self._index.replace(info.worker_id, hashes)
                self._seqs[key] = seq
        except BatonError as error:
            log.info("no inventory from %s yet: %s", info.worker_id, error.message)
            await asyncio.sleep(POLL_S)
        finally:
            del self._snapshots[key]

    def _apply(
        self, key: str, info: WorkerInfo, entries: list[tuple[bytes, dict[bytes, bytes]]]
    ) -> None:
        current = self.members.get(info.worker_id)
        if current is None or current.incarnation != info.incarnation:
            return
        for entry_id, fields in entries:
            seq = int(entry_id.split(b"-")[0])
            if key not in self._seqs or seq != self._seqs[key] + 1:
                self._seqs.pop(key, None)
                return
            data = fields.get(b"data", b"")
            mac = fields.get(b"mac", b"").decode("ascii", "replace")
            try:
                if not self._signer.verify(f"{key}:{seq}", data, mac):
                    raise ValueError("signature does not match")
                events = decode_events(data)
            except ValueError as error:
                log.warning("locality of %s refused: %s", info.worker_id, error)
                self._seqs.pop(key, None)
                return
            for event in events:
                self._index.apply(info.worker_id, event)
            self._seqs[key] = seq
