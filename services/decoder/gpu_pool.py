"""A pool in GPU memory, as the decoder maps it: the manager hands it over, and gets it back from here after a restart."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import structlog

from protos.pool_format import PAGE_BYTES, BlockShape, DataHeader
from protos.pool_handover import OK, REFUSED, SOCKET_NAME, Answer, Ask, receive_answer, send_ask
from services.decoder.kv_view import check_elements, rows_of, scales_of

_log = structlog.get_logger(__name__)
_FIRST_WAIT_S = 2.0  # no keepalive is sent meanwhile
_RETRY_S = 0.05
_ANSWER_WAIT_S = 5.0


class PoolAwayError(OSError):
    """The memory cannot be had now: its manager, or the worker that keeps it, is not back yet, or there is another pool by now."""


class MappedMemory(Protocol):
    """GPU memory of this process: services.cuda_memory.SharedGpuMemory, or a stand-in of a test."""

    fd: int
    address: int

    def read(self, offset: int, num_bytes: int) -> bytes:
        """A copy on the host."""
        ...

    def checksums(self, offsets: Sequence[int], num_bytes: int) -> list[int]:
        """CRC-32 of num_bytes bytes at each offset."""
        ...

    def copy_rows(self, source: int, target: int, row_bytes: int, pitch_bytes: int, num_rows: int) -> None:
        """Copies num_rows rows, pitch_bytes apart, from one offset to another."""
        ...

    def close(self) -> None:
        """Unmaps it."""
        ...


class GpuPool:
    """Blocks in GPU memory: only kernels read or write them in place, so the host gets copies, which it cannot write."""

    def __init__(
        self,
        device_address: int,
        num_blocks: int,
        shape: BlockShape,
        kv_dtype: str,
        read: Callable[[int, int], bytes] | None = None,
    ) -> None:
        self.device_address = device_address
        self.num_blocks = num_blocks
        self.shape = shape
        self.kv_dtype = kv_dtype
        self._read = read

    def block(self, block_id: int) -> npt.NDArray[Any]:
        """A read-only copy of a block's elements on the host."""
        return rows_of(self.block_bytes(block_id), self.shape, self.kv_dtype)

    def scales(self, block_id: int) -> npt.NDArray[np.float32]:
        """A read-only copy of an int8 block's scales on the host."""
        return scales_of(self.block_bytes(block_id), self.shape)

    def block_bytes(self, block_id: int) -> npt.NDArray[np.uint8]:
        """A read-only copy of a block on the host."""
        if self._read is None:
            raise NotImplementedError("a pool in GPU memory has no view on the host")
        return np.frombuffer(self._read(block_id * self.shape.stride_bytes, self.shape.block_bytes), np.uint8)

    def gather(self, block_ids: npt.NDArray[np.int32], layer: int, num_tokens: int | None = None) -> npt.NDArray[Any]:
        """Refused: see the class."""
        raise NotImplementedError("a pool in GPU memory is read by kernels only")

    def addresses(self, block_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.uint64]:
        """The address of each block in GPU memory."""
        return np.uint64(self.device_address) + block_ids.astype(np.uint64) * np.uint64(self.shape.stride_bytes)


