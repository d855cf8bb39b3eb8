"""What the backend needs of the CUDA driver beside MLX: host memory that kernels write, copies, and the size of the GPU."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

from services.cuda_memory import CudaDevice, CudaError

__all__ = ["CudaDriver", "CudaError"]

_MULTIPROCESSORS = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
_MAX_SHARED_BYTES = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_PORTABLE = 1  # CU_MEMHOSTALLOC_PORTABLE


class CudaDriver(CudaDevice):
    """A device as the kernels' host side uses it."""

    @property
    def multiprocessors(self) -> int:
        """How many blocks of one a multiprocessor run at once."""
        return self.attribute(_MULTIPROCESSORS)

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability, major and minor."""
        return self.attribute(_CAPABILITY_MAJOR), self.attribute(_CAPABILITY_MINOR)

    @property
    def max_shared_bytes(self) -> int:
        """Shared memory that one block can have."""
        return self.attribute(_MAX_SHARED_BYTES)

    def synchronize(self) -> None:
        """Waits for all work of this process on the device; other threads of Python run meanwhile."""
        self.call("cuCtxSynchronize")

    def pinned(self, words: int) -> tuple[int, npt.NDArray[np.int32]]:
        """Host memory that kernels write in place: its address, the same for both, and a view. Never freed."""
        pointer = ctypes.c_void_p()
        self.call("cuMemHostAlloc", ctypes.byref(pointer), ctypes.c_size_t(words * 4), _PORTABLE)
        address = pointer.value or 0
        view = np.ctypeslib.as_array((ctypes.c_int32 * words).from_address(address))
        view[:] = 0
        return address, view

    def copy_to_device(self, address: int, words: npt.NDArray[np.int32]) -> None:
        """Copies host memory to GPU memory; it is there when this returns."""
        source = ctypes.c_void_p(words.ctypes.data)
        self.call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), source, ctypes.c_size_t(words.nbytes))
