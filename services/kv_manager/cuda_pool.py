"""A pool in GPU memory: where its bytes are, how workers get at them, and the proof of a worker's death that it needs.

A file lock proves nothing here: a killed worker's lock can come free while a kernel of it still writes. Its pidfd becomes readable only
after the driver has let go of the GPU, so blocks are reassigned on that alone.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import threading
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import structlog

from protos.pool_format import PAGE_BYTES, DataHeader
from protos.pool_handover import OK, REFUSED, SOCKET_NAME, WAIT, Answer, Ask, receive_ask, send_answer
from services.kv_manager.errors import PoolFileError
from services.kv_manager.locks import LockProbe
from services.kv_manager.meta_format import RESET_HINT, WorkerRecord
from services.kv_manager.pool_file import DataFile
from services.kv_manager.sessions import Session

_log = structlog.get_logger("kv_manager.cuda_pool")
_MEMORY_WAIT_S = 10.0


class GpuMemory(Protocol):
    """A range of GPU memory behind a descriptor: services.cuda_memory.SharedGpuMemory, or a stand-in of a test."""

    fd: int

    def read(self, offset: int, num_bytes: int) -> bytes:
        """A copy on the host."""
        ...

    def close(self) -> None:
        """Lets go of it."""
        ...


MakeMemory = Callable[[int, int | None], GpuMemory]  # bytes, and a descriptor that another process kept


class GpuDataFile(DataFile):
    """The header page in a file, the blocks in GPU memory, which is absent after a restart until a worker brings it."""

    def __init__(self, path: Path, header: DataHeader, make_memory: MakeMemory, memory: GpuMemory | None) -> None:
        self.path = path
        self.header = header
        self._make_memory = make_memory
        self.memory = memory
        self._arrived = threading.Event()
        if memory is not None:
            self._arrived.set()

    @property
    def num_bytes(self) -> int:
        """Of all blocks."""
        return self.header.num_blocks * self.header.shape.stride_bytes

    def adopt(self, fd: int) -> None:
        """Maps the memory that a worker kept over a restart; the descriptor is this object's from now on."""
        self.memory = self._make_memory(self.num_bytes, fd)
        self._arrived.set()

    def ensure(self, blocks: Iterable[int]) -> None:
        """All of it is there from the start."""

    def checksum(self, block: int) -> int:
        """See DataFile. Waits for memory that is still with a worker: call it on a thread."""
        if not self._arrived.wait(_MEMORY_WAIT_S) or self.memory is None:
            raise PoolFileError(f"{self.path}: no worker has brought the GPU memory back yet")
        shape = self.header.shape
        return zlib.crc32(self.memory.read(block * shape.stride_bytes, shape.block_bytes))

    def close(self) -> None:
        """Lets go of the memory; workers keep theirs."""
        if self.memory is not None:
            self.memory.close()
            self.memory = None


class GpuStorage:
    """Makes and opens data files whose bytes are on a GPU: create_pool and find_pool take it in place of DataFile."""

    def __init__(self, make_memory: MakeMemory) -> None:
        self._make_memory = make_memory

    def create(self, path: Path, header: DataHeader) -> GpuDataFile:
        """Takes the memory, and makes the file with the header page alone."""
        memory = self._make_memory(header.num_blocks * header.shape.stride_bytes, None)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.pwrite(fd, header.pack(), 0)
                os.fsync(fd)
            finally:
                os.close(fd)
        except BaseException:
            memory.close()
            raise
        return GpuDataFile(path, header, self._make_memory, memory)

    def open(self, path: Path) -> GpuDataFile:
        """Opens one made before, without its memory; raises PoolFileError when it is not of this kind."""
        page = path.read_bytes() if path.stat().st_size == PAGE_BYTES else b""
        try:
            return GpuDataFile(path, DataHeader.unpack(page), self._make_memory, None)
        except ValueError as error:
            raise PoolFileError(
                f"{path} is no pool in GPU memory ({error}); start with --pool-memory host, or {RESET_HINT}"
            ) from error


