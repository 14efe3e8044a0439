"""May KV made by one worker be decoded by another? Asked by the router before it pairs them and by
both ends of a fetch, so that all three agree."""

from baton.errors import Cause
from baton.types import KVLayout, WorkerInfo


def layout_conflict(source: KVLayout, target: KVLayout) -> str | None:
    """What forbids converting `source` into `target`, or None. Block sizes may differ. Pools of
    several tensor-parallel ranks are not converted: engines run on one."""
    if len(source.groups) != len(target.groups):
        return f"{len(source.groups)} KV groups against {len(target.groups)}"
    for index, (ours, theirs) in enumerate(zip(source.groups, target.groups, strict=True)):
        for name in ("kind", "num_layers", "num_kv_heads", "head_dim", "dtype", "window"):
            a, b = getattr(ours, name), getattr(theirs, name)
            if a != b:
                return f"KV group {index}: {name} {a} against {b}"
    if (source.tp_size, target.tp_size) != (1, 1):
        return f"{source.tp_size} tensor-parallel ranks against {target.tp_size}"
    return None


def pair_conflict(producer: WorkerInfo, consumer: WorkerInfo) -> tuple[Cause, str] | None:
    """Why `consumer` must not fetch from `producer`, or None when it may."""
    if producer.protocol[0] != consumer.protocol[0]:
        return Cause.UNSUPPORTED, (
            f"protocol {producer.protocol[0]} against {consumer.protocol[0]}"
        )
    if producer.fingerprint != consumer.fingerprint:
        return Cause.MODEL_MISMATCH, f"model fingerprints differ: {_difference(producer, consumer)}"
    conflict = layout_conflict(producer.layout, consumer.layout)
    if conflict is not None:
        return Cause.LAYOUT_INCOMPATIBLE, conflict
    return None


def _difference(one: WorkerInfo, other: WorkerInfo) -> str:
    """What people can see of two models that are not the same."""
    conflict = layout_conflict(one.layout, other.layout)
    if conflict is not None:
        return conflict
    if one.model != other.model:
        return f"{one.model} against {other.model}"
    return "other weights or another config.json"
