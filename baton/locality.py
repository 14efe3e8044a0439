"""Who is in the fleet and which prefixes they hold: what goes through Redis, and its in-memory
mirror.

Redis carries membership and hints; the worker is the truth. Nothing waits for Redis on the path of
a request, and everything here survives Redis being slow, flushed or gone.

    baton:1:{cluster}:w:{worker}                  JSON + MAC, TTL 10 s, written every 3 s
    baton:1:{cluster}:l:{worker}:{incarnation}    stream; entry id = "{seq}-0", one entry per batch

Because the entry id is the publisher's own sequence number, a reader that last saw `seq` asks for
what follows, and any hole (lost write, trimmed or flushed stream) shows as a jump: it then takes a
snapshot from the worker itself (`KV.Inventory`).
"""

import asyncio
import hashlib
import hmac
import json
import logging
import struct
from collections.abc import Iterable, Sequence
from typing import cast

from google.protobuf import json_format
from redis.asyncio import Redis
from redis.exceptions import RedisError

from baton import wire_workers
from baton.errors import BatonError
from baton.messages import BlocksRemoved, BlocksStored, LocalityEvent
from baton.types import HASH_TOKENS, BlockHash, WorkerInfo
from baton.v1 import common_pb2

log = logging.getLogger(__name__)

SCHEMA = 1
TTL_S = 10
BEAT_S = 3.0
FLUSH_S = 0.1
MAX_STREAM_BATCHES = 4096
MAX_BATCH_HASHES = 1 << 16
_HASH_BYTES = 32
_OP = struct.Struct("<BI")  # 1 = stored, 2 = removed; number of hashes


def connect(url: str) -> Redis:
    """A client whose calls give up after two seconds, so that a stalled Redis stalls nobody."""
    client: Redis = Redis.from_url(url, socket_timeout=2.0, socket_connect_timeout=2.0)
    return client


class Signer:
    """MACs of registry entries. The first token signs, any may verify (two are valid while
    rotating).
    """

    def __init__(self, tokens: Sequence[str]) -> None:
        self._keys = [hashlib.sha256(b"baton-registry-1" + t.encode()).digest() for t in tokens]
        self._keys = self._keys or [hashlib.sha256(b"baton-registry-1").digest()]

    def sign(self, key_name: str, payload: bytes) -> str:
        return self._mac(self._keys[0], key_name, payload)

    def verify(self, key_name: str, payload: bytes, mac: str) -> bool:
        macs = [self._mac(key, key_name, payload) for key in self._keys]
        return any(hmac.compare_digest(mac.encode(), own.encode()) for own in macs)

    @staticmethod
    def _mac(key: bytes, key_name: str, payload: bytes) -> str:
        # The key name is covered, so that an entry cannot be copied to another worker's place.
        return hmac.new(key, key_name.encode() + b"\0" + payload, "sha256").hexdigest()


def worker_key(cluster: str, worker_id: str) -> str:
    return f"baton:{SCHEMA}:{cluster}:w:{worker_id}"


def stream_key(cluster: str, info: WorkerInfo) -> str:
    return f"baton:{SCHEMA}:{cluster}:l:{info.worker_id}:{info.incarnation.hex()}"


def encode_registration(signer: Signer, cluster: str, info: WorkerInfo) -> str:
    body = json_format.MessageToJson(wire_workers.worker_info_to_pb(info), indent=None)
    mac = signer.sign(worker_key(cluster, info.worker_id), body.encode())
    return json.dumps({"schema": SCHEMA, "info": body, "mac": mac})


def decode_registration(signer: Signer, key: str, value: bytes) -> WorkerInfo:
    """Raises ValueError when the entry is forged, foreign or malformed."""
    entry = json.loads(value)
    if not isinstance(entry, dict) or entry.get("schema") != SCHEMA:
        raise ValueError("unknown schema")
    body = str(entry.get("info", ""))
    if not signer.verify(key, body.encode(), str(entry.get("mac", ""))):
        raise ValueError("signature does not match")
    try:
        message = json_format.Parse(body, common_pb2.WorkerInfo(), ignore_unknown_fields=True)
        info = wire_workers.worker_info_from_pb(message)
    except (BatonError, json_format.ParseError) as error:
        raise ValueError(str(error)) from None
    if not key.endswith(f":w:{info.worker_id}"):
        raise ValueError("entry is under another worker's key")
    return info


async def read_registrations(
    redis: Redis, signer: Signer, cluster: str
) -> tuple[dict[str, WorkerInfo], dict[str, ValueError]]:
    """(workers by id, entries that are not to be believed by key).

    Raises:
        RedisError, OSError, TimeoutError: Redis is not there.
    """
    pattern = worker_key(cluster, "*")
    keys = [key.decode() async for key in redis.scan_iter(match=pattern, count=1000)]
    values = cast("list[bytes | None]", await redis.mget(keys) if keys else [])
    found: dict[str, WorkerInfo] = {}
    refused: dict[str, ValueError] = {}
    for key, value in zip(keys, values, strict=True):
        if value is None:
            continue
        try:
            info = decode_registration(signer, key, value)
        except ValueError as error:
            refused[key] = error
        else:
            found[info.worker_id] = info
    return found, refused


def encode_events(events: Iterable[LocalityEvent]) -> bytes:
    return b"".join(
        _OP.pack(1 if isinstance(event, BlocksStored) else 2, len(event.hashes))
        + b"".join(event.hashes)
        for event in events
    )


