"""Which workers may be paired, known from their registrations alone."""

from dataclasses import replace
from typing import Any

import pytest

from baton.compat import pair_conflict
from baton.errors import Cause
from baton.types import PROTOCOL_MAJOR, KVGroup, KVKind, KVLayout, Role, WorkerInfo

GROUP = KVGroup(KVKind.FULL, 2, 4, 8, "bfloat16")
LAYOUT = KVLayout((GROUP,), block_size=16)
INFO = WorkerInfo(
    worker_id="w",
    incarnation=bytes(16),
    role=Role.BOTH,
    model="m",
    fingerprint=b"f" * 32,
    layout=LAYOUT,
    address="x:1",
    transports=(),
    host_id="h",
    pid=1,
    device="cpu",
    num_blocks=10,
    max_model_len=100,
    max_num_seqs=8,
    vocab_size=100,
    eos_token_ids=(),
)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"layout": replace(LAYOUT, block_size=64)},
        {"protocol": (PROTOCOL_MAJOR, 99)},
        {"capabilities": frozenset({"of-the-future"})},
        {"device": "cuda"},
        {"num_blocks": 5000, "max_model_len": 7, "max_num_seqs": 1},
    ],
)
def test_versions_and_shapes_that_mix_in_one_pool(change: dict[str, Any]) -> None:
    other = replace(INFO, worker_id="o", **change)
    assert pair_conflict(INFO, other) is None
    assert pair_conflict(other, INFO) is None


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"protocol": (PROTOCOL_MAJOR + 1, 0)}, Cause.UNSUPPORTED),
        ({"fingerprint": b"o" * 32}, Cause.MODEL_MISMATCH),
        ({"layout": replace(LAYOUT, groups=(GROUP, GROUP))}, Cause.LAYOUT_INCOMPATIBLE),
        ({"layout": replace(LAYOUT, tp_size=2)}, Cause.LAYOUT_INCOMPATIBLE),
        *(
            (
                {"layout": replace(LAYOUT, groups=(replace(GROUP, **{name: value}),))},
                Cause.LAYOUT_INCOMPATIBLE,
            )
            for name, value in (
                ("kind", KVKind.WINDOW),
                ("num_layers", 3),
                ("num_kv_heads", 2),
                ("head_dim", 16),
                ("dtype", "float16"),
                ("window", 64),
            )
        ),
    ],
)
def test_pairs_that_are_never_chosen(change: dict[str, Any], cause: Cause) -> None:
    other = replace(INFO, worker_id="o", **change)
    for pair in ((INFO, other), (other, INFO)):
        conflict = pair_conflict(*pair)
        assert conflict is not None
        assert conflict[0] is cause
        assert conflict[1]


def test_a_model_of_another_dtype_or_name_is_named() -> None:
    layout = replace(LAYOUT, groups=(replace(GROUP, dtype="float32"),))
    other = replace(INFO, fingerprint=b"o" * 32, layout=layout)
    conflict = pair_conflict(INFO, other)
    assert conflict is not None
    assert conflict[1] == "model fingerprints differ: KV group 0: dtype bfloat16 against float32"
    conflict = pair_conflict(INFO, replace(INFO, fingerprint=b"o" * 32, model="n"))
    assert conflict is not None
    assert conflict[1] == "model fingerprints differ: m against n"
    conflict = pair_conflict(INFO, replace(INFO, fingerprint=b"o" * 32))
    assert conflict is not None
    assert conflict[1] == "model fingerprints differ: other weights or another config.json"