class GpuProbe(LockProbe):
    """Tells whether a worker on a GPU may still write: by its pidfd, or, until it has handed one over, by its process."""

    def __init__(self, pool_dir: Path, worker: WorkerRecord) -> None:
        super().__init__(pool_dir, worker.worker_id)
        self._worker = worker
        self._pidfd = -1

    def take_pidfd(self, pidfd: int) -> None:
        """Owns the descriptor from now on."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
        self._pidfd = pidfd

    def take_over(self, old: LockProbe | None) -> None:
        """The same process has registered again: its pidfd stays the proof."""
        if isinstance(old, GpuProbe) and old._pidfd >= 0:
            self.take_pidfd(old._pidfd)
            old._pidfd = -1

    def is_held(self) -> bool:
        """Whether the lock is held or the process lives."""
        return super().is_held() or self.process_lives()

    def allows_successor(self) -> bool:
        """A new process with the same lock file proves nothing: the old one must be gone."""
        return not self.process_lives()

    def process_lives(self) -> bool:
        """False only when no kernel of the process can write any more."""
        if self._pidfd >= 0:
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            return not poll.poll(0)
        try:
            stat = Path(f"/proc/{self._worker.pid}/stat").read_text()
        except OSError:
            return False
        # Field 22; the second field is the command's name in parentheses, which may hold spaces. "Z": a process that is gone.
        fields = stat.rsplit(")", 1)[1].split()
        return fields[0] != "Z" and int(fields[19]) == self._worker.process_start_time_ticks

    def close(self) -> None:
        """Closes both descriptors."""
        super().close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


class HandOver:
    """The socket in the pool directory, on the manager's event loop."""

    def __init__(
        self, pool_dir: Path, find_session: Callable[[str], Session | None], find_data: Callable[[], DataFile | None]
    ) -> None:
        self._path = pool_dir / SOCKET_NAME
        self._find_session = find_session
        self._find_data = find_data
        self._listener: socket.socket | None = None
        self._connections: set[socket.socket] = set()

    def start(self) -> None:
        """Listens; the caller holds the manager's lock, so an old socket file is nobody's."""
        self._path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(self._path))
        os.chmod(self._path, 0o600)
        self._listener.listen()
        self._listener.setblocking(False)
        asyncio.get_running_loop().add_reader(self._listener, self._accept, self._listener)

    def close(self) -> None:
        """Hangs up: workers see that the manager is gone."""
        loop = asyncio.get_running_loop()
        if self._listener is not None:
            loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        for connection in list(self._connections):
            self._hang_up(connection)

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        connection.setblocking(False)
        self._connections.add(connection)
        asyncio.get_running_loop().add_reader(connection, self._on_message, connection)

    def _hang_up(self, connection: socket.socket) -> None:
        asyncio.get_running_loop().remove_reader(connection)
        self._connections.discard(connection)
        connection.close()

    def _on_message(self, connection: socket.socket) -> None:
        try:
            ask, fds = receive_ask(connection)
        except (OSError, ValueError):  # the end of a connection, mostly
            self._hang_up(connection)
            return
        try:
            answer, memory_fd = self._decide(ask, fds)
            _log.info("hand-over", worker=ask.worker_id, status=answer.status, reason=answer.reason)
            send_answer(connection, answer, [] if memory_fd is None else [memory_fd])
        except OSError as error:
            _log.error("hand-over failed", worker=ask.worker_id, error=str(error))
            self._hang_up(connection)
        finally:
            for fd in fds:
                os.close(fd)

    def _decide(self, ask: Ask, fds: list[int]) -> tuple[Answer, int | None]:
        """The answer, and the memory's descriptor that goes with it. What is kept of `fds` is taken out of it."""
        session, data = self._find_session(ask.worker_id), self._find_data()
        if session is None or not isinstance(data, GpuDataFile) or not isinstance(session.probe, GpuProbe):
            return Answer(WAIT, "not registered"), None
        if data.header.pool_id.hex() != ask.pool_id:
            return Answer(REFUSED, "another pool"), None
        if not fds or not _is_pidfd(fds[0]):
            return Answer(REFUSED, "the first descriptor must be a pidfd of the worker"), None
        if data.memory is None and len(fds) < 2:
            return Answer(WAIT, "no worker has brought the GPU memory back yet"), None
        session.probe.take_pidfd(fds.pop(0))
        if data.memory is None:
            data.adopt(fds.pop(0))
            return Answer(OK), None
        return Answer(OK), None if fds else data.memory.fd


def _is_pidfd(fd: int) -> bool:
    return "pidfd" in os.readlink(f"/proc/self/fd/{fd}")


def cuda_memory(device: int) -> MakeMemory:
    """Memory of a real GPU; raises services.cuda_memory.CudaError where there is none."""
    from services.cuda_memory import CudaDevice, SharedGpuMemory

    cuda = CudaDevice(device)
    return lambda num_bytes, fd: SharedGpuMemory(cuda, num_bytes, fd)
