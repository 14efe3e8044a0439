"""Prefix hashes: the identity of a KV block is everything that led to it.

H₀ = SHA-256("baton-kv-1" ‖ fingerprint ‖ salt), Hᵢ = SHA-256(Hᵢ₋₁ ‖ ids as u32le), one per
HASH_TOKENS tokens. Test vectors: docs/kv-wire.md.
"""

import hashlib
import struct
from collections.abc import Sequence

from baton.types import HASH_TOKENS, BlockHash

_ROOT = b"baton-kv-1"
_RUN = struct.Struct(f"<{HASH_TOKENS}I")


def root_hash(fingerprint: bytes, salt: bytes) -> BlockHash:
    """H₀ of one model and one tenant. `salt` is already length-prefixed (see `join_salt`)."""
    return BlockHash(hashlib.sha256(_ROOT + fingerprint + salt).digest())


def next_hash(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """Hᵢ from Hᵢ₋₁ and the next HASH_TOKENS ids."""
    return BlockHash(hashlib.sha256(parent + _RUN.pack(*token_ids)).digest())


def extend_hashes(hashes: list[BlockHash], root: BlockHash, token_ids: Sequence[int]) -> None:
    """Append the hashes of every full run of HASH_TOKENS in `token_ids` that `hashes` lacks, in
    place."""
    parent = hashes[-1] if hashes else root
    for start in range(len(hashes) * HASH_TOKENS, len(token_ids) - HASH_TOKENS + 1, HASH_TOKENS):
        parent = next_hash(parent, token_ids[start : start + HASH_TOKENS])
        hashes.append(parent)


def prefix_hashes(root: BlockHash, token_ids: Sequence[int]) -> list[BlockHash]:
    """Hashes of all full runs of HASH_TOKENS tokens, in order."""
    hashes: list[BlockHash] = []
    extend_hashes(hashes, root, token_ids)
    return hashes


def tokens_digest(token_ids: Sequence[int]) -> bytes:
    """SHA-256 of ids as u32le: binds a ticket to one prompt."""
    return hashlib.sha256(struct.pack(f"<{len(token_ids)}I", *token_ids)).digest()


def salt_digest(salt: bytes) -> bytes:
    """SHA-256 of a request's salt: names its tenant without telling it."""
    return hashlib.sha256(salt).digest()


def join_salt(tenant: bytes, cache_salt: bytes, adapter: bytes = b"") -> bytes:
    """Tenant ‖ cache_salt ‖ adapter, each with its length as u32le: no two tuples collide."""
    parts = (tenant, cache_salt, adapter)
    return b"".join(struct.pack("<I", len(part)) + part for part in parts)
