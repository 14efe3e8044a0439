"""Huge pages for memory that a step streams through: on CPU fewer TLB misses are worth 15-30 % of
the bandwidth that decode lives on."""

import ctypes
import functools
import logging
import mmap
import sys
from collections.abc import Callable

log = logging.getLogger(__name__)

_MADV_HUGEPAGE = 14
_MADV_COLLAPSE = 25  # Linux 6.1: at once, for pages that exist already


def use_huge_pages(address: int, num_bytes: int) -> None:
    """Ask the kernel to back [address, address + num_bytes) with huge pages where it spans whole
    ones. It may refuse; nothing but speed depends on it."""
    madvise = _madvise()
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (address + num_bytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if madvise is None or length <= 0:
        return
    for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):
        if madvise(start, length, advice) != 0:
            log.debug("madvise(%d) of %d bytes: errno %d", advice, length, ctypes.get_errno())


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    function.restype = ctypes.c_int
    return function
