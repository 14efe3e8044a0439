"""Prefixes by hash, both ends without I/O: what is fetched and what is opened needs a grant that
fits in every part."""

from dataclasses import replace

import pytest

from baton.engine import commands
from baton.engine.events import PrefixReserved
from baton.errors import Cause
from baton.grants import Grant, GrantKeys, HashChain
from baton.hashing import salt_digest
from baton.kvtransfer.base import FetchOpen
from baton.kvtransfer.effects import AttachRefused, CancelFetch
from baton.messages import PrefixFetched, PrefixSource
from baton.types import BlockHash, KVRange
from baton.worker.effects import Effect, FetchKV
from baton.worker.outbox import Outbox
from baton.worker.policy import WorkerPolicy
from baton.worker.prefix_fetches import PrefixFetches
from baton.worker.prefix_pins import PrefixPins
from tests.worker.machines import BLOCKS, LAYOUT, PROMPT, TRANSPORTS, P, info, only, posted, request

KEYS = GrantKeys("test", ())
CONSUMER = b"c" * 16
HASHES = tuple(BlockHash(bytes([i]) * 32) for i in (1, 2))
SALT = salt_digest(request().salt)
DEADLINE_MS = 50


def grant(consumer: bytes = CONSUMER) -> Grant:
    own = info()
    unsigned = Grant(
        nonce=b"n" * 16,
        source_incarnation=own.incarnation,
        consumer_incarnation=consumer,
        fingerprint=own.fingerprint,
        salt_digest=SALT,
        last_hash=HASHES[-1],
        num_tokens=32,
        duration_ms=1000,
    )
    return KEYS.sign(unsigned)


def source(**changes: object) -> PrefixSource:
    fitting = replace(grant(info().incarnation), **changes)  # type: ignore[arg-type]
    return PrefixSource("s", TRANSPORTS, "h", fitting, 5.0, DEADLINE_MS)


def consumer() -> tuple[PrefixFetches, Outbox]:
    outbox = Outbox()
    return PrefixFetches(info(), WorkerPolicy(), outbox), outbox


def reserved(hashes: tuple[BlockHash, ...] = HASHES) -> PrefixReserved:
    return PrefixReserved(P, BLOCKS, hashes, num_cached_tokens=16, num_fetch_tokens=32)


@pytest.mark.parametrize(
    ("change", "num_tokens"),
    [
        ({}, 32),
        ({"consumer_incarnation": b"x" * 16}, 0),
        ({"fingerprint": b"x" * 32}, 0),
        ({"num_tokens": len(PROMPT) + 8}, 0),
    ],
)
def test_only_a_grant_for_this_worker_and_model_is_of_use(
    change: dict[str, object], num_tokens: int
) -> None:
    prefixes, _ = consumer()
    assert prefixes.want(P, request(), source(**change)) == num_tokens


def test_a_prompt_that_hashes_to_something_else_is_computed() -> None:
    prefixes, outbox = consumer()
    prefixes.want(P, request(), source())
    prefixes.reserved(reserved((HASHES[0], BlockHash(b"x" * 32))), 0)
    effects = outbox.take(None, None)
    assert posted(effects) == [commands.PrefixArrived(P, 16)]
    assert not [effect for effect in effects if isinstance(effect, FetchKV)]
    assert prefixes.result(P) == PrefixFetched(0, Cause.TOKENS_MISMATCH)


@pytest.mark.parametrize(
    ("at_ms", "cause"),
    [(DEADLINE_MS, Cause.DEADLINE_EXCEEDED), (DEADLINE_MS - 1, Cause.TRANSPORT_FAILED)],
)
def test_a_fetch_that_is_late_is_told_apart_from_one_that_failed(at_ms: int, cause: Cause) -> None:
    prefixes, outbox = consumer()
    prefixes.want(P, request(), source())
    prefixes.reserved(reserved(), 0)
    assert only(outbox.take(None, None), FetchKV).fetch.range == KVRange(0, 2, 16, 32)
    prefixes.tick(at_ms)
    is_cancelled = [type(effect) for effect in outbox.take(None, None)] == [CancelFetch]
    assert is_cancelled == (at_ms == DEADLINE_MS)
    prefixes.fetch_failed(P, 24, Cause.TRANSPORT_FAILED, "", at_ms)
    assert posted(outbox.take(None, None)) == [commands.PrefixArrived(P, 24)]
    assert prefixes.result(P) == PrefixFetched(8, cause)


# ── the source ───────────────────────────────────────────────────────────────────────────────────


def attach(fetch: FetchOpen, chain: HashChain, is_draining: bool = False) -> list[Effect]:
    outbox = Outbox()
    pins = PrefixPins(info(), WorkerPolicy(), KEYS, outbox, lambda: 7)
    pins.attach(1, fetch, chain, is_draining, now_ms=0)
    return outbox.take(None, None)


def fetch_of(chain: HashChain) -> FetchOpen:
    own = info()
    where = KVRange(0, LAYOUT.num_layers, 16, 32)
    return FetchOpen(chain, where, LAYOUT, own.fingerprint, HASHES[-1], SALT, "d")


def test_a_grant_that_fits_opens_the_prefix() -> None:
    chain = HashChain(HASHES, grant(), CONSUMER)
    assert posted(attach(fetch_of(chain), chain)) == [commands.PinPrefix(1, HASHES)]


@pytest.mark.parametrize(
    ("chain", "cause"),
    [
        ({"grant": replace(grant(), mac=bytes(32))}, Cause.TICKET_FORGED),
        ({"grant": replace(grant(), source_incarnation=b"x" * 16)}, Cause.LEASE_UNKNOWN),
        ({"consumer_incarnation": b"x" * 16}, Cause.TICKET_FORGED),
        ({"hashes": HASHES[:1]}, Cause.TOKENS_MISMATCH),
        ({"hashes": HASHES[::-1]}, Cause.TOKENS_MISMATCH),
    ],
)
def test_a_chain_that_the_grant_is_not_for(chain: dict[str, object], cause: Cause) -> None:
    wrong = replace(HashChain(HASHES, grant(), CONSUMER), **chain)  # type: ignore[arg-type]
    refusal = only(attach(fetch_of(wrong), wrong), AttachRefused)
    assert (refusal.key, refusal.cause) == (1, cause)


@pytest.mark.parametrize(
    ("claim", "cause"),
    [
        ({"salt_digest": b"x" * 32}, Cause.TENANT_MISMATCH),
        ({"fingerprint": b"x" * 32}, Cause.MODEL_MISMATCH),
        ({"layout": replace(LAYOUT, groups=LAYOUT.groups * 2)}, Cause.LAYOUT_INCOMPATIBLE),
        ({"range": KVRange(0, 2, 16, 33)}, Cause.PROTOCOL),
        ({"range": KVRange(0, 1, 16, 32)}, Cause.PROTOCOL),
    ],
)
def test_a_consumer_that_claims_what_the_grant_does_not_say(
    claim: dict[str, object], cause: Cause
) -> None:
    chain = HashChain(HASHES, grant(), CONSUMER)
    wrong = replace(fetch_of(chain), **claim)  # type: ignore[arg-type]
    assert only(attach(wrong, chain), AttachRefused).cause is cause


def test_a_worker_that_drains_opens_nothing() -> None:
    chain = HashChain(HASHES, grant(), CONSUMER)
    refusal = only(attach(fetch_of(chain), chain, is_draining=True), AttachRefused)
    assert refusal.cause is Cause.DRAINING
