"""`ucxx`'s binding of UCX, loaded without its complaint about a variable that it sets itself."""

import os

os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")  # UCX reads it when it is loaded

import ucxx._lib.libucxx as ucx
from ucxx._lib.arr import Array

__all__ = ["Array", "ucx"]
