"""What is believed of a link before anything came over it, what is learned, who is probed."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.kvtransfer.importer import INITIAL_RATE_BYTES_S
from baton.types import (
    KVGroup,
    KVKind,
    KVLayout,
    Role,
    TransferStats,
    TransportAddress,
    WorkerInfo,
)
from baton.worker.link_table import MAX_PROBES, LinkTable, to_probe

MIB = 1 << 20


def address(number: int, name: str = "ucx") -> TransportAddress:
    return TransportAddress(name, f"10.0.0.{number}:9000")


def fetched(table: LinkTable, where: TransportAddress, mb_s: float, times: int = 1) -> list[str]:
    """The warnings of so many fetches at that rate."""
    link = table.open(where, is_same_host=False, now_s=0.0)
    return [text for _ in range(times) if (text := table.learn(link, stats(mb_s))) is not None]


def stats(mb_s: float) -> TransferStats:
    ms = 100 * MIB / (mb_s * 1e3)
    return TransferStats("ucx", 100 * MIB, duration_ms=ms, ready_bytes=100 * MIB, ready_ms=ms)


def rate_of(table: LinkTable, where: TransportAddress, is_same_host: bool = False) -> float:
    """Expected of this link, in MB/s."""
    return table.open(where, is_same_host, 0.0).model.bytes_per_ms / 1e3


def test_a_new_link_is_as_fast_as_its_class() -> None:
    table = LinkTable()
    assert rate_of(table, address(0)) * 1e6 == INITIAL_RATE_BYTES_S
    fetched(table, address(1), 800)
    assert round(rate_of(table, address(2))) == 800
    for other in (rate_of(table, address(3), True), rate_of(table, address(4, "grpc"))):
        assert other * 1e6 == INITIAL_RATE_BYTES_S
    assert [(r.transport, r.is_same_host, round(r.bytes_per_s / 1e6)) for r in table.rates()] == [
        ("ucx", False, 800)
    ]


def test_a_probe_is_good_until_kv_comes() -> None:
    table = LinkTable()
    table.probed(table.open(address(1), False, 0.0), stats(2000))
    assert round(rate_of(table, address(1))) == round(rate_of(table, address(2))) == 2000
    assert round(table.rates()[0].bytes_per_s / 1e6) == 2000
    fetched(table, address(2), 700)
    assert round(rate_of(table, address(1))) == 2000
    assert round(rate_of(table, address(2))) == round(rate_of(table, address(3))) == 700
    assert round(table.rates()[0].bytes_per_s / 1e6) == 700


def test_a_few_slow_links_do_not_slow_their_class_down() -> None:
    table = LinkTable()
    for number, mb_s in enumerate((900, 20, 1000, 30)):
        fetched(table, address(number), mb_s)
    (rate,) = table.rates()
    assert 900e6 <= rate.bytes_per_s <= 1000e6


def test_a_fetch_that_waited_for_its_prefill_says_nothing_of_the_link() -> None:
    table = LinkTable()
    fetched(table, address(1), 800)
    link = table.open(address(1), False, 0.0)
    for _ in range(50):
        table.learn(link, TransferStats("ucx", 100 * MIB, duration_ms=60_000.0))
    assert round(rate_of(table, address(1))) == 800
    table.learn(link, TransferStats("ucx", 100 * MIB, duration_ms=10.0))
    assert rate_of(table, address(1)) > 800, "but it is no slower than that"


def test_a_link_far_below_its_class_is_warned_of_once() -> None:
    table = LinkTable()
    for number in range(3):
        assert fetched(table, address(number), 1000, times=5) == []
    assert fetched(table, address(9), 500, times=5) == []
    (warning,) = fetched(table, address(4), 50, times=9)
    assert warning.startswith("50.0 MB/s over ucx between hosts, where 1000.0 MB/s are usual")
    assert fetched(table, address(4), 1000, times=9) == []
    assert len(fetched(table, address(4), 50, times=99)) == 1, "slow again"


def test_kv_is_not_compared_with_probes() -> None:
    """A probe packs nothing, so it is faster."""
    table = LinkTable()
    for number in range(3):
        assert table.probed(table.open(address(number), False, 0.0), stats(5000)) is None
    assert fetched(table, address(0), 500, times=9) == []
    warning = table.probed(table.open(address(7), False, 0.0), stats(500))
    assert warning is not None
    assert warning.startswith("500.0 MB/s")


def test_unused_links_are_forgotten() -> None:
    table = LinkTable()
    for number in range(4):
        table.open(address(number), False, now_s=float(number))
    table.open(address(0), False, now_s=9.0)
    table.forget(unused_since_s=2.0)
    assert len(table) == 3
    assert table.get(address(1)) is None


def peer(number: int, host_id: str, transports: tuple[TransportAddress, ...]) -> WorkerInfo:
    return WorkerInfo(
        worker_id=f"w{number}",
        incarnation=number.to_bytes(16, "little"),
        role=Role.PREFILL,
        model="m",
        fingerprint=bytes(32),
        layout=KVLayout((KVGroup(KVKind.FULL, 1, 1, 4, "float32"),), 16),
        address="x:1",
        transports=transports,
        host_id=host_id,
        pid=1,
        device="cpu",
        num_blocks=4,
        max_model_len=64,
        max_num_seqs=4,
        vocab_size=10,
        eos_token_ids=(),
    )


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["here", "there"]),
            st.sets(st.sampled_from(["shm", "ucx", "grpc"]), min_size=1),
        ),
        max_size=30,
    ),
    st.sets(st.integers(0, 30)),
)
def test_a_few_of_each_class_are_probed(
    fleet: list[tuple[str, set[str]]], out_of_reach: set[int]
) -> None:
    own = peer(99, "here", ())
    peers = [
        peer(number, host, tuple(address(number, name) for name in sorted(names)))
        for number, (host, names) in enumerate(fleet)
    ]
    reachable = [
        where for p in peers for where in p.transports if int(p.worker_id[1:]) not in out_of_reach
    ]
    probes = to_probe([*peers, own], own, reachable)
    assert all(where in reachable for _, where, _ in probes)
    assert own not in [p for p, _, _ in probes]
    for name in ("shm", "ucx", "grpc"):
        for is_same_host in (True, False):
            possible = [
                where
                for p in peers
                for where in p.transports
                if where in reachable
                and where.name == name
                and (p.host_id == "here") == is_same_host
            ]
            probed = [w for _, w, same in probes if w.name == name and same == is_same_host]
            assert len(probed) == len(set(probed)) == min(MAX_PROBES, len(possible))


def test_one_that_registered_under_our_own_name_is_still_somebody_else() -> None:
    own = peer(1, "here", (address(1),))
    other = replace(own, incarnation=b"x" * 16)
    assert [p for p, _, _ in to_probe([own, other], own, other.transports)] == [other]


def test_not_everybody_probes_the_same() -> None:
    peers = [peer(number, "here", (address(number),)) for number in range(40)]
    reachable = [where for p in peers for where in p.transports]
    chosen = [
        {p.worker_id for p, _, _ in to_probe(peers, own, reachable)}
        for own in (peers[1], peers[20])
    ]
    assert chosen[0].isdisjoint(chosen[1])
