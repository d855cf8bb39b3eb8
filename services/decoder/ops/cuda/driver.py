"""What the backend needs of the CUDA driver beside MLX: pinned host memory, and how many multiprocessors there are.

Uses the driver library directly, through ctypes: it is there wherever MLX finds a GPU.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

_MULTIPROCESSORS = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
_MAX_SHARED_BYTES = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
_PORTABLE = 1  # CU_MEMHOSTALLOC_PORTABLE


class CudaDriverError(OSError):
    """The driver is missing or refused a call."""


class CudaDriver:
    """The primary context of one device, which MLX uses too, made current on the thread that makes this object."""

    def __init__(self, device: int = 0) -> None:
        try:
            self._lib = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise CudaDriverError(f"the CUDA driver cannot be loaded: {error}; use --backend mlx or native") from error
        self._call("cuInit", 0)
        handle = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(handle), device)
        self._device = handle.value
        context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
        self._call("cuCtxSetCurrent", context)

    @property
    def multiprocessors(self) -> int:
        """How many blocks of one a multiprocessor run at once."""
        return self._attribute(_MULTIPROCESSORS)

    @property
    def max_shared_bytes(self) -> int:
        """Shared memory that one block can have."""
        return self._attribute(_MAX_SHARED_BYTES)

    def pinned(self, words: int) -> tuple[int, npt.NDArray[np.int32]]:
        """Host memory that kernels read and write in place: its address, the same for both, and a view. Never freed."""
        pointer = ctypes.c_void_p()
        self._call("cuMemHostAlloc", ctypes.byref(pointer), ctypes.c_size_t(words * 4), _PORTABLE)
        address = pointer.value or 0
        view = np.ctypeslib.as_array((ctypes.c_int32 * words).from_address(address))
        view[:] = 0
        return address, view

    def copy_to_device(self, address: int, words: npt.NDArray[np.int32]) -> None:
        """Copies host memory to GPU memory; it is there when this returns."""
        source = ctypes.c_void_p(words.ctypes.data)
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), source, ctypes.c_size_t(words.nbytes))

    def _attribute(self, attribute: int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), attribute, self._device)
        return value.value

    def _call(self, name: str, *arguments: Any) -> None:
        result = getattr(self._lib, name)(*arguments)
        if result:
            text = ctypes.c_char_p()
            self._lib.cuGetErrorString(result, ctypes.byref(text))
            raise CudaDriverError(f"{name}: {(text.value or b'unknown error').decode()} ({result})")
