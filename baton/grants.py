"""Grants: the right to fetch one prefix by its hashes, signed by a gateway.

A ticket is of the worker that holds the KV and only that worker can check it; a grant is of the
gateway, which knows who asks, and any worker of the cluster can check it. It names one source
process, one consumer process, one tenant and the chain's last hash, which stands for every token
before it: for anybody else, anything else or anywhere else it is worth nothing.

Clocks are never compared. A grant has a duration, and its source counts from when it first saw it,
so that a copy is of use to the same consumer, at the same source, for that long.

Keys: HKDF-SHA-256 of each cluster secret (without one: of nothing, so that grants are checked all
the same), salt "baton-grant-1", info = the cluster's name. key_id = first 4 bytes of SHA-256(key),
little-endian; of two secrets the first signs, each verifies.

Signed bytes (test vector: docs/kv-wire.md): "baton-grant-1", then every field but `mac` in the
order of `Grant`; integers as u64le, byte strings with their length as u32le.
"""

import hashlib
import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

from baton.errors import BatonError, Cause
from baton.types import HASH_TOKENS, BlockHash

_DOMAIN = b"baton-grant-1"
MAX_REMEMBERED = 1 << 16  # grants that a source knows again; beyond, it forgets the oldest
MAX_CHAIN = 1 << 16  # hashes: a million tokens


@dataclass(frozen=True, slots=True)
class Grant:
    """See the module docstring. Made by `GrantKeys.sign`."""

    nonce: bytes  # 16 random bytes
    source_incarnation: bytes  # 16 bytes
    consumer_incarnation: bytes  # 16 bytes
    fingerprint: bytes  # 32 bytes
    salt_digest: bytes  # SHA-256 of the tenant salt
    last_hash: BlockHash
    num_tokens: int  # of the chain; a multiple of HASH_TOKENS
    duration_ms: int
    key_id: int = 0
    mac: bytes = b""


@dataclass(frozen=True, slots=True)
class HashChain:
    """What a consumer asks for by hash: the hashes of a prefix from the root on, one per
    HASH_TOKENS, and the right to it."""

    hashes: tuple[BlockHash, ...]
    grant: Grant
    consumer_incarnation: bytes  # the consumer's claim, compared with the grant


def grant_bytes(grant: Grant) -> bytes:
    """What the signature covers; injective."""
    blobs = (
        grant.nonce,
        grant.source_incarnation,
        grant.consumer_incarnation,
        grant.fingerprint,
        grant.salt_digest,
        grant.last_hash,
    )
    numbers = (grant.num_tokens, grant.duration_ms, grant.key_id)
    fields = [struct.pack("<I", len(blob)) + blob for blob in blobs]
    return b"".join((_DOMAIN, *fields, struct.pack("<3Q", *numbers)))


def derive_key(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """32 bytes: the first block of HKDF-SHA-256 (RFC 5869)."""
    extracted = hmac.digest(salt, secret, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")


class GrantKeys:
    """The keys of one cluster, the same in each of its processes."""

    def __init__(self, cluster: str, secrets: Sequence[str]) -> None:
        """
        Args:
            secrets: the cluster token; two while it is being changed, none on loopback.
        """
        keys = [
            derive_key(secret.encode(), _DOMAIN, cluster.encode()) for secret in secrets or ("",)
        ]
        self._keys = {_key_id(key): key for key in keys}
        self._newest = _key_id(keys[0])

    def sign(self, grant: Grant) -> Grant:
        """The same grant with `key_id` and `mac` filled in."""
        unsigned = replace(grant, key_id=self._newest, mac=b"")
        return replace(unsigned, mac=self._mac(unsigned))

    def verify(self, grant: Grant) -> None:
        """
        Raises:
            BatonError: TICKET_FORGED.
        """
        known = grant.key_id in self._keys
        if not known or not hmac.compare_digest(self._mac(grant), grant.mac):
            raise BatonError(Cause.TICKET_FORGED, "the grant's signature is not of this cluster")

    def _mac(self, grant: Grant) -> bytes:
        return hmac.digest(self._keys[grant.key_id], grant_bytes(grant), "sha256")


def _key_id(key: bytes) -> int:
    return int.from_bytes(hashlib.sha256(key).digest()[:4], "little")


class GrantBook:
    """Which grants a source has seen, and when for the first time."""

    def __init__(self, keys: GrantKeys) -> None:
        self._keys = keys
        self._first_seen_ms: dict[bytes, int] = {}  # by mac, oldest first

    def admit(self, grant: Grant, incarnation: bytes, now_ms: int) -> None:
        """
        Args:
            incarnation: of this process; a grant for an earlier one names KV that is gone.

        Raises:
            BatonError: LEASE_UNKNOWN (an earlier incarnation), TICKET_FORGED, TICKET_EXPIRED.
        """
        if grant.source_incarnation != incarnation:
            raise BatonError(Cause.LEASE_UNKNOWN, "the grant is for another process")
        self._keys.verify(grant)
        first_ms = self._first_seen_ms.setdefault(grant.mac, now_ms)
        if now_ms - first_ms >= grant.duration_ms:
            raise BatonError(Cause.TICKET_EXPIRED, "the grant has expired")
        if len(self._first_seen_ms) > MAX_REMEMBERED:
            del self._first_seen_ms[next(iter(self._first_seen_ms))]


def check_chain(chain: HashChain, fingerprint: bytes, salt_digest: bytes) -> None:
    """Are the chain and what the consumer claims what the grant is for? (Its signature and time
    are the book's matter.)

    Args:
        fingerprint: of the source's model.
        salt_digest: as the consumer claims.

    Raises:
        BatonError: MODEL_MISMATCH, TENANT_MISMATCH, TOKENS_MISMATCH, TICKET_FORGED (it is another
            consumer's).
    """
    grant = chain.grant
    if grant.fingerprint != fingerprint:
        raise BatonError(Cause.MODEL_MISMATCH, "model fingerprints differ")
    if grant.salt_digest != salt_digest:
        raise BatonError(Cause.TENANT_MISMATCH, "the grant is another tenant's")
    if chain.consumer_incarnation != grant.consumer_incarnation:
        raise BatonError(Cause.TICKET_FORGED, "the grant is another worker's")
    is_whole = len(chain.hashes) * HASH_TOKENS == grant.num_tokens > 0
    if not is_whole or chain.hashes[-1] != grant.last_hash:
        raise BatonError(Cause.TOKENS_MISMATCH, "the grant is for another prefix")
