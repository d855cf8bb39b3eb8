"""Matrix products on the host whose bits, for a row, do not depend on the other rows.

Measured on 2 cores of an AMD EPYC, float32, 32 rows by [512, 256]: MLX 0.32's CPU wheel (reference BLAS) takes 5.9 ms, one
OpenBLAS matrix-vector product for each row 0.26 ms, one OpenBLAS matrix product 0.1 ms. The last is out: its kernels depend on
the number of rows and on a row's place among them, and its bits with them. A matrix-vector product of fixed shape has no such
choice, as long as it runs on one thread.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

# Weights pass through the second-level cache once for all rows, in chunks of this many bytes; the chunks' sizes are
# part of the numerics, because a kernel's remainder loop may round otherwise.
CHUNK_BYTES = 1 << 18
_CHUNK_MULTIPLE = 16


def chunk_rows(out_features: int, in_features: int) -> int:
    """How many output features one matrix-vector product computes at most; a function of the matrix alone."""
    rows = CHUNK_BYTES // (4 * in_features) // _CHUNK_MULTIPLE * _CHUNK_MULTIPLE
    return min(out_features, max(rows, _CHUNK_MULTIPLE))


def rows_by_matrix(rows: FloatArray, matrix: FloatArray, out: FloatArray) -> None:
    """out [T, out_features] = rows [T, in_features] @ matrix [out_features, in_features].T, row by row."""
    np.matmul(rows[:, None, :], matrix.T, out=out[:, None, :])


@functools.cache
def blas_name() -> str:
    """Names the BLAS that NumPy calls, and keeps it on one thread: its own would split sums by their number."""
    for path in sorted(Path(np.__file__).parent.with_name("numpy.libs").glob("libscipy_openblas*")):
        library = ctypes.CDLL(str(path))  # loaded already, by NumPy: this is the same instance
        library.scipy_openblas_set_num_threads64_(1)
        core: Any = library.scipy_openblas_get_corename64_
        core.restype = ctypes.c_char_p
        return f"openblas-{_blas('version')}-{core().decode()}"
    return f"{_blas('name')}-{_blas('version')}"


def numpy_name() -> str:
    """Names NumPy's version and the widest instructions it found: its exp rounds by both."""
    found = _config()["SIMD Extensions"].get("found") or ["baseline"]
    return f"numpy-{np.__version__}-{found[-1]}"


def _blas(key: str) -> str:
    return str(_config()["Build Dependencies"]["blas"].get(key, "unknown"))


def _config() -> Any:
    return np.show_config(mode="dicts")
