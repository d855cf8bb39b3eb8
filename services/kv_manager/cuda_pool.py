"""A pool in GPU memory: where its bytes are, how workers get at them, and the proof of a worker's death that it needs.

A file lock proves nothing here: a killed worker's lock can come free while a kernel of it still writes. Its pidfd becomes readable only
after the driver has let go of the GPU, so blocks are reassigned on that alone.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import structlog

from protos.pool_format import PAGE_BYTES, DataHeader
from protos.pool_handover import OK, REFUSED, SOCKET_NAME, WAIT, Answer, Ask, receive_ask, send_answer
from services.cuda_memory import CudaDevice, CudaError, SharedGpuMemory
from services.kv_manager.errors import PoolFileError, StartError, StorageFullError
from services.kv_manager.locks import LockProbe
from services.kv_manager.meta_format import RESET_HINT, WorkerRecord
from services.kv_manager.pool_file import DataFile
from services.kv_manager.sessions import LIVE, REVOKED, Session

_log = structlog.get_logger("kv_manager.cuda_pool")
_MEMORY_WAIT_S = 10.0


class GpuMemory(Protocol):
    """A range of GPU memory behind a descriptor: services.cuda_memory.SharedGpuMemory, or a stand-in of a test."""

    fd: int
    device_uuid: str

    def checksums(self, offsets: Sequence[int], num_bytes: int) -> list[int]:
        """CRC-32 of num_bytes bytes at each offset."""
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

    @property
    def is_absent(self) -> bool:
        """See DataFile."""
        return self.memory is None

    def adopt(self, fd: int) -> GpuMemory:
        """Maps the memory that a worker kept over a restart; the descriptor is this object's from now on."""
        try:
            self.memory = self._make_memory(self.num_bytes, fd)
        except BaseException:
            os.close(fd)
            raise
        self._arrived.set()
        return self.memory

    def ensure(self, blocks: Iterable[int]) -> None:
        """All of it is there from the start."""

    def checksum(self, block: int) -> int:
        """See DataFile. Waits for memory that is still with a worker: call it on a thread."""
        if not self._arrived.wait(_MEMORY_WAIT_S) or self.memory is None:
            raise PoolFileError(f"{self.path}: no worker has brought the GPU memory back yet")
        shape = self.header.shape
        [checksum] = self.memory.checksums([block * shape.stride_bytes], shape.block_bytes)
        return checksum

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
        """Takes the memory, and makes the file with the header page alone; raises StorageFullError when the GPU has no room."""
        num_bytes = header.num_blocks * header.shape.stride_bytes
        try:
            memory = self._make_memory(num_bytes, None)
        except CudaError as error:
            raise StorageFullError(
                f"the GPU has no {num_bytes} bytes for the pool ({error}): free some of its memory, or start the manager with a"
                " smaller --num-blocks or --pool-bytes",
                {"needed_bytes": str(num_bytes)},
                "gpu",
            ) from error
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
    """Tells whether a worker on a GPU may still write: by the pidfd that it handed over, or one of the process that its record names."""

    def __init__(self, pool_dir: Path, worker: WorkerRecord) -> None:
        super().__init__(pool_dir, worker.worker_id)
        self._pidfd, self._is_hidden = -1, False
        try:
            self._pidfd = _open_process(worker)
        except OSError:  # it can be neither seen nor ruled out
            self._is_hidden = True

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
        """Whether the process lives, or its lock is held, by a child of it perhaps."""
        return self.process_lives() or self.is_locked()

    def allows_successor(self) -> bool:
        """A new process with the same lock file proves nothing: the old one must be gone."""
        return not self.process_lives()

    def process_lives(self) -> bool:
        """False only when no kernel of the process can write any more."""
        if self._pidfd < 0:
            return self._is_hidden
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        # Readable once every thread is gone, and with the last of them the driver's files; a zombie's entry in /proc comes before.
        return not poll.poll(0)

    def close(self) -> None:
        """Closes both descriptors."""
        super().close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def pid_namespace() -> int:
    """The inode of this process's own, which no other has while it lives; 0 where there are none."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino & 0xFFFFFFFF
    except OSError:
        return 0


def start_time_ticks(pid: int) -> int | None:
    """When the process that has this pid started, in field 22 of its stat; None: no process has it."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the command's name in parentheses, which may hold spaces.
    return int(stat.rsplit(")", 1)[1].split()[19])


