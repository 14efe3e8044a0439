"""Between KV slots and the wire: gather a range of tokens into a payload, scatter a payload back.

Wire order is layer → token → (K, V) → head → dim, so that a payload says nothing of its sender's
block size or block ids: both ends address slots through their own block tables, and different block
sizes, or a slice of the heads, need no further conversion.

Implementations of one signature: a Triton kernel for CUDA, runs of adjacent slots copied by
kv_copy.c for CPU (or by numpy, where that was not built), and plain torch as the reference. The CPU
path is single-threaded on purpose: it runs on a transfer thread beside the engine's compute
threads, and torch's own copies stall for milliseconds when their OpenMP team has to wait for a busy
core.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.types import KVRange

try:
    from baton.kernels import _kv_copy
except ImportError:  # no C compiler where this was installed
    _kv_copy = None  # type: ignore[assignment]

Wire = Tensor | bytes | bytearray | memoryview


def payload_bytes(kv_cache: Tensor, where: KVRange) -> int:
    """Size of the payload that holds `where` of this cache."""
    head_start, head_stop = _heads(kv_cache, where)
    head_bytes = kv_cache.shape[5] * kv_cache.element_size()
    return where.num_layers * where.num_tokens * 2 * (head_stop - head_start) * head_bytes


def pack_kv(kv_cache: Tensor, block_ids: Sequence[int], where: KVRange, out: Wire) -> None:
    """Gather the KV of `where` into `out`.

    Args:
        kv_cache: [num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim], contiguous.
        block_ids: blocks of the sequence; token t is in block_ids[t // block_size].
        where: layers, tokens and heads to take.
        out: [payload_bytes(kv_cache, where)] uint8, contiguous, on the cache's device; for a cache
            on CPU also a writable buffer of that many bytes.

    Raises:
        ValueError: a range, a block id or the size of `out` does not fit the cache.
    """
    _check(kv_cache, block_ids, where, out)
    if kv_cache.device.type == "cpu":
        _copy_on_cpu(kv_cache, block_ids, where, out, pack=True)
    else:
        from baton.kernels.kv_pack_triton import copy_kv_triton

        assert isinstance(out, Tensor)
        copy_kv_triton(kv_cache, block_ids, where, out, pack=True)


def unpack_kv(kv_cache: Tensor, block_ids: Sequence[int], where: KVRange, payload: Wire) -> None:
    """Scatter `payload` (as `pack_kv` made it) into the slots of `where`; arguments and errors are
    `pack_kv`'s, and on CPU a read-only buffer will do. Slots outside `where` keep their bytes."""
    _check(kv_cache, block_ids, where, payload)
    if kv_cache.device.type == "cpu":
        _copy_on_cpu(kv_cache, block_ids, where, payload, pack=False)
    else:
        from baton.kernels.kv_pack_triton import copy_kv_triton

        assert isinstance(payload, Tensor)
        copy_kv_triton(kv_cache, block_ids, where, payload, pack=False)


def pack_kv_torch(kv_cache: Tensor, block_ids: Sequence[int], where: KVRange, out: Tensor) -> None:
    """`pack_kv` in plain torch, on any device."""
    _check(kv_cache, block_ids, where, out)
    slots, wire = _slots_and_wire(kv_cache, block_ids, where, out)
    head_start, head_stop = _heads(kv_cache, where)
    layers = kv_cache.flatten(2, 3)[where.layer_start : where.layer_stop]
    wire.copy_(layers[:, :, slots, head_start:head_stop].transpose(1, 2))


def unpack_kv_torch(
    kv_cache: Tensor, block_ids: Sequence[int], where: KVRange, payload: Tensor
) -> None:
    """`unpack_kv` in plain torch, on any device."""
    _check(kv_cache, block_ids, where, payload)
    slots, wire = _slots_and_wire(kv_cache, block_ids, where, payload)
    head_start, head_stop = _heads(kv_cache, where)
    layers = kv_cache.flatten(2, 3)[where.layer_start : where.layer_stop]
    layers[:, :, slots, head_start:head_stop] = wire.transpose(1, 2)


def _heads(kv_cache: Tensor, where: KVRange) -> tuple[int, int]:
    if where.head_start == where.head_stop == 0:
        return 0, kv_cache.shape[4]
    return where.head_start, where.head_stop


def _check(kv_cache: Tensor, block_ids: Sequence[int], where: KVRange, wire: Wire) -> None:
    num_layers, _, num_blocks, block_size, num_kv_heads, _ = kv_cache.shape
    head_start, head_stop = _heads(kv_cache, where)
    if not 0 <= where.layer_start < where.layer_stop <= num_layers:
        raise ValueError(f"layers of {where} are not in 0..{num_layers}")
    if not 0 <= where.token_start < where.token_stop <= len(block_ids) * block_size:
        raise ValueError(f"tokens of {where} are not in {len(block_ids)} blocks of {block_size}")
    if not 0 <= head_start < head_stop <= num_kv_heads:
        raise ValueError(f"heads of {where} are not in 0..{num_kv_heads}")
    used = block_ids[where.token_start // block_size : -(-where.token_stop // block_size)]
    if min(used) < 0 or max(used) >= num_blocks:
        raise ValueError(f"a block id is not in 0..{num_blocks}")
    num_bytes = wire.numel() if isinstance(wire, Tensor) else len(wire)
    if num_bytes != payload_bytes(kv_cache, where):
        raise ValueError(f"{num_bytes} bytes for {where} of {tuple(kv_cache.shape)}")
    if isinstance(wire, Tensor) and not (wire.dtype is torch.uint8 and wire.is_contiguous()):
        raise ValueError("a payload tensor must be contiguous uint8")
    if not kv_cache.is_contiguous():
        raise ValueError("the cache must be contiguous")


def _slots_and_wire(
    kv_cache: Tensor, block_ids: Sequence[int], where: KVRange, wire: Tensor
) -> tuple[Tensor, Tensor]:
    """([num_tokens] int64 slots, `wire` as [layers, tokens, 2, heads, head_dim] of the cache's
    dtype)."""
    block_size, device = kv_cache.shape[3], kv_cache.device
    tokens = torch.arange(where.token_start, where.token_stop, device=device)
    blocks = torch.tensor(block_ids, dtype=torch.int64, device=device)
    slots = blocks[tokens // block_size] * block_size + tokens % block_size
    head_start, head_stop = _heads(kv_cache, where)
    shape = (where.num_layers, where.num_tokens, 2, head_stop - head_start, kv_cache.shape[5])
    return slots, wire.view(kv_cache.dtype).view(shape)


def _copy_on_cpu(
    kv_cache: Tensor, block_ids: Sequence[int], where: KVRange, wire: Wire, pack: bool
) -> None:
    if _kv_copy is None:
        copy_numpy(kv_cache, block_ids, where, wire, pack)
        return
    head_start, head_stop = _heads(kv_cache, where)
    head_bytes = kv_cache.shape[5] * kv_cache.element_size()
    _kv_copy.copy_runs(
        _bytes_of(kv_cache).data,
        _bytes_of(wire).data if isinstance(wire, Tensor) else wire,
        np.array(list(_runs(kv_cache, block_ids, where)), dtype=np.int64).data,
        kv_cache.shape[0],
        where.layer_start,
        where.num_layers,
        kv_cache.shape[4] * head_bytes,
        head_start * head_bytes,
        (head_stop - head_start) * head_bytes,
        pack,
    )


def copy_numpy(
    kv_cache: Tensor, block_ids: Sequence[int], where: KVRange, wire: Wire, pack: bool
) -> None:
    """Both directions on CPU, for arguments that `pack_kv` has checked. An item is all that one
    slot holds: numpy copies such items faster than an axis of bytes."""
    num_layers, _, num_blocks, block_size, num_kv_heads, head_dim = kv_cache.shape
    head_start, head_stop = _heads(kv_cache, where)
    head_bytes = head_dim * kv_cache.element_size()
    pool = _bytes_of(kv_cache)
    pool = pool.reshape(num_layers, 2, num_blocks * block_size, num_kv_heads * head_bytes)
    pool = pool[where.layer_start : where.layer_stop]
    pool = pool[..., head_start * head_bytes : head_stop * head_bytes]
    item = np.dtype((np.void, pool.shape[3]))
    slots = pool.view(item)[..., 0]
    flat = _bytes_of(wire) if isinstance(wire, Tensor) else np.frombuffer(wire, dtype=np.uint8)
    lines = flat.view(item).reshape(where.num_layers, where.num_tokens, 2).transpose(0, 2, 1)
    for slot, at, num_tokens in _runs(kv_cache, block_ids, where):
        in_pool = slots[:, :, slot : slot + num_tokens]
        on_wire = lines[:, :, at : at + num_tokens]
        if pack:
            on_wire[...] = in_pool
        else:
            in_pool[...] = on_wire


def _bytes_of(tensor: Tensor) -> npt.NDArray[np.uint8]:
    """The memory of a contiguous tensor on CPU."""
    return tensor.detach().view(torch.uint8).numpy()


def _runs(
    kv_cache: Tensor, block_ids: Sequence[int], where: KVRange
) -> Iterator[tuple[int, int, int]]:
    """Runs of adjacent slots: (first slot, its token counted from the range's first, length)."""
    start, stop = where.token_start, where.token_stop
    for token, slot, num_tokens in slot_runs(block_ids, kv_cache.shape[3], start, stop):
        yield slot, token - start, num_tokens


def slot_runs(
    block_ids: Sequence[int], block_size: int, token_start: int, token_stop: int
) -> Iterator[tuple[int, int, int]]:
    """Runs of adjacent slots that hold tokens [token_start, token_stop): (first token, first slot,
    length)."""
    token = token_start
    while token < token_stop:
        index = token // block_size
        slot = block_ids[index] * block_size + token % block_size
        last = index
        while (last + 1) * block_size < token_stop and block_ids[last + 1] == block_ids[last] + 1:
            last += 1
        stop = min((last + 1) * block_size, token_stop)
        yield token, slot, stop - token
        token = stop
