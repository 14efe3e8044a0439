import asyncio
import dataclasses
import json
import secrets
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from baton import locality, redis_client
from baton.errors import BatonError, Cause
from baton.gateway import discovery
from baton.gateway.discovery import Discovery
from baton.locality import (
    PrefixIndex,
    Signer,
    WorkerRegistration,
    decode_events,
    decode_registration,
    encode_events,
    encode_registration,
    read_registrations,
    worker_key,
)
from baton.messages import BlocksRemoved, BlocksStored
from baton.redis_client import connect
from baton.types import BlockHash, KVGroup, KVKind, KVLayout, Role, TransportAddress, WorkerInfo


def make_info(worker_id: str = "prefill-0") -> WorkerInfo:
    return WorkerInfo(
        worker_id=worker_id,
        incarnation=secrets.token_bytes(16),
        role=Role.PREFILL,
        model="demo",
        fingerprint=b"f" * 32,
        layout=KVLayout((KVGroup(KVKind.FULL, 2, 2, 32, "float32"),), 16),
        address="127.0.0.1:9000",
        transports=(TransportAddress("grpc", "127.0.0.1:9000"),),
        host_id="host",
        pid=1,
        device="cpu",
        num_blocks=64,
        max_model_len=512,
        max_num_seqs=8,
        vocab_size=100,
        eos_token_ids=(0,),
    )


def h(i: int) -> BlockHash:
    return BlockHash(i.to_bytes(32, "big"))


def chain(n: int, start: int = 0) -> tuple[BlockHash, ...]:
    return tuple(h(i) for i in range(start, start + n))


def test_longest_prefix_counts_only_unbroken_chains() -> None:
    index = PrefixIndex()
    index.apply("a", BlocksStored(chain(4)))
    index.apply("b", BlocksStored(chain(2)))
    index.apply("c", BlocksStored(chain(3, start=1)))  # lacks the first
    assert index.longest_prefix(chain(5)) == {"a": 64, "b": 32}
    index.apply("a", BlocksRemoved((h(1),)))
    assert index.longest_prefix(chain(5)) == {"a": 16, "b": 32}
    index.drop("b")
    assert index.longest_prefix(chain(5)) == {"a": 16}
    index.replace("a", chain(5))
    assert index.longest_prefix(chain(5)) == {"a": 80}
    assert index.longest_prefix(()) == {}


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.booleans(), st.lists(st.integers(0, 9), max_size=5)),
        max_size=30,
    )
)
def test_index_equals_a_naive_model(events: list[tuple[str, bool, list[int]]]) -> None:
    index = PrefixIndex()
    held: dict[str, set[int]] = {"a": set(), "b": set()}
    for worker, stored, numbers in events:
        hashes = tuple(h(i) for i in numbers)
        index.apply(worker, BlocksStored(hashes) if stored else BlocksRemoved(hashes))
        held[worker] = held[worker] | set(numbers) if stored else held[worker] - set(numbers)
    expected = {}
    for worker, numbers in held.items():
        length = next((i for i in range(10) if i not in numbers), 10)
        if length:
            expected[worker] = length * 16
    assert index.longest_prefix(chain(10)) == expected


@given(st.lists(st.tuples(st.booleans(), st.lists(st.binary(min_size=32, max_size=32)))))
def test_events_round_trip(raw: list[tuple[bool, list[bytes]]]) -> None:
    events = [
        (BlocksStored if stored else BlocksRemoved)(tuple(map(BlockHash, hashes)))
        for stored, hashes in raw
    ]
    assert decode_events(encode_events(events)) == events


@given(st.binary(max_size=200))
def test_garbage_events_are_refused_or_understood(data: bytes) -> None:
    try:
        events = decode_events(data)
    except ValueError:
        return
    assert encode_events(events) == data


@pytest.mark.parametrize("attack", ["body", "mac", "other key", "schema", "not json", "no key"])
def test_a_forged_registration_is_refused(attack: str) -> None:
    signer, info = Signer(["secret"]), make_info()
    key = worker_key("c", info.worker_id)
    entry = json.loads(encode_registration(signer, "c", info))
    assert decode_registration(signer, key, json.dumps(entry).encode()) == info
    if attack == "body":
        entry["info"] = entry["info"].replace("127.0.0.1", "127.6.6.6")
    elif attack == "mac":
        entry["mac"] = "0" * 64
    elif attack == "other key":
        key = worker_key("c", "prefill-1")
    elif attack == "schema":
        entry["schema"] = 99
    elif attack == "no key":
        entry = json.loads(encode_registration(Signer([]), "c", info))
    value = b"\xff{" if attack == "not json" else json.dumps(entry).encode()
    with pytest.raises(ValueError):  # noqa: PT011 - every refusal is a plain ValueError
        decode_registration(signer, key, value)