def decode_events(data: bytes) -> list[LocalityEvent]:
    """Raises ValueError on anything `encode_events` does not write."""
    events: list[LocalityEvent] = []
    offset = 0
    while offset < len(data):
        if len(data) - offset < _OP.size:
            raise ValueError("truncated operation")
        op, count = _OP.unpack_from(data, offset)
        offset += _OP.size
        end = offset + count * _HASH_BYTES
        if op not in (1, 2) or count > MAX_BATCH_HASHES or end > len(data):
            raise ValueError("bad operation")
        hashes = tuple(
            BlockHash(data[i : i + _HASH_BYTES]) for i in range(offset, end, _HASH_BYTES)
        )
        events.append(BlocksStored(hashes) if op == 1 else BlocksRemoved(hashes))
        offset = end
    return events


class PrefixIndex:
    """Which worker holds which prefix, as far as is known here. Workers are the truth."""

    def __init__(self) -> None:
        self._holders: dict[BlockHash, set[str]] = {}
        self._hashes: dict[str, set[BlockHash]] = {}

    def apply(self, worker_id: str, event: LocalityEvent) -> None:
        held = self._hashes.setdefault(worker_id, set())
        for block_hash in event.hashes:
            if isinstance(event, BlocksStored):
                held.add(block_hash)
                self._holders.setdefault(block_hash, set()).add(worker_id)
            elif block_hash in held:
                held.discard(block_hash)
                self._forget(block_hash, worker_id)

    def replace(self, worker_id: str, hashes: Iterable[BlockHash]) -> None:
        """Forget what was known of this worker and take a snapshot instead."""
        self.drop(worker_id)
        self.apply(worker_id, BlocksStored(tuple(hashes)))

    def drop(self, worker_id: str) -> None:
        for block_hash in self._hashes.pop(worker_id, ()):
            self._forget(block_hash, worker_id)

    def longest_prefix(self, hashes: Iterable[BlockHash]) -> dict[str, int]:
        """worker_id → tokens of the longest prefix it holds; who holds nothing is absent. Asks for
        no more of `hashes` than that takes."""
        found: dict[str, int] = {}
        candidates: set[str] | None = None
        for i, block_hash in enumerate(hashes):
            holders = self._holders.get(block_hash)
            if not holders:
                break
            candidates = set(holders) if candidates is None else candidates & holders
            if not candidates:
                break
            for worker_id in candidates:
                found[worker_id] = (i + 1) * HASH_TOKENS
        return found

    def num_hashes(self, worker_id: str) -> int:
        return len(self._hashes.get(worker_id, ()))

    def _forget(self, block_hash: BlockHash, worker_id: str) -> None:
        holders = self._holders.get(block_hash)
        if holders is not None:
            holders.discard(worker_id)
            if not holders:
                del self._holders[block_hash]


class WorkerRegistration:
    """Worker side: keeps the registration alive and publishes locality, at most ten batches a
    second.

    Owns the worker's view of what it holds, which is also what `KV.Inventory` answers. All methods
    run on one event loop; `run` ends when cancelled and then removes the registration.
    """

    def __init__(self, redis: Redis, cluster: str, tokens: Sequence[str], info: WorkerInfo) -> None:
        self._redis = redis
        self._signer = Signer(tokens)
        self._key = worker_key(cluster, info.worker_id)
        self._stream = stream_key(cluster, info)
        self._value = encode_registration(self._signer, cluster, info)
        self._held: set[BlockHash] = set()
        self._pending: list[LocalityEvent] = []
        self._wake = asyncio.Event()
        self._seq = 0
        self._reachable = True

    def publish(self, stored: Sequence[BlockHash], removed: Sequence[BlockHash]) -> None:
        """Hashes that became reusable, then hashes that were evicted, in one step."""
        self._held.update(stored)
        self._held.difference_update(removed)
        self._pending += [BlocksStored(tuple(stored))] if stored else []
        self._pending += [BlocksRemoved(tuple(removed))] if removed else []
        if self._pending:
            self._wake.set()

    def inventory(self) -> tuple[int, list[BlockHash]]:
        """(sequence number, all hashes); later batches apply on top, in order, harmlessly twice."""
        return self._seq, list(self._held)

    async def run(self) -> None:
        try:
            await asyncio.gather(self._beat_loop(), self._flush_loop())
        finally:
            await self._attempt(self._redis.delete(self._key, self._stream))

    async def _beat_loop(self) -> None:
        while True:
            ok = await self._attempt(self._redis.set(self._key, self._value, ex=TTL_S))
            if ok != self._reachable:
                log.warning("redis is %s", "back" if ok else "unreachable; serving goes on")
                self._reachable = ok
            await self._attempt(self._redis.expire(self._stream, 10 * TTL_S))
            await asyncio.sleep(BEAT_S)

    async def _flush_loop(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            events, self._pending = self._pending, []
            self._seq += 1
            data = encode_events(events)
            # A lost batch needs no retry: the jump in sequence numbers makes readers take a
            # snapshot.
            await self._attempt(
                self._redis.xadd(
                    self._stream,
                    {"data": data, "mac": self._signer.sign(f"{self._stream}:{self._seq}", data)},
                    id=f"{self._seq}-0",
                    maxlen=MAX_STREAM_BATCHES,
                    approximate=True,
                )
            )
            await asyncio.sleep(FLUSH_S)

    @staticmethod
    async def _attempt(call: object) -> bool:
        try:
            await call  # type: ignore[misc]  # redis-py types its asyncio calls as maybe-awaitable
        except (RedisError, OSError, TimeoutError):
            return False
        return True
