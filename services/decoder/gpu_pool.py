"""A pool in GPU memory, as the decoder's kernels see it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from protos.pool_format import BlockShape


class GpuPool:
    """Blocks in GPU memory that other code owns: only kernels read or write them, so the host's views are refused."""

    def __init__(self, device_address: int, num_blocks: int, shape: BlockShape, kv_dtype: str) -> None:
        self.device_address = device_address
        self.num_blocks = num_blocks
        self.shape = shape
        self.kv_dtype = kv_dtype

    def block(self, block_id: int) -> npt.NDArray[Any]:
        """Refused: see the class."""
        raise NotImplementedError("a pool in GPU memory has no view on the host")

    def gather(self, block_ids: npt.NDArray[np.int32], layer: int, num_tokens: int | None = None) -> npt.NDArray[Any]:
        """Refused: see the class."""
        raise NotImplementedError("a pool in GPU memory is read by kernels only")

    def addresses(self, block_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.uint64]:
        """The address of each block in GPU memory."""
        return np.uint64(self.device_address) + block_ids.astype(np.uint64) * np.uint64(self.shape.stride_bytes)