def test_two_tokens_are_valid_while_rotating() -> None:
    info = make_info()
    value = encode_registration(Signer(["old"]), "c", info).encode()
    both = Signer(["new", "old"])
    assert decode_registration(both, worker_key("c", info.worker_id), value) == info


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten and more times as fast as in a fleet."""
    monkeypatch.setattr(locality, "BEAT_S", 0.1)
    monkeypatch.setattr(discovery, "POLL_S", 0.05)
    monkeypatch.setattr(discovery, "READ_BLOCK_MS", 100)
    monkeypatch.setattr(redis_client, "TIMEOUT_S", 0.5)


class Fleet:
    """A discovery and the workers' own truth, for tests against a real Redis."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.index = PrefixIndex()
        self.events: list[tuple[str, str]] = []
        self.registrations: dict[str, WorkerRegistration] = {}
        self.clients: list[Redis] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.num_inventories = 0
        self.silent: set[str] = set()  # workers that never answer
        self.discovery = Discovery(
            url,
            "c",
            ["secret"],
            self.index,
            on_join=lambda info: self.events.append(("join", info.worker_id)),
            on_leave=lambda info: self.events.append(("leave", info.worker_id)),
            inventory=self.inventory,
        )
        self.tasks.append(asyncio.create_task(self.discovery.run()))

    async def inventory(self, info: WorkerInfo) -> tuple[int, list[BlockHash]]:
        self.num_inventories += 1
        if info.worker_id in self.silent:
            await asyncio.Event().wait()
        if info.worker_id not in self.registrations:
            raise BatonError(Cause.WORKER_LOST, "gone")
        return self.registrations[info.worker_id].inventory()

    def add(self, info: WorkerInfo) -> WorkerRegistration:
        self.clients.append(connect(self.url))
        registration = WorkerRegistration(self.clients[-1], "c", ["secret"], info)
        self.registrations[info.worker_id] = registration
        self.tasks.append(asyncio.create_task(registration.run()))
        return registration

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await asyncio.gather(*(client.aclose() for client in self.clients))


async def test_a_worker_joins_publishes_and_leaves(redis_server, until) -> None:
    fleet = Fleet(redis_server.url)
    worker = fleet.add(make_info())
    await until(lambda: ("join", "prefill-0") in fleet.events)
    worker.publish(chain(3), ())
    await until(lambda: fleet.index.longest_prefix(chain(3)) == {"prefill-0": 48})
    worker.publish((), (h(2),))
    await until(lambda: fleet.index.longest_prefix(chain(3)) == {"prefill-0": 32})
    fleet.tasks[-1].cancel()
    await until(lambda: ("leave", "prefill-0") in fleet.events)
    assert fleet.index.longest_prefix(chain(3)) == {}
    await fleet.close()


async def test_locality_survives_a_redis_that_comes_back_empty(redis_server, until) -> None:
    fleet = Fleet(redis_server.url)
    worker = fleet.add(make_info())
    worker.publish(chain(2), ())
    await until(lambda: fleet.index.longest_prefix(chain(4)) == {"prefill-0": 32})
    redis_server.kill()
    worker.publish(chain(1, start=2), ())  # lost
    await until(lambda: not fleet.discovery.reachable)
    assert "prefill-0" in fleet.discovery.members, "a known worker is kept while Redis is away"
    redis_server.start()
    await redis_server.ready()
    worker.publish(chain(1, start=3), ())
    await until(lambda: fleet.index.longest_prefix(chain(4)) == {"prefill-0": 64})
    await fleet.close()


async def test_a_new_incarnation_replaces_the_old_one(redis_server, until) -> None:
    fleet = Fleet(redis_server.url)
    fleet.add(make_info()).publish(chain(2), ())
    await until(lambda: fleet.index.longest_prefix(chain(2)) == {"prefill-0": 32})
    fleet.add(dataclasses.replace(make_info(), pid=2))
    await until(lambda: fleet.events.count(("join", "prefill-0")) == 2)
    await until(lambda: fleet.index.longest_prefix(chain(2)) == {})
    await fleet.close()


async def registered(url: str) -> WorkerInfo | None:
    """As a gateway finds it."""
    client = connect(url)
    found, _ = await read_registrations(client, Signer(["secret"]), "c")
    await client.aclose()
    return found.get("prefill-0")


