"""Tickets: the right to fetch one prompt's KV, signed by the worker that holds it.

Only the producer checks the signature, so its keys never leave the process. The consumer compares
the plain fields with its own request before it reserves anything (`check_ticket`), and the producer
compares the consumer's claims with the ticket before it opens an attachment (`check_fetch`): a
fetch runs only when both agree about model, layout, tenant and every prompt token.

Signed bytes (test vector: docs/kv-wire.md): "baton-ticket-1", then every field but `mac` in the
order of `KVTicket`; integers as u64le, byte strings and text (UTF-8) with their length as u32le.
"""

import hmac
import secrets
import struct
from dataclasses import replace

from baton.compat import layout_conflict
from baton.errors import BatonError, Cause
from baton.hashing import salt_digest, tokens_digest
from baton.kvtransfer.base import FetchOpen
from baton.types import KVLayout, KVTicket, Request

_DOMAIN = b"baton-ticket-1"
KEY_BYTES = 32


def ticket_bytes(ticket: KVTicket) -> bytes:
    """What the signature covers; injective, so no two tickets share a signature."""
    return b"".join(
        (
            _DOMAIN,
            _field(ticket.transfer_id),
            _field(ticket.address.encode()),
            _field(ticket.incarnation),
            _field(ticket.fingerprint),
            _layout_bytes(ticket.layout),
            _u64(ticket.num_tokens),
            _field(ticket.tokens_digest),
            _field(ticket.salt_digest),
            _u64(ticket.expires_at_ms),
            _u64(ticket.key_id),
        )
    )


def _layout_bytes(layout: KVLayout) -> bytes:
    parts = [_u64(len(layout.groups))]
    for group in layout.groups:
        parts += (_u64(group.kind), _u64(group.num_layers), _u64(group.num_kv_heads))
        parts += (_u64(group.head_dim), _field(group.dtype.encode()), _u64(group.window))
    parts += (_u64(layout.block_size), _u64(layout.tp_size))
    return b"".join(parts)


def _field(value: bytes) -> bytes:
    return struct.pack("<I", len(value)) + value


def _u64(value: int) -> bytes:
    return struct.pack("<Q", value)


class TicketKeyring:
    """Signs with the newest key and accepts the one before, so that keys rotate without a gap."""

    def __init__(self, key: bytes, key_id: int = 1) -> None:
        self._keys = {key_id: _checked(key)}
        self._newest = key_id

    @classmethod
    def random(cls) -> "TicketKeyring":
        """Of a key that nobody else knows."""
        return cls(secrets.token_bytes(KEY_BYTES))

    def rotate(self, key: bytes) -> None:
        """Sign with `key` from now on; tickets of the present key stay valid, older ones do not."""
        self._keys = {
            self._newest: self._keys[self._newest],
            self._newest + 1: _checked(key),
        }
        self._newest += 1

    def mint(self, ticket: KVTicket) -> KVTicket:
        """The same ticket with `key_id` and `mac` filled in."""
        unsigned = replace(ticket, key_id=self._newest, mac=b"")
        return replace(unsigned, mac=self._mac(unsigned))

    def verify(self, ticket: KVTicket, incarnation: bytes, now_ms: int) -> None:
        """
        Args:
            incarnation: of this process; a ticket of an earlier one names KV that is gone.
            now_ms: the clock that `expires_at_ms` was taken from.

        Raises:
            BatonError: TICKET_FORGED, LEASE_UNKNOWN (an earlier incarnation), TICKET_EXPIRED.
        """
        # Before the signature, because a new incarnation has new keys: the honest holder of an old
        # ticket is told what happened, and a forger learns nothing he did not send.
        if ticket.incarnation != incarnation:
            raise BatonError(Cause.LEASE_UNKNOWN, "the ticket is of an earlier incarnation")
        if ticket.key_id not in self._keys or not hmac.compare_digest(
            self._mac(ticket), ticket.mac
        ):
            raise BatonError(Cause.TICKET_FORGED, "the ticket's signature is not ours")
        if ticket.expires_at_ms <= now_ms:
            raise BatonError(Cause.TICKET_EXPIRED, "the ticket has expired")

    def _mac(self, ticket: KVTicket) -> bytes:
        return hmac.digest(self._keys[ticket.key_id], ticket_bytes(ticket), "sha256")


def _checked(key: bytes) -> bytes:
    if len(key) < KEY_BYTES:
        raise ValueError(f"a ticket key has at least {KEY_BYTES} bytes")
    return key


def check_ticket(ticket: KVTicket, request: Request, fingerprint: bytes, layout: KVLayout) -> None:
    """Consumer: is this ticket for this request, and can its KV be used here?

    Raises:
        BatonError: MODEL_MISMATCH, LAYOUT_INCOMPATIBLE, TENANT_MISMATCH, TOKENS_MISMATCH.
    """
    _check_model(ticket.fingerprint, fingerprint, ticket.layout, layout)
    known = request.shared_token_ids
    if not 0 < ticket.num_tokens <= len(known):
        raise BatonError(Cause.TOKENS_MISMATCH, "the ticket covers more than the request has")
    digest = tokens_digest(known[: ticket.num_tokens])
    _check_prompt(ticket, digest, salt_digest(request.salt))


def check_fetch(fetch: FetchOpen, ticket: KVTicket) -> None:
    """Producer: may the consumer that claims this use the ticket it presents? (Its signature is
    checked by `TicketKeyring.verify`.)

    Raises:
        BatonError: MODEL_MISMATCH, LAYOUT_INCOMPATIBLE, TENANT_MISMATCH, TOKENS_MISMATCH, PROTOCOL
        (a range that the ticket does not cover).
    """
    wanted = fetch.range
    _check_model(ticket.fingerprint, fetch.fingerprint, ticket.layout, fetch.layout)
    _check_prompt(ticket, fetch.tokens_digest, fetch.salt_digest)
    tokens_ok = 0 <= wanted.token_start <= wanted.token_stop == ticket.num_tokens
    layers_ok = wanted.layer_start == 0 and wanted.layer_stop == ticket.layout.num_layers
    if not tokens_ok or not layers_ok:
        raise BatonError(Cause.PROTOCOL, f"the ticket does not cover {wanted}")


def _check_model(mine: bytes, theirs: bytes, source: KVLayout, target: KVLayout) -> None:
    if mine != theirs:
        raise BatonError(Cause.MODEL_MISMATCH, "model fingerprints differ")
    conflict = layout_conflict(source, target)
    if conflict is not None:
        raise BatonError(Cause.LAYOUT_INCOMPATIBLE, conflict)


def _check_prompt(ticket: KVTicket, tokens: bytes, salt: bytes) -> None:
    if ticket.salt_digest != salt:
        raise BatonError(Cause.TENANT_MISMATCH, "the ticket is another tenant's")
    if ticket.tokens_digest != tokens:
        raise BatonError(Cause.TOKENS_MISMATCH, "the ticket is for other token ids")
