"""The compiled kernels, through ctypes: loading them, and their prototypes."""

from __future__ import annotations

import ctypes
import functools
import platform
from ctypes import POINTER, c_char_p, c_int, c_int64, c_uint64, c_void_p
from pathlib import Path

from services.decoder.ops.native.layout import HeadLayer, RecordedOp, SampleRow, Step

_PROTOTYPES: dict[str, tuple[type | None, list[type]]] = {
    "lh_source_hash": (c_char_p, []),
    "lh_context_new": (c_void_p, [c_char_p, c_int, c_int]),
    "lh_context_free": (None, [c_void_p]),
    "lh_context_isa": (c_char_p, [c_void_p]),
    "lh_forward": (c_int, [c_void_p, POINTER(Step), POINTER(RecordedOp), c_int64, c_int64]),
    "lh_hidden_rows": (c_int, [c_void_p, c_int64, c_void_p]),
    "lh_head_logits": (c_int, [c_void_p, POINTER(HeadLayer), c_void_p, c_int64, c_void_p]),
    "lh_sample": (c_int, [c_void_p, POINTER(SampleRow), c_int64, c_int64]),
    "lh_read": (c_uint64, [c_void_p, c_void_p, c_int64]),
    "lh_take_routing": (None, [c_void_p, POINTER(c_int64), POINTER(c_int64)]),
    "lh_commit": (None, [c_void_p, POINTER(Step)]),
}


def load(path: Path) -> ctypes.CDLL:
    """Loads a library of kernels; raises OSError when it is absent, broken, or of other sources than those beside it."""
    # Not at the top: this package would then have imported what `python -m` is about to run.
    from services.decoder.ops.native import build

    if not path.exists():
        raise OSError(
            "the C kernels are not compiled, for want of a C compiler at install time; install gcc and run "
            "python -m services.decoder.ops.native.build"
        )
    library = ctypes.CDLL(str(path))  # calls release the GIL
    for name, (result, arguments) in _PROTOTYPES.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise OSError(f"{path} has no {name}: run python -m services.decoder.ops.native.build") from error
        function.restype = result
        function.argtypes = arguments
    built_from: bytes = library.lh_source_hash()
    sources = build.source_hash()
    if sources and built_from.decode() != sources:
        raise OSError(f"{path} is older than its sources: run python -m services.decoder.ops.native.build")
    return library


@functools.cache
def kernels() -> ctypes.CDLL:
    """The library of this installation; raises OSError, with what to do about it."""
    if platform.system() != "Linux":
        raise OSError(f"the native kernels are for Linux CPUs, and this is {platform.system()}")
    from services.decoder.ops.native import build

    return load(build.LIBRARY)
