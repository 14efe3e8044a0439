"""The definitions that peers must share, checked against the vectors in docs/kv-wire.md."""

import hashlib
import hmac
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import xxhash

from baton.grants import Grant, GrantKeys, grant_bytes
from baton.hashing import join_salt, prefix_hashes, root_hash, salt_digest, tokens_digest
from baton.kvtransfer.frames import HEADER_BYTES, FrameKind, FrameWriter, decode
from baton.kvtransfer.ticket import TicketKeyring, ticket_bytes
from baton.types import BlockHash, KVGroup, KVKind, KVLayout, KVRange, KVTicket, SamplingParams

DOC = Path(__file__).parents[2] / "docs" / "kv-wire.md"


@pytest.fixture(scope="module")
def vectors() -> dict[str, Any]:
    block = DOC.read_text().split("```json\n")[1].split("```")[0]
    loaded: dict[str, Any] = json.loads(block)
    return loaded


def prompt(vector: dict[str, Any]) -> list[int]:
    first = vector["first_token_id"]
    return list(range(first, first + vector["num_tokens"]))


def test_prefix_hashes(vectors: dict[str, Any]) -> None:
    v = vectors["hash"]
    salt = join_salt(v["tenant"].encode(), v["cache_salt"].encode(), v["adapter"].encode())
    fingerprint, ids = bytes.fromhex(v["fingerprint"]), prompt(v)
    root = root_hash(fingerprint, salt)
    assert salt.hex() == v["salt"]
    assert root.hex() == v["root"]
    assert [h.hex() for h in prefix_hashes(root, ids)] == v["hashes"]
    assert tokens_digest(ids).hex() == v["tokens_digest"]
    assert salt_digest(salt).hex() == v["salt_digest"]


def test_prefix_hashes_are_what_the_page_says(vectors: dict[str, Any]) -> None:
    """The formulas of the page, written out once more."""
    v = vectors["hash"]
    parent = hashlib.sha256(
        b"baton-kv-1" + bytes.fromhex(v["fingerprint"]) + bytes.fromhex(v["salt"])
    ).digest()
    assert parent.hex() == v["root"]
    for i, expected in enumerate(v["hashes"]):
        ids = prompt(v)[16 * i : 16 * (i + 1)]
        parent = hashlib.sha256(parent + b"".join(struct.pack("<I", x) for x in ids)).digest()
        assert parent.hex() == expected


def test_grant(vectors: dict[str, Any]) -> None:
    v, h = vectors["grant"], vectors["hash"]
    # HKDF by RFC 5869: extract, then one block of expand.
    extracted = hmac.digest(b"baton-grant-1", v["secret"].encode(), "sha256")
    key = hmac.digest(extracted, v["cluster"].encode() + b"\x01", "sha256")
    assert key.hex() == v["key"]
    unsigned = Grant(
        nonce=bytes.fromhex(v["nonce"]),
        source_incarnation=bytes.fromhex(v["source_incarnation"]),
        consumer_incarnation=bytes.fromhex(v["consumer_incarnation"]),
        fingerprint=bytes.fromhex(h["fingerprint"]),
        salt_digest=bytes.fromhex(h["salt_digest"]),
        last_hash=BlockHash(bytes.fromhex(h["hashes"][1])),
        num_tokens=v["num_tokens"],
        duration_ms=v["duration_ms"],
    )
    grant = GrantKeys(v["cluster"], [v["secret"]]).sign(unsigned)
    assert grant.key_id == v["key_id"] == struct.unpack("<I", hashlib.sha256(key).digest()[:4])[0]
    assert grant_bytes(grant).hex() == v["signed"]
    assert grant.mac == hmac.digest(key, bytes.fromhex(v["signed"]), "sha256")
    assert grant.mac.hex() == v["mac"]


def test_ticket(vectors: dict[str, Any]) -> None:
    v, h = vectors["ticket"], vectors["hash"]
    layout = KVLayout((KVGroup(KVKind.FULL, 2, 4, 8, "bfloat16"),), block_size=32)
    unsigned = KVTicket(
        transfer_id=bytes.fromhex(v["transfer_id"]),
        address=v["address"],
        incarnation=bytes.fromhex(v["incarnation"]),
        fingerprint=bytes.fromhex(h["fingerprint"]),
        layout=layout,
        num_tokens=v["num_tokens"],
        tokens_digest=bytes.fromhex(h["tokens_digest"]),
        salt_digest=bytes.fromhex(h["salt_digest"]),
        expires_at_ms=v["expires_at_ms"],
        key_id=0,
    )
    key = b"\x6b" * 32
    ticket = TicketKeyring(key, v["key_id"]).mint(unsigned)
    assert ticket_bytes(ticket).hex() == v["signed"]
    assert ticket.mac.hex() == v["mac"]
    assert hmac.digest(key, bytes.fromhex(v["signed"]), "sha256").hex() == v["mac"]


def test_choice_seeds(vectors: dict[str, Any]) -> None:
    for v in vectors["seed"]:
        assert SamplingParams(seed=v["seed"]).choice_seed(v["choice"]) == v["choice_seed"]


def test_frames(vectors: dict[str, Any]) -> None:
    v = vectors["frame"]
    epoch, data, end = int(v["epoch"], 16), bytes.fromhex(v["data"]), bytes.fromhex(v["end"])
    frame = decode(data)
    assert (frame.kind, frame.epoch, frame.seq) == (FrameKind.DATA, epoch, 1)
    assert frame.range == KVRange(0, 2, 16, 17)
    assert bytes(frame.payload) == bytes(range(8))
    assert data[56:64] == struct.pack("<Q", xxhash.xxh3_64_intdigest(data[:56] + data[64:]))
    last = decode(end)
    assert (last.kind, last.seq, bytes(last.payload)) == (FrameKind.END, 2, b"end")


def test_a_writer_makes_these_frames(vectors: dict[str, Any]) -> None:
    """The vectors are the second and third frame that a writer makes."""
    epoch = int(vectors["frame"]["epoch"], 16)
    writer = FrameWriter(epoch)
    for _ in range(2):
        frame = bytearray(HEADER_BYTES) + bytes(range(8))
        made = writer.data(KVRange(0, 2, 16, 17), memoryview(frame))
    assert b"".join(made).hex() == vectors["frame"]["data"]
    made = writer.end(KVRange(0, 2, 16, 40), b"end")
    assert b"".join(made).hex() == vectors["frame"]["end"]
