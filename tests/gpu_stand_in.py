"""Host memory in place of a GPU's: behind a descriptor, and alive as long as anybody has one or a mapping, like a CUDA handle's."""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from services.decoder.gpu_pool import ManagedGpuPool
from services.decoder.kv_view import rows_of


class StandIn:
    """What services.cuda_memory.SharedGpuMemory is on a GPU."""

    device_uuid = "stand-in"

    def __init__(self, num_bytes: int, fd: int | None = None) -> None:
        if fd is None:
            fd = os.memfd_create("stand-in")
            os.ftruncate(fd, num_bytes)
        self.map = mmap.mmap(fd, num_bytes)
        self.fd, self.address = fd, 0

    def read(self, offset: int, num_bytes: int) -> bytes:
        return self.map[offset : offset + num_bytes]

    def checksums(self, offsets: Sequence[int], num_bytes: int) -> list[int]:
        return [zlib.crc32(self.read(offset, num_bytes)) for offset in offsets]

    def copy_rows(self, source: int, target: int, row_bytes: int, pitch_bytes: int, num_rows: int) -> None:
        for row in range(num_rows):
            start, end = (at + row * pitch_bytes for at in (source, target))
            self.map[end : end + row_bytes] = self.map[start : start + row_bytes]

    def close(self) -> None:
        self.map.close()
        os.close(self.fd)


class StandInPool(ManagedGpuPool):
    """A worker's pool whose blocks a fake model can write, as kernels do."""

    def __init__(self, kv_path: Path, worker_id: str, kv_dtype: str, device_uuid: str = StandIn.device_uuid) -> None:
        super().__init__(kv_path, worker_id, kv_dtype, StandIn, device_uuid)

    def block_bytes(self, block_id: int) -> npt.NDArray[np.uint8]:
        memory: Any = self._memory
        # Not np.frombuffer, whose arrays keep the mapping from being closed.
        return np.ndarray((self.shape.block_bytes,), np.uint8, memory.map, block_id * self.shape.stride_bytes)

    def block(self, block_id: int) -> npt.NDArray[Any]:
        return rows_of(self.block_bytes(block_id), self.shape, self.kv_dtype)
