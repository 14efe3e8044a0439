"""`ucxx`'s binding of UCX, loaded without its complaint about a variable that it sets itself."""

import os
from typing import TYPE_CHECKING, Any

os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")  # UCX reads it when it is loaded

import ucxx._lib.libucxx as ucx
from ucxx._lib.arr import Array

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["as_array", "ucx"]


def as_array(memory: "memoryview | Tensor") -> Any:
    """Of memory on the host or a device. A tensor on CPU tells its address through numpy alone."""
    if not isinstance(memory, memoryview) and memory.is_cpu:
        return Array(memory.numpy())
    return Array(memory)
