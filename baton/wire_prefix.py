"""Fetching by hash on the wire: grants, chains, where a prefix is held and how its fetch ended."""

from baton.grants import MAX_CHAIN, Grant, HashChain
from baton.messages import PrefixFetched, PrefixSource
from baton.types import BlockHash
from baton.v1 import kv_pb2, worker_pb2
from baton.wire_checks import (
    DIGEST_BYTES,
    MAX_ID_LEN,
    MAX_ITEMS,
    RANDOM_ID_BYTES,
    cause_from_pb,
    check_len,
    exactly,
    finite,
    text,
)
from baton.wire_types import stats_from_pb, stats_to_pb
from baton.wire_workers import transport_from_pb, transport_to_pb


def grant_to_pb(grant: Grant) -> kv_pb2.Grant:
    return kv_pb2.Grant(
        salt_digest=grant.salt_digest,
        fingerprint=grant.fingerprint,
        num_tokens=grant.num_tokens,
        duration_ms=grant.duration_ms,
        key_id=grant.key_id,
        mac=grant.mac,
        nonce=grant.nonce,
        last_hash=grant.last_hash,
        source_incarnation=grant.source_incarnation,
        consumer_incarnation=grant.consumer_incarnation,
    )


def grant_from_pb(message: kv_pb2.Grant) -> Grant:
    return Grant(
        nonce=exactly(message.nonce, RANDOM_ID_BYTES, "nonce"),
        source_incarnation=exactly(message.source_incarnation, RANDOM_ID_BYTES, "incarnation"),
        consumer_incarnation=exactly(message.consumer_incarnation, RANDOM_ID_BYTES, "incarnation"),
        fingerprint=exactly(message.fingerprint, DIGEST_BYTES, "fingerprint"),
        salt_digest=exactly(message.salt_digest, DIGEST_BYTES, "salt_digest"),
        last_hash=BlockHash(exactly(message.last_hash, DIGEST_BYTES, "last_hash")),
        num_tokens=message.num_tokens,
        duration_ms=message.duration_ms,
        key_id=message.key_id,
        mac=exactly(message.mac, DIGEST_BYTES, "mac"),
    )


def chain_to_pb(chain: HashChain) -> kv_pb2.HashChain:
    return kv_pb2.HashChain(hashes=chain.hashes, grant=grant_to_pb(chain.grant))


def chain_from_pb(message: kv_pb2.HashChain, consumer_incarnation: bytes) -> HashChain:
    check_len(message.hashes, MAX_CHAIN, "hashes")
    return HashChain(
        tuple(BlockHash(exactly(value, DIGEST_BYTES, "hash")) for value in message.hashes),
        grant_from_pb(message.grant),
        exactly(consumer_incarnation, RANDOM_ID_BYTES, "incarnation"),
    )


def prefix_source_to_pb(source: PrefixSource) -> worker_pb2.PrefixSource:
    return worker_pb2.PrefixSource(
        worker_id=source.worker_id,
        transports=[transport_to_pb(address) for address in source.transports],
        host_id=source.host_id,
        grant=grant_to_pb(source.grant),
        predicted_ms=source.predicted_ms,
        deadline_ms=source.deadline_ms,
    )


def prefix_source_from_pb(message: worker_pb2.PrefixSource) -> PrefixSource:
    check_len(message.transports, MAX_ITEMS, "transports")
    return PrefixSource(
        worker_id=text(message.worker_id, MAX_ID_LEN, "worker_id"),
        transports=tuple(transport_from_pb(address) for address in message.transports),
        host_id=text(message.host_id, MAX_ID_LEN, "host_id"),
        grant=grant_from_pb(message.grant),
        predicted_ms=finite(message.predicted_ms, "predicted_ms"),
        deadline_ms=message.deadline_ms,
    )


def prefix_fetched_to_pb(fetched: PrefixFetched) -> worker_pb2.PrefixFetched:
    return worker_pb2.PrefixFetched(
        num_tokens=fetched.num_tokens,
        cause=None if fetched.cause is None else int(fetched.cause),  # type: ignore[arg-type]
        stats=None if fetched.stats is None else stats_to_pb(fetched.stats),
    )


def prefix_fetched_from_pb(message: worker_pb2.PrefixFetched) -> PrefixFetched:
    return PrefixFetched(
        num_tokens=message.num_tokens,
        cause=cause_from_pb(message.cause) if message.cause else None,
        stats=stats_from_pb(message.stats) if message.HasField("stats") else None,
    )
