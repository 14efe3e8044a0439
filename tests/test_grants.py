"""Grants: what is signed holds, and nothing else does."""

from dataclasses import fields, replace

import pytest

from baton.errors import BatonError, Cause
from baton.grants import (
    MAX_REMEMBERED,
    Grant,
    GrantBook,
    GrantKeys,
    HashChain,
    check_chain,
    derive_key,
)
from baton.types import BlockHash

SOURCE, CONSUMER = b"s" * 16, b"c" * 16
HASHES = (BlockHash(b"1" * 32), BlockHash(b"2" * 32))
GRANT = Grant(
    nonce=bytes(16),
    source_incarnation=SOURCE,
    consumer_incarnation=CONSUMER,
    fingerprint=b"f" * 32,
    salt_digest=b"d" * 32,
    last_hash=HASHES[-1],
    num_tokens=32,
    duration_ms=1_000,
)
KEYS = GrantKeys("c1", ("secret",))
CHANGES = {
    int: 7,
    "nonce": b"x" * 16,
    "consumer_incarnation": b"x" * 16,
    "fingerprint": b"x" * 32,
    "salt_digest": b"x" * 32,
    "last_hash": b"x" * 32,
    "mac": b"x" * 32,
}


def cause_of(call: object, *args: object) -> Cause:
    with pytest.raises(BatonError) as caught:
        call(*args)  # type: ignore[operator]
    return caught.value.cause


def test_a_key_is_hkdf() -> None:
    """RFC 5869, test case 1: the first 32 bytes."""
    okm = derive_key(
        bytes([0x0B] * 22), bytes.fromhex("000102030405060708090a0b0c"), bytes(range(0xF0, 0xFA))
    )
    assert okm.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"


@pytest.mark.parametrize("field", [f.name for f in fields(Grant) if f.name != "source_incarnation"])
def test_every_field_is_signed(field: str) -> None:
    signed = KEYS.sign(GRANT)
    KEYS.verify(signed)
    changed = replace(signed, **{field: CHANGES.get(field, CHANGES[int])})
    assert cause_of(KEYS.verify, changed) is Cause.TICKET_FORGED


@pytest.mark.parametrize(
    ("cluster", "secrets", "is_ours"),
    [
        ("c1", ("secret",), True),
        ("c1", ("new", "secret"), True),  # while it is being changed
        ("c1", ("secret", "new"), True),
        ("c1", ("new",), False),
        ("c1", (), False),
        ("c2", ("secret",), False),
    ],
)
def test_whose_key_it_is(cluster: str, secrets: tuple[str, ...], is_ours: bool) -> None:
    others = GrantKeys(cluster, secrets)
    if is_ours:
        others.verify(KEYS.sign(GRANT))
    else:
        assert cause_of(others.verify, KEYS.sign(GRANT)) is Cause.TICKET_FORGED


def test_without_a_secret_clusters_are_told_apart_all_the_same() -> None:
    signed = GrantKeys("c1", ()).sign(GRANT)
    GrantKeys("c1", ()).verify(signed)
    assert cause_of(GrantKeys("c2", ()).verify, signed) is Cause.TICKET_FORGED


def test_time_runs_from_when_a_source_first_saw_it() -> None:
    book, signed = GrantBook(KEYS), KEYS.sign(GRANT)
    book.admit(signed, SOURCE, now_ms=50_000)
    book.admit(signed, SOURCE, now_ms=50_999)
    assert cause_of(book.admit, signed, SOURCE, 51_000) is Cause.TICKET_EXPIRED
    assert cause_of(book.admit, signed, SOURCE, 10**9) is Cause.TICKET_EXPIRED
    another = KEYS.sign(replace(GRANT, nonce=b"n" * 16))
    book.admit(another, SOURCE, now_ms=10**9)


def test_a_source_does_not_know_the_grants_of_its_predecessor() -> None:
    assert cause_of(GrantBook(KEYS).admit, KEYS.sign(GRANT), b"x" * 16, 0) is Cause.LEASE_UNKNOWN


def test_what_a_source_remembers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_REMEMBERED >= 1 << 16
    monkeypatch.setattr("baton.grants.MAX_REMEMBERED", 4)
    book = GrantBook(KEYS)
    for i in range(20):
        book.admit(KEYS.sign(replace(GRANT, nonce=bytes([i] * 16))), SOURCE, i)
    assert len(book._first_seen_ms) == 4


@pytest.mark.parametrize(
    ("chain", "cause"),
    [
        ({}, None),
        ({"hashes": HASHES[:1]}, Cause.TOKENS_MISMATCH),
        ({"hashes": HASHES[::-1]}, Cause.TOKENS_MISMATCH),
        ({"hashes": ()}, Cause.TOKENS_MISMATCH),
        ({"consumer_incarnation": b"x" * 16}, Cause.TICKET_FORGED),
        ({"grant": replace(GRANT, fingerprint=b"x" * 32)}, Cause.MODEL_MISMATCH),
        ({"grant": replace(GRANT, salt_digest=b"x" * 32)}, Cause.TENANT_MISMATCH),
    ],
)
def test_chains(chain: dict[str, object], cause: Cause | None) -> None:
    claimed = replace(HashChain(HASHES, GRANT, CONSUMER), **chain)  # type: ignore[arg-type]
    if cause is None:
        check_chain(claimed, b"f" * 32, b"d" * 32)
    else:
        assert cause_of(check_chain, claimed, b"f" * 32, b"d" * 32) is cause
