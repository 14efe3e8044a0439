"""Responses that can be asked for later, in Redis, with an expiry.

    baton:1:{cluster}:r:{tenant}:{id}     MAC + JSON of the response and of its conversation
    baton:1:{cluster}:r:{tenant}:{id}:e   stream of events, of a response in the background
    baton:1:{cluster}:r:{tenant}:{id}:c   somebody wants it cancelled
    baton:1:{cluster}:ri:{tenant}         sorted set: id → its expiry; the oldest is dropped first
    baton:1:{cluster}:rs:{tenant}         hash: id → bytes; "" → their sum
    baton:1:{cluster}:g:{gateway}         there while the gateway runs responses in the background

Every key has an expiry. Ids are ours and random; the tenant is a digest of the API key, so that
what one key stored does not exist for another.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_json

from baton.gateway.errors import Refusal
from baton.gateway.responses.items import Chat
from baton.locality import SCHEMA, Signer
from baton.redis_client import FAILURES, connect, time_limit

_MAC_CHARS = 64
_BLOCK_MS = 1000  # less than a call may take
_BEAT_TTL_MS = 5000
_DOWN_S = 2.0

# KEYS: index, sizes. ARGV: prefix of items, id, value, bytes, ttl in ms, most bytes, "1" if the
# item must be there already, first events or "". Gives 1 if it is stored.
_PUT = """
local index, sizes = KEYS[1], KEYS[2]
local prefix, id, value = ARGV[1], ARGV[2], ARGV[3]
local size, ttl, most = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
if ARGV[7] == '1' and redis.call('EXISTS', prefix .. id) == 0 then return 0 end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function drop(which)
  local bytes = redis.call('HGET', sizes, which)
  if bytes then
    redis.call('HDEL', sizes, which)
    redis.call('HINCRBY', sizes, '', -bytes)
  end
  redis.call('ZREM', index, which)
end
local function delete(which)
  drop(which)
  redis.call('DEL', prefix .. which, prefix .. which .. ':e', prefix .. which .. ':c')
end
for _, which in ipairs(redis.call('ZRANGEBYSCORE', index, '-inf', now, 'LIMIT', 0, 100)) do
  drop(which)
end
drop(id)
while (tonumber(redis.call('HGET', sizes, '')) or 0) + size > most do
  local oldest = redis.call('ZRANGE', index, 0, 0)[1]
  if not oldest then break end
  delete(oldest)
end
redis.call('SET', prefix .. id, value, 'PX', ttl)
if ARGV[8] ~= '' then redis.call('XADD', prefix .. id .. ':e', '*', 'e', ARGV[8]) end
redis.call('PEXPIRE', prefix .. id .. ':e', ttl)
redis.call('HSET', sizes, id, size)
redis.call('HINCRBY', sizes, '', size)
redis.call('ZADD', index, now + ttl, id)
redis.call('PEXPIRE', index, ttl)
redis.call('PEXPIRE', sizes, ttl)
return 1
"""
# KEYS: index, sizes. ARGV: prefix of items, id. Gives 1 if it was there.
_DELETE = """
local bytes = redis.call('HGET', KEYS[2], ARGV[2])
if bytes then
  redis.call('HDEL', KEYS[2], ARGV[2])
  redis.call('HINCRBY', KEYS[2], '', -bytes)
