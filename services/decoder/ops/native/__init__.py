"""The `native` backend: C kernels for Linux CPUs, over the mapped checkpoint and the mapped pool."""

from __future__ import annotations

from services.decoder.ops.native.lib import kernels
from services.decoder.ops.native.ops import NativeOps

__all__ = ["NativeOps", "is_available", "make_ops", "why_unavailable"]


def why_unavailable() -> str:
    """Why the backend cannot be used here, and what to do about it; empty when it can."""
    try:
        kernels()
    except OSError as error:
        return str(error)
    return ""


def is_available() -> bool:
    """Whether the kernels are compiled and load."""
    return not why_unavailable()


def make_ops(threads: int | None = None, precision: str = "fast") -> NativeOps:
    """The backend; raises OSError when it is not available. threads None: the cores that this process may use."""
    return NativeOps(precision=precision, threads=threads)
