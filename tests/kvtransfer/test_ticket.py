from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import BatonError, Cause
from baton.hashing import tokens_digest
from baton.kvtransfer.base import FetchOpen
from baton.kvtransfer.ticket import (
    TicketKeyring,
    check_fetch,
    check_ticket,
    salt_digest,
    ticket_bytes,
)
from baton.types import KVGroup, KVKind, KVLayout, KVRange, KVTicket, Request, SamplingParams

GROUP = KVGroup(KVKind.FULL, 2, 1, 4, "float32")
LAYOUT = KVLayout((GROUP,), block_size=16)
PROMPT = tuple(range(40))
KEY = b"k" * 32
UNSIGNED = KVTicket(
    transfer_id=b"t" * 16,
    address="127.0.0.1:9000",
    incarnation=b"i" * 16,
    fingerprint=b"f" * 32,
    layout=LAYOUT,
    num_tokens=len(PROMPT),
    tokens_digest=tokens_digest(PROMPT),
    salt_digest=salt_digest(b"tenant"),
    expires_at_ms=1_000,
    key_id=0,
)
OTHER = {
    "transfer_id": b"u" * 16,
    "address": "127.0.0.1:9001",
    "fingerprint": b"g" * 32,
    "layout": KVLayout((GROUP, GROUP), block_size=16),
    "num_tokens": 41,
    "tokens_digest": b"d" * 32,
    "salt_digest": b"s" * 32,
    "expires_at_ms": 10**9,
}


def cause_of(keyring: TicketKeyring, ticket: KVTicket, now_ms: int = 0) -> Cause | None:
    try:
        keyring.verify(ticket, b"i" * 16, now_ms)
    except BatonError as error:
        return error.cause
    return None


def test_a_minted_ticket_is_accepted_until_it_expires() -> None:
    keyring = TicketKeyring(KEY)
    ticket = keyring.mint(UNSIGNED)
    assert cause_of(keyring, ticket) is None
    assert cause_of(keyring, ticket, 999) is None
    assert cause_of(keyring, ticket, 1_000) is Cause.TICKET_EXPIRED


@pytest.mark.parametrize("field", OTHER)
def test_every_changed_field_is_noticed(field: str) -> None:
    keyring = TicketKeyring(KEY)
    forged = replace(keyring.mint(UNSIGNED), **{field: OTHER[field]})
    assert cause_of(keyring, forged) is Cause.TICKET_FORGED


def test_no_field_was_forgotten() -> None:
    assert {f.name for f in fields(KVTicket)} - set(OTHER) == {"incarnation", "key_id", "mac"}


@given(st.binary(max_size=40))
def test_no_other_mac_is_accepted(mac: bytes) -> None:
    keyring = TicketKeyring(KEY)
    ticket = keyring.mint(UNSIGNED)
    if mac != ticket.mac:
        assert cause_of(keyring, replace(ticket, mac=mac)) is Cause.TICKET_FORGED


def test_a_ticket_of_an_earlier_incarnation_names_no_lease() -> None:
    keyring = TicketKeyring(KEY)
    old = TicketKeyring(b"o" * 32).mint(replace(UNSIGNED, incarnation=b"h" * 16))
    assert cause_of(keyring, old) is Cause.LEASE_UNKNOWN


def test_two_keys_are_valid_at_once() -> None:
    keyring = TicketKeyring(KEY)
    first = keyring.mint(UNSIGNED)
    keyring.rotate(b"l" * 32)
    second = keyring.mint(UNSIGNED)
    assert cause_of(keyring, first) is cause_of(keyring, second) is None
    keyring.rotate(b"m" * 32)
    assert cause_of(keyring, first) is Cause.TICKET_FORGED
    assert cause_of(keyring, second) is None


def test_keys_have_a_minimum_length() -> None:
    with pytest.raises(ValueError, match="at least 32 bytes"):
        TicketKeyring(b"short")


@given(st.binary(max_size=3), st.binary(max_size=3), st.binary(max_size=3), st.binary(max_size=3))
def test_signed_bytes_are_injective(a: bytes, b: bytes, c: bytes, d: bytes) -> None:
    one = ticket_bytes(replace(UNSIGNED, transfer_id=a, address=b.hex()))
    two = ticket_bytes(replace(UNSIGNED, transfer_id=c, address=d.hex()))
    assert (one == two) == ((a, b) == (c, d))


REQUEST = Request("r", PROMPT, SamplingParams(seed=1), salt=b"tenant")


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({}, None),
        ({"fingerprint": b"g" * 32}, Cause.MODEL_MISMATCH),
        ({"layout": KVLayout((replace(GROUP, dtype="bfloat16"),), 16)}, Cause.LAYOUT_INCOMPATIBLE),
        ({"layout": KVLayout((GROUP,), block_size=32)}, None),
        ({"salt_digest": b"s" * 32}, Cause.TENANT_MISMATCH),
        ({"tokens_digest": b"d" * 32}, Cause.TOKENS_MISMATCH),
        ({"num_tokens": 39}, Cause.TOKENS_MISMATCH),
    ],
)
def test_a_consumer_compares_the_ticket_with_its_request(
    change: dict[str, object], cause: Cause | None
) -> None:
    ticket = replace(UNSIGNED, **change)  # type: ignore[arg-type]
    if cause is None:
        check_ticket(ticket, REQUEST, b"f" * 32, LAYOUT)
        return
    with pytest.raises(BatonError) as caught:
        check_ticket(ticket, REQUEST, b"f" * 32, LAYOUT)
    assert caught.value.cause is cause


@pytest.mark.parametrize(
    ("layers", "tokens", "is_covered"),
    [
        ((0, GROUP.num_layers), (0, 40), True),
        ((0, GROUP.num_layers), (16, 40), True),  # a prefix is there already
        ((0, GROUP.num_layers), (40, 40), True),  # all of it: the end frame is wanted
        ((0, GROUP.num_layers), (0, 39), False),  # whoever says "done" must have read it all
        ((0, GROUP.num_layers), (0, 41), False),
        ((0, GROUP.num_layers - 1), (0, 40), False),
        ((1, GROUP.num_layers), (0, 40), False),
        ((0, GROUP.num_layers + 1), (0, 40), False),
    ],
)
def test_a_producer_serves_the_whole_ticket_or_nothing(
    layers: tuple[int, int], tokens: tuple[int, int], is_covered: bool
) -> None:
    claims = UNSIGNED.fingerprint, UNSIGNED.tokens_digest, UNSIGNED.salt_digest
    fetch = FetchOpen(UNSIGNED, KVRange(*layers, *tokens), LAYOUT, *claims, consumer="d")
    if is_covered:
        check_fetch(fetch, UNSIGNED)
        return
    with pytest.raises(BatonError) as caught:
        check_fetch(fetch, UNSIGNED)
    assert caught.value.cause is Cause.PROTOCOL
