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
from contextlib import suppress
from typing import cast

from google.protobuf import json_format
from redis.asyncio import Redis

from baton import wire_workers
from baton.errors import BatonError
from baton.messages import BlocksRemoved, BlocksStored, LocalityEvent
from baton.redis_client import FAILURES, reason_of, time_limit
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
# KEYS: registration. ARGV: value, TTL in s, "1" to take the place of another. Gives 1 if it stands.
_REGISTER = """
local found = redis.call('GET', KEYS[1])
if found and found ~= ARGV[1] and ARGV[3] == '0' then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
return 1
"""
# KEYS: registration. ARGV: value.
_UNREGISTER = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end"


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
        RedisError, OSError, TimeoutError: one of `redis_client.FAILURES`; Redis is not there.
    """
    pattern = worker_key(cluster, "*")
    async with time_limit():
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

    A worker id belongs to the process that registered it last: a predecessor that still runs, or
    comes back from a pause, neither overwrites nor removes its successor's entry.

    Owns the worker's view of what it holds, which is also what `KV.Inventory` answers. All methods
    run on one event loop; `run` ends when cancelled and then removes the registration.
    """

    def __init__(self, redis: Redis, cluster: str, tokens: Sequence[str], info: WorkerInfo) -> None:
        self._redis = redis
        self._signer = Signer(tokens)
        self._worker_id = info.worker_id
        self._key = worker_key(cluster, info.worker_id)
        self._stream = stream_key(cluster, info)
        self._value = encode_registration(self._signer, cluster, info)
        self._held: set[BlockHash] = set()
        self._pending: list[LocalityEvent] = []
        self._wake = asyncio.Event()
        self._seq = 0
        self._was_registered = False
        self._trouble: str | None = None

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
            with suppress(*FAILURES):
                await self._remove()

    async def _remove(self) -> None:
        async with time_limit(), self._redis.pipeline(transaction=False) as pipe:
            pipe.eval(_UNREGISTER, 1, self._key, self._value)
            pipe.delete(self._stream)
            await pipe.execute()

    async def _beat_loop(self) -> None:
        while True:
            trouble = await self._beat()
            if trouble != self._trouble:
                level = logging.WARNING if trouble else logging.INFO
                log.log(level, "%s", trouble or f"registered as {self._worker_id}")
                self._trouble = trouble
            await asyncio.sleep(BEAT_S)

    async def _beat(self) -> str | None:
        """Why gateways that look now do not find this worker; None if they do."""
        takes_over = int(not self._was_registered)
        try:
            async with time_limit(), self._redis.pipeline(transaction=False) as pipe:
                pipe.eval(_REGISTER, 1, self._key, self._value, TTL_S, takes_over)
                pipe.expire(self._stream, 10 * TTL_S)
                stands, _ = await pipe.execute()
        except FAILURES as error:
            return f"redis cannot be used: {reason_of(error)}; serving goes on"
        self._was_registered = True
        if stands:
            return None
        return f"another process has registered as {self._worker_id}: gateways turn to that one"

    async def _flush_loop(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            events, self._pending = self._pending, []
            self._seq += 1
            data = encode_events(events)
            mac = self._signer.sign(f"{self._stream}:{self._seq}", data)
            # A lost batch needs no retry: the jump in sequence numbers makes readers take a
            # snapshot.
            with suppress(*FAILURES):
                async with time_limit():
                    await self._redis.xadd(
                        self._stream,
                        {"data": data, "mac": mac},
                        id=f"{self._seq}-0",
                        maxlen=MAX_STREAM_BATCHES,
                        approximate=True,
                    )
            await asyncio.sleep(FLUSH_S)