async def test_an_id_belongs_to_the_process_that_registered_it_last(
    redis_server, until, caplog: pytest.LogCaptureFixture
) -> None:
    """A predecessor that still runs, or drains, neither overwrites nor removes its entry."""
    fleet = Fleet(redis_server.url)
    old, new = make_info(), make_info()
    fleet.add(old)
    await until(lambda: fleet.discovery.members.get("prefill-0") == old)
    fleet.add(new)
    await until(lambda: fleet.discovery.members.get("prefill-0") == new)
    await until(lambda: "another process has registered as prefill-0" in caplog.text)
    for _ in range(5):
        assert await registered(redis_server.url) == new
        await asyncio.sleep(0.05)
    fleet.tasks[1].cancel()
    await asyncio.gather(fleet.tasks[1], return_exceptions=True)
    assert await registered(redis_server.url) == new, "its successor's entry is not its own"
    fleet.tasks[2].cancel()
    await asyncio.gather(fleet.tasks[2], return_exceptions=True)
    assert await registered(redis_server.url) is None
    await fleet.close()


async def test_who_was_replaced_is_found_again_when_the_other_is_gone(redis_server, until) -> None:
    fleet = Fleet(redis_server.url)
    old, new = make_info(), make_info()
    fleet.add(old)
    await until(lambda: fleet.discovery.members.get("prefill-0") == old)
    fleet.add(new)
    await until(lambda: fleet.discovery.members.get("prefill-0") == new)
    fleet.tasks[2].cancel()
    await until(lambda: fleet.discovery.members.get("prefill-0") == old)
    await fleet.close()


async def test_a_redis_that_stands_still_holds_up_nobody(
    redis_server, until, caplog: pytest.LogCaptureFixture
) -> None:
    """What is known stays known, and a worker that leaves does not wait for long."""
    caplog.set_level("INFO")
    fleet = Fleet(redis_server.url)
    fleet.add(make_info()).publish(chain(2), ())
    leaving = fleet.add(make_info("decode-0"))
    await until(lambda: fleet.index.longest_prefix(chain(2)) == {"prefill-0": 32})
    await until(lambda: "decode-0" in fleet.discovery.members)
    redis_server.pause()
    lags = []
    async with asyncio.timeout(20):
        while caplog.text.count("redis cannot be used: ") < 3:  # the gateway and each worker
            start = time.monotonic()
            await asyncio.sleep(0.01)
            lags.append(time.monotonic() - start)
    assert sorted(lags)[len(lags) // 2] < 0.1, "the event loop goes on"
    assert not fleet.discovery.reachable
    assert set(fleet.discovery.members) == {"prefill-0", "decode-0"}
    assert fleet.index.longest_prefix(chain(2)) == {"prefill-0": 32}
    leaving.publish(chain(1), ())
    start = time.monotonic()
    fleet.tasks[-1].cancel()
    await asyncio.gather(fleet.tasks[-1], return_exceptions=True)
    assert time.monotonic() - start < 3 * redis_client.TIMEOUT_S
    redis_server.resume()
    fleet.registrations["prefill-0"].publish(chain(1, start=2), ())
    await until(lambda: fleet.index.longest_prefix(chain(3)) == {"prefill-0": 48})
    await until(lambda: fleet.discovery.reachable)
    await until(lambda: "registered as prefill-0" in caplog.text)
    assert caplog.text.count("redis cannot be used: ") == 3, "once each"
    await fleet.close()


async def test_a_redis_that_was_never_there_is_said(
    until, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = Fleet("unix:///nonexistent/redis.sock")
    fleet.add(make_info())
    await until(lambda: caplog.text.count("redis cannot be used: ") == 2)
    assert caplog.text.count("No such file or directory") == 2
    await fleet.close()


async def test_a_worker_that_does_not_answer_holds_up_nobody(redis_server, until) -> None:
    fleet = Fleet(redis_server.url)
    fleet.silent.add("decode-0")
    fleet.add(make_info("decode-0"))
    await until(lambda: fleet.num_inventories == 1)
    fleet.add(make_info()).publish(chain(2), ())
    await until(lambda: fleet.index.longest_prefix(chain(2)) == {"prefill-0": 32})
    assert fleet.num_inventories == 2, "asked once each"
    await fleet.close()


async def test_a_forged_entry_never_becomes_a_member(redis_server, until) -> None:
    fleet = Fleet(redis_server.url)
    client = connect(redis_server.url)
    forged = encode_registration(Signer(["guess"]), "c", make_info("evil"))
    await client.set(worker_key("c", "evil"), forged)
    await client.aclose()
    fleet.add(make_info())
    await until(lambda: ("join", "prefill-0") in fleet.events)
    assert list(fleet.discovery.members) == ["prefill-0"]
    await fleet.close()
