"""Maps a checkpoint's pages before they are wanted, on a thread beside the engine.

A page that is in the page cache but not in this process's tables costs a fault at its first touch. At one token those of a new
process took longer than the step itself, step after step, until every expert had been called once.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from collections.abc import Iterable

import numpy as np
import structlog

_log = structlog.get_logger(__name__)

# <linux/mman.h>, since Linux 5.14. Not in Python's mmap module, whose madvise would hold the interpreter's lock besides.
_MADV_POPULATE_READ = 22
_PIECE_BYTES = 64 << 20


def map_pages(mappings: Iterable[mmap.mmap]) -> threading.Thread:
    """Starts to map all pages of some files, one after the other; what an older kernel does not map comes as it is touched."""
    thread = threading.Thread(target=_map_all, args=(list(mappings),), name="page-mapper", daemon=True)
    thread.start()
    return thread


def _map_all(mappings: list[mmap.mmap]) -> None:
    started = time.monotonic()
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    for mapping in mappings:
        view = np.frombuffer(mapping, np.uint8)
        for start in range(0, view.size, _PIECE_BYTES):
            piece = view[start : start + _PIECE_BYTES]
            if madvise(ctypes.c_void_p(piece.ctypes.data), ctypes.c_size_t(piece.size), _MADV_POPULATE_READ):
                _log.info("pages are mapped as they are touched", errno=ctypes.get_errno())
                return
    _log.info("all pages are mapped", after_s=round(time.monotonic() - started, 3))