class ManagedGpuPool(GpuPool):
    """The manager's pool. A thread keeps the connection, and hands the memory back to a manager that has started again."""

    def __init__(
        self,
        kv_path: Path,
        worker_id: str,
        kv_dtype: str,
        import_memory: Callable[[int, int], MappedMemory],
        device_uuid: str = "",
    ) -> None:
        """Maps it; raises PoolAwayError when it cannot be had yet, ValueError or OSError when it never can.

        `import_memory(num_bytes, fd)` owns the descriptor that it is given. `device_uuid` is of the GPU that it maps to.
        """
        try:
            with kv_path.open("rb") as file:
                header = DataHeader.unpack(file.read(PAGE_BYTES))
        except FileNotFoundError as error:
            raise PoolAwayError(f"{kv_path} is gone: the manager has another pool by now") from error
        check_elements(kv_path, header.shape, kv_dtype)
        self._kv_path = kv_path
        self._ask = Ask(worker_id, header.pool_id.hex())
        self._closing = threading.Event()
        self._pidfd = os.pidfd_open(os.getpid())
        # Held while the device reads the memory for somebody else than the engine, so that it is not unmapped under that.
        self._use = threading.Lock()
        try:
            self._connection, answer, fd = self._connect(None, time.monotonic() + _FIRST_WAIT_S)
            self._memory = self._import(header, answer, fd, import_memory, device_uuid)
        except BaseException:
            os.close(self._pidfd)
            raise
        super().__init__(self._memory.address, header.num_blocks, header.shape, kv_dtype, self._memory.read)
        self._keeper = threading.Thread(target=self._keep, name="gpu-pool", daemon=True)
        self._keeper.start()

    def _import(
        self,
        header: DataHeader,
        answer: Answer,
        fd: int | None,
        import_memory: Callable[[int, int], MappedMemory],
        device_uuid: str,
    ) -> MappedMemory:
        try:
            if fd is None:
                raise ValueError(f"{self._kv_path.parent / SOCKET_NAME}: the manager sent no memory")
            if answer.device_uuid != device_uuid:
                raise ValueError(
                    f"the pool is on GPU {answer.device_uuid}, and this process uses {device_uuid}; choose the same one with"
                    " CUDA_VISIBLE_DEVICES here, or with the manager's --device"
                )
            return import_memory(header.num_blocks * header.shape.stride_bytes, fd)
        except BaseException:
            self._connection.close()
            if fd is not None:
                os.close(fd)
            raise

    @property
    def pool_id(self) -> bytes:
        """As the header page says now; raises OSError when the file is gone."""
        with self._kv_path.open("rb") as file:
            return DataHeader.unpack(file.read(PAGE_BYTES)).pool_id

    def checksums(self, block_ids: Sequence[int]) -> list[int]:
        """See DeviceBlocks."""
        with self._use:
            if self._closing.is_set() or not all(0 <= block_id < self.num_blocks for block_id in block_ids):
                raise IndexError(f"blocks {list(block_ids)} are not all in this pool, or it is closed")
            offsets = [block_id * self.shape.stride_bytes for block_id in block_ids]
            return self._memory.checksums(offsets, self.shape.block_bytes)

    def copy_tokens(self, source: int, target: int, first: int, end: int) -> None:
        """See DeviceBlocks."""
        shape = self.shape
        side_by_side = (
            shape.num_kv_heads if shape.layout == "nhd" else 1
        )  # rows of one token that lie next to each other
        runs = shape.num_rows // (shape.block_size * side_by_side)
        for offset, row_bytes in ((0, shape.scale_bytes), (shape.rows_offset_bytes, shape.row_bytes)):
            unit = row_bytes * side_by_side
            if unit:
                start = offset + first * unit
                start_from, start_to = source * shape.stride_bytes + start, target * shape.stride_bytes + start
                self._memory.copy_rows(start_from, start_to, (end - first) * unit, shape.block_size * unit, runs)

    def close(self) -> None:
        """Unmaps it and hangs up. Nothing of this process may touch a block any more."""
        self._closing.set()
        with suppress(OSError):  # the manager may have hung up first
            self._connection.shutdown(socket.SHUT_RDWR)
        self._keeper.join()
        self._connection.close()
        with self._use:
            self._memory.close()
        os.close(self._pidfd)

    def _connect(self, memory_fd: int | None, deadline: float | None) -> tuple[socket.socket, Answer, int | None]:
        """A connection on which the manager said OK, and the memory's descriptor when it sent one."""
        fds = [self._pidfd] if memory_fd is None else [self._pidfd, memory_fd]
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            connection.settimeout(_ANSWER_WAIT_S)
            try:
                connection.connect(str(self._kv_path.parent / SOCKET_NAME))
                send_ask(connection, self._ask, fds)
                answer, received = receive_answer(connection)
                if answer.status == OK:
                    connection.settimeout(None)
                    return connection, answer, received[0] if received else None
                reason = answer.reason
                if answer.status == REFUSED:
                    raise ValueError(f"the manager refuses the GPU memory of {self._kv_path}: {reason}")
            except OSError as error:
                reason = str(error)
            except BaseException:
                connection.close()
                raise
            connection.close()
            if self._closing.wait(_RETRY_S) or (deadline is not None and time.monotonic() > deadline):
                raise PoolAwayError(f"no GPU memory from {self._kv_path.parent / SOCKET_NAME}: {reason}")

    def _keep(self) -> None:
        """Waits for the manager to go, and brings the memory to the next one."""
        while not self._closing.is_set():
            try:
                gone = not self._connection.recv(1)
            except OSError:
                gone = True
            if self._closing.is_set() or not gone:
                continue
            self._connection.close()
            try:
                self._connection, _, _ = self._connect(self._memory.fd, None)
                _log.info("gpu_memory_handed_back", pool=self._ask.pool_id)
            except (OSError, ValueError) as error:
                if not self._closing.is_set():
                    _log.error("gpu_memory_not_handed_back", error=str(error))
                return


def map_gpu_pool(kv_path: Path, worker_id: str, kv_dtype: str) -> ManagedGpuPool:
    """The manager's pool, mapped on the first GPU that this process sees."""
    from services.cuda_memory import CudaDevice, SharedGpuMemory

    device = CudaDevice()
    return ManagedGpuPool(
        kv_path, worker_id, kv_dtype, lambda num_bytes, fd: SharedGpuMemory(device, num_bytes, fd), device.uuid
    )


def is_gpu_pool(kv_path: Path) -> bool:
    """Whether a data file is a header page alone: its bytes are in GPU memory then."""
    return kv_path.stat().st_size == PAGE_BYTES