end
redis.call('ZREM', KEYS[1], ARGV[2])
local item = ARGV[1] .. ARGV[2]
redis.call('DEL', item .. ':e')
return redis.call('DEL', item)
"""


class StoreUnavailable(Refusal):
    """No store, or Redis does not answer. 503."""

    def __init__(self) -> None:
        super().__init__(
            503,
            "Responses cannot be stored or looked up now; store=false needs no store.",
            code="response_store_unavailable",
            headers={"Retry-After": "5"},
        )


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """`messages`: the conversation before the answer, without instructions. `gateway`: who runs it,
    while it is not over."""

    response: dict[str, Any]
    messages: Chat
    gateway: str

    def to_json(self) -> bytes:
        return to_json([self.response, self.messages, self.gateway])

    @classmethod
    def from_json(cls, payload: bytes) -> "StoredResponse":
        response, messages, gateway = json.loads(payload)
        return cls(response, messages, gateway)


class ResponseStore:
    """Every method raises StoreUnavailable."""

    def __init__(
        self,
        redis_url: str,
        cluster: str,
        tokens: Sequence[str],
        *,
        ttl_s: float,
        max_bytes: int,
        max_item_bytes: int,
    ) -> None:
        """`max_bytes`: of one tenant; its oldest responses make room."""
        self.max_item_bytes = min(max_item_bytes, max_bytes)
        self._redis = connect(redis_url)
        self._prefix = f"baton:{SCHEMA}:{cluster}"
        self._signer = Signer(tokens)
        self._ttl_ms = int(ttl_s * 1e3)
        self._max_bytes = max_bytes
        self._down_until_s = 0.0

    async def close(self) -> None:
        await self._redis.aclose()

    def _items(self, tenant: str) -> str:
        return f"{self._prefix}:r:{tenant}:"

    def _books(self, tenant: str) -> tuple[str, str]:
        return f"{self._prefix}:ri:{tenant}", f"{self._prefix}:rs:{tenant}"

    async def ping(self) -> None:
        await self._ask(self._redis.ping)

    async def put(
        self,
        tenant: str,
        stored: StoredResponse,
        *,
        events: Sequence[bytes] = (),
        num_event_bytes: int = 0,
        known: bool = False,
    ) -> bool:
        """
        Args:
            events: the first ones of its stream; only with these it has one.
            num_event_bytes: what the stream takes beside.
            known: only if it is there still.

        Returns:
            False: it is not there, or larger than `max_item_bytes`.
        """
        response_id = stored.response["id"]
        payload = stored.to_json()
        name = self._items(tenant) + response_id
        value = self._signer.sign(name, payload).encode() + payload
        size = len(value) + num_event_bytes
        if size > self.max_item_bytes:
            return False
        bounds = (size, self._ttl_ms, self._max_bytes)
        first = b"\n".join(events)
        arguments = (self._items(tenant), response_id, value, *bounds, int(known), first)
        return bool(await self._ask(self._redis.eval, _PUT, 2, *self._books(tenant), *arguments))

    async def get(self, tenant: str, response_id: str) -> StoredResponse | None:
        name = self._items(tenant) + response_id
        value: bytes | None = await self._ask(self._redis.get, name)
        if value is None:
            return None
        mac, payload = value[:_MAC_CHARS], value[_MAC_CHARS:]
        if not self._signer.verify(name, payload, mac.decode(errors="replace")):
            return None
        return StoredResponse.from_json(payload)

    async def delete(self, tenant: str, response_id: str) -> bool:
        arguments = (self._items(tenant), response_id)
        return bool(await self._ask(self._redis.eval, _DELETE, 2, *self._books(tenant), *arguments))

    # ── in the background ────────────────────────────────────────────────────────────────────────

    async def add_events(self, tenant: str, response_id: str, events: Sequence[bytes]) -> None:
        """JSON texts, none with a line break. Nothing, if the response is gone."""
        name = f"{self._items(tenant)}{response_id}:e"
        entry = {b"e": b"\n".join(events)}
        await self._ask(self._redis.xadd, name, entry, nomkstream=True)

    async def read_events(
        self, tenant: str, response_id: str, after: bytes
    ) -> tuple[bytes, list[bytes]]:
        """Waits up to a second for events behind `after`, b"0" at first; gives the next `after`."""
        name = f"{self._items(tenant)}{response_id}:e"
        found = await self._ask(self._redis.xread, {name: after}, count=256, block=_BLOCK_MS)
        entries = found[0][1] if found else []
        texts = [text for _, fields in entries for text in fields[b"e"].split(b"\n")]
        return (entries[-1][0] if entries else after), texts

    async def ask_to_cancel(self, tenant: str, response_id: str) -> None:
        name = f"{self._items(tenant)}{response_id}:c"
        await self._ask(self._redis.set, name, b"1", px=self._ttl_ms)

    async def beat(self, gateway: str, running: Sequence[tuple[str, str]]) -> list[str]:
        """The gateway is there; which of these (tenant, id) it shall cancel."""
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.set(f"{self._prefix}:g:{gateway}", b"1", px=_BEAT_TTL_MS)
            for tenant, response_id in running:
                pipe.exists(f"{self._items(tenant)}{response_id}:c")
            _, *flags = await self._ask(pipe.execute)
        return [response_id for (_, response_id), flag in zip(running, flags, strict=True) if flag]

    async def is_running(self, gateway: str) -> bool:
        return bool(await self._ask(self._redis.exists, f"{self._prefix}:g:{gateway}"))

    async def _ask(self, command: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """After a failure nobody waits for Redis for a while."""
        if time.monotonic() < self._down_until_s:
            raise StoreUnavailable
        try:
            async with time_limit():
                return await command(*args, **options)
        except FAILURES:
            self._down_until_s = time.monotonic() + _DOWN_S
            raise StoreUnavailable from None