def _open_process(worker: WorkerRecord) -> int:
    """A pidfd of the worker's process, or -1 when no process has its pid and start time; raises OSError when that cannot be told."""
    if worker.pid_namespace not in (0, pid_namespace()):
        raise OSError(f"an earlier manager saw process {worker.pid} in another pid namespace")
    try:
        pidfd = os.pidfd_open(worker.pid)
    except OSError as error:
        if error.errno in (errno.ESRCH, errno.EINVAL):  # no process, or a number that none can have
            return -1
        raise
    try:
        # In this order: who has the pid after it was opened, and started when the worker did, is the worker.
        if start_time_ticks(worker.pid) == worker.process_start_time_ticks:
            return pidfd
    except BaseException:
        os.close(pidfd)
        raise
    os.close(pidfd)
    return -1


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
        """Listens; the caller holds the manager's lock, so an old socket file is nobody's. Raises StartError when it cannot."""
        self._path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._listener.bind(str(self._path))
        except OSError as error:
            self._listener.close()
            raise StartError(
                f"--pool-dir: no Unix socket can be made at {self._path} ({error}); use a shorter path, of a local file system"
            ) from error
        os.chmod(self._path, 0o600)
        self._listener.listen()
        self._listener.setblocking(False)
        asyncio.get_running_loop().add_reader(self._listener, self._accept, self._listener)

    def close(self) -> None:
        """Hangs up: workers see that the manager is gone. Once is enough."""
        loop = asyncio.get_running_loop()
        if self._listener is not None and self._listener.fileno() >= 0:
            loop.remove_reader(self._listener)
            self._listener.close()
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
            answer, memory_fd = self._decide(ask, fds, _peer_pid(connection))
            say = _log.debug if answer.status == WAIT else _log.info
            say("hand-over", worker=ask.worker_id, status=answer.status, reason=answer.reason)
            send_answer(connection, answer, [] if memory_fd is None else [memory_fd])
        except OSError as error:
            _log.error("hand-over failed", worker=ask.worker_id, error=str(error))
            self._hang_up(connection)
        finally:
            for fd in fds:
                os.close(fd)

    def _decide(self, ask: Ask, fds: list[int], peer_pid: int) -> tuple[Answer, int | None]:
        """The answer, and the memory's descriptor that goes with it. What is kept of `fds` is taken out of it."""
        session, data = self._find_session(ask.worker_id), self._find_data()
        if session is None or session.state not in (LIVE, REVOKED) or not isinstance(data, GpuDataFile):
            return Answer(WAIT, "not registered"), None
        probe = session.probe
        assert isinstance(probe, GpuProbe), "a pool on a GPU has no other probes"
        if data.header.pool_id.hex() != ask.pool_id:
            return Answer(WAIT, "it is another pool now"), None
        problem = _why_foreign(session.worker, fds, peer_pid)
        if problem:
            return Answer(REFUSED, problem), None
        memory = data.memory
        if memory is None and len(fds) < 2:
            return Answer(WAIT, "no worker has brought the GPU memory back yet"), None
        if memory is None:
            memory = data.adopt(fds.pop())
            _log.info("the GPU memory is back", worker=ask.worker_id, pool=ask.pool_id)
        probe.take_pidfd(fds.pop(0))
        return Answer(OK, device_uuid=memory.device_uuid), None if ask.has_memory else memory.fd


def _why_foreign(worker: WorkerRecord, fds: list[int], peer_pid: int) -> str:
    """Empty when the first descriptor is a pidfd of the worker that registered, and it is the worker who asks."""
    pid = _pid_of(fds[0]) if fds else None
    if pid is None:
        return "the first descriptor must be a pidfd of the worker"
    if pid == 0 or peer_pid == 0:
        return (
            "the worker's process is in a pid namespace that the manager cannot see, so that its death could not be proved after a"
            " restart; share one (docker: --pid, Compose: pid)"
        )
    if not pid == peer_pid == worker.pid or start_time_ticks(pid) != worker.process_start_time_ticks:
        return f"process {peer_pid} asks with a pidfd of {pid}, and {worker.pid} registered as {worker.worker_id}"
    return ""


def _pid_of(fd: int) -> int | None:
    """The pid of a pidfd as this process sees it, 0 when it cannot see it; None for any other descriptor."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines() if ":" in line
    )
    return int(fields["Pid"]) if "Pid" in fields else None


def _peer_pid(connection: socket.socket) -> int:
    """Who connected, 0 when this process cannot see it."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid: int = struct.unpack("3i", credentials)[0]
    return pid


def cuda_memory(device: int) -> MakeMemory:
    """Memory of a real GPU; raises services.cuda_memory.CudaError where there is none."""
    cuda = CudaDevice(device)
    return lambda num_bytes, fd: SharedGpuMemory(cuda, num_bytes, fd)
