"""May KV made by one worker be decoded by another? Asked by the router before it pairs them and by
both ends of a fetch, so that all three agree."""

from baton.errors import Cause
from baton.heads import tp_conflict
from baton.types import KVLayout, WorkerInfo

HEAD_SLICES = "head-slices"  # capability: fetches name heads, and fill one pool from several ranks


def layout_conflict(source: KVLayout, target: KVLayout) -> str | None:
    """What forbids converting `source` into `target`, or None. Block and TP sizes may differ."""
    if len(source.groups) != len(target.groups):
        return f"{len(source.groups)} KV groups against {len(target.groups)}"
    for index, (ours, theirs) in enumerate(zip(source.groups, target.groups, strict=True)):
        for name in ("kind", "num_layers", "num_kv_heads", "head_dim", "dtype", "window"):
            a, b = getattr(ours, name), getattr(theirs, name)
            if a != b:
                return f"KV group {index}: {name} {a} against {b}"
        for layout in (source, target):
            conflict = tp_conflict(ours.num_kv_heads, layout.tp_size)
            if conflict is not None:
                return f"KV group {index}: {conflict}"
    return None


def pair_conflict(producer: WorkerInfo, consumer: WorkerInfo) -> tuple[Cause, str] | None:
    """Why `consumer` must not fetch from `producer`, or None when it may."""
    if producer.protocol[0] != consumer.protocol[0]:
        return Cause.UNSUPPORTED, (
            f"protocol {producer.protocol[0]} against {consumer.protocol[0]}"
        )
    if producer.fingerprint != consumer.fingerprint:
        return Cause.MODEL_MISMATCH, "model fingerprints differ"
    conflict = layout_conflict(producer.layout, consumer.layout)
    if conflict is not None:
        return Cause.LAYOUT_INCOMPATIBLE, conflict
    sizes = producer.layout.tp_size, consumer.layout.tp_size
    if sizes != (1, 1) and HEAD_SLICES not in producer.capabilities & consumer.capabilities:
        return Cause.UNSUPPORTED, f"{sizes[0]} ranks against {sizes[1]} without {HEAD_SLICES}"
    return None
