"""What the manager's tests share: a clock they own, workers that hold real locks, and managers in real processes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import grpc
from google.rpc import status_pb2
from grpc_status import rpc_status

from protos import kv_manager_pb2 as pb
from protos import kv_manager_pb2_grpc as pb_grpc
from protos.pool_format import DATA_OFFSET_BYTES
from protos.rich_status import error_info
from services.healthcheck import is_serving
from services.kv_manager import translate
from services.kv_manager.config import Config
from services.kv_manager.leasebook import SealOrder
from services.kv_manager.lessor import Lessor
from services.kv_manager.locks import kernel_boot_id, prepare_pool_dir
from services.kv_manager.registration import Registered
from services.kv_manager.sessions import Lease, Session

ROOT = Path(__file__).resolve().parents[2]
FINGERPRINT = bytes(range(32))

_Answer = TypeVar("_Answer")


class FakeClock:
    """Monotonic seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def wait_until(predicate: Callable[[], bool], timeout_s: float = 60.0, what: str = "the condition") -> None:
    """Polls until predicate holds; raises AssertionError after timeout_s."""
    pause = threading.Event()
    deadline = time.monotonic() + timeout_s
    while not predicate():
        assert time.monotonic() < deadline, f"{what} did not come true within {timeout_s} s"
        pause.wait(0.01)


def chain_of(name: str, length: int) -> list[bytes]:
    """Content hashes of a chain of blocks."""
    return [hashlib.sha256(f"{name} {index}".encode()).digest() for index in range(length)]


def geometry(**changes: object) -> pb.Geometry:
    """A small geometry: one block of 16 tokens is one page."""
    group: dict[str, object] = {
        "layer_ids": [0, 1],
        "kind": pb.LAYER_KIND_FULL_ATTENTION,
        "num_kv_heads": 2,
        "head_dim": 8,
    }
    top: dict[str, object] = {
        "kv_dtype": pb.KV_DTYPE_F32,
        "layout": pb.KV_LAYOUT_HND,
        "model_fingerprint": FINGERPRINT,
    }
    for name, value in changes.items():
        (group if name in ("layer_ids", "kind", "num_kv_heads", "head_dim", "window_tokens") else top)[name] = value
    return pb.Geometry(layer_groups=[pb.LayerGroup(**group)], **top)  # type: ignore[arg-type]


@dataclass
class Worker:
    """A worker's side: a held lock file, a life, and what it needs to say to register."""

    pool_dir: Path
    worker_id: str = "w1"
    boot_id: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    max_seqs: int = 4
    kv_capacity_tokens: int = 256
    attempt: int = 0
    fd: int = -1

    def lock(self) -> Worker:
        """Takes the lock on the worker's file, made when missing."""
        path = self.pool_dir / "workers" / f"{self.worker_id}.lock"
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, self.boot_id.hex().encode(), 0)
        return self

    def die(self) -> None:
        """What the kernel does at the end of a process."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def reborn(self) -> Worker:
        """A new process with the same worker_id, after this one has died."""
        self.die()
        return Worker(
            self.pool_dir, self.worker_id, max_seqs=self.max_seqs, kv_capacity_tokens=self.kv_capacity_tokens
        ).lock()

    def request(
        self, mapped_pool_id: bytes = b"", claims: dict[int, list[int]] | None = None
    ) -> pb.RegisterWorkerRequest:
        """A registration of this worker, its next attempt."""
        self.attempt += 1
        stat = os.fstat(self.fd)
        return pb.RegisterWorkerRequest(
            worker_id=self.worker_id,
            boot_id=self.boot_id,
            geometry=geometry(),
            max_seqs=self.max_seqs,
            kv_capacity_tokens=self.kv_capacity_tokens,
            lock_device=stat.st_dev,
            lock_inode=stat.st_ino,
            pid=os.getpid(),
            kernel_boot_id=kernel_boot_id(),
            attempt=self.attempt,
            mapped_pool_id=mapped_pool_id,
            claims=[pb.Claim(cache_id=cache_id, block_ids=blocks) for cache_id, blocks in (claims or {}).items()],
        )


class Manager:
    """A lessor on a directory with a clock of the test, restartable; `crash` forgets all that is not in the files."""

    def __init__(self, pool_dir: Path, clock: FakeClock, **flags: object) -> None:
        self.pool_dir = prepare_pool_dir(pool_dir)
        self.clock = clock
        self.flags = flags
        self._seq = 0
        self.lessor = self._start()
        self._open_workers: list[Worker] = []

    def _start(self) -> Lessor:
        lessor = Lessor(Config(pool_dir=self.pool_dir, **self.flags), self.pool_dir, self.clock)  # type: ignore[arg-type]
        self._runs = True
        return lessor

    def stop(self) -> None:
        """The files stay as the last store left them."""
        if self._runs:
            self._runs = False
            self.lessor.close()

    def crash_and_restart(self) -> None:
        """A manager that knows only what is in the files."""
        self.stop()
        self.lessor = self._start()

    def worker(self, worker_id: str = "w1", **sizes: int) -> Worker:
        worker = Worker(self.pool_dir, worker_id, **sizes).lock()  # type: ignore[arg-type]
        self._open_workers.append(worker)
        return worker

    def register(self, worker: Worker, claims: dict[int, list[int]] | None = None) -> Registered:
        """Registers; with claims, as one whose mapping is of this pool."""
        mapped = b""
        if claims is not None:
            assert self.lessor.pool is not None
            mapped = self.lessor.pool.files.pool_id
        return self.lessor.register(translate.registration(worker.request(mapped, claims)))

    def join(self, worker_id: str = "w1", **sizes: int) -> Session:
        """The session of a new worker."""
        return self.register(self.worker(worker_id, **sizes)).session

    def acquire(self, session: Session, cache_id: int, num_blocks: int, **options: object) -> Lease:
        return self.lessor.book.acquire(session, cache_id, num_blocks, **options)  # type: ignore[arg-type]

    def release(self, session: Session, cache_id: int) -> int:
        self._seq += 1
        return self.lessor.book.release(session, [cache_id], self._seq)

    def write(self, block: int, fill: int) -> int:
        """Writes a block's bytes as a worker would, through the data file; answers their CRC-32."""
        assert self.lessor.pool is not None
        files = self.lessor.pool.files
        shape = files.data.header.shape
        data = bytes([fill % 256]) * shape.block_bytes
        with files.data.path.open("r+b") as file:
            file.seek(DATA_OFFSET_BYTES + block * shape.stride_bytes)
            file.write(data)
        return zlib.crc32(data)

    def seal(self, session: Session, cache_id: int, index: int, chain: list[bytes]) -> int:
        """Writes and seals the block at this place of the lease's table, its content's hash being chain[index]."""
        block = session.leases[cache_id].blocks[index]
        checksum = self.write(block, chain[index][0])
        order = SealOrder(
            cache_id, index, block, chain[index], chain[index - 1] if index else bytes(32), self.block_size, checksum
        )
        return self.lessor.book.seal(session, order)

    def seal_all(self, session: Session, cache_id: int, chain: list[bytes]) -> list[int]:
        """Seals the front of a lease's table; answers the blocks that its table names then."""
        return [self.seal(session, cache_id, index, chain) for index in range(len(chain))]

    @property
    def block_size(self) -> int:
        return self.lessor.config.block_size

    def revoked(self, session: Session, busy_ms: int | None = None) -> list[int]:
        """What a keepalive of the session is answered."""
        return self.lessor.revoked_cache_ids(self.lessor.keepalive(session.worker.worker_id, session.epoch, busy_ms))

    def pass_time(self, seconds: float) -> None:
        """Lets time pass in ticks, as the manager's own loop does."""
        end = self.clock.now + seconds
        while self.clock.now < end:
            self.clock.advance(min(0.2, end - self.clock.now))
            self.lessor.tick()

    def check(self) -> None:
        self.lessor.check()

    def close(self) -> None:
        self.stop()
        for worker in self._open_workers:
            worker.die()


class ManagerProcess:
    """`python -m services.kv_manager` in a process of its own, on a socket that it keeps over restarts.

    A file: a port that is free now is another process's in the next moment, or while the manager is down.
    """

    def __init__(self, pool_dir: Path, *flags: str) -> None:
        self.pool_dir = pool_dir
        self.flags = flags
        self._directory = tempfile.TemporaryDirectory(prefix="manager-")  # sockets' paths have a limit
        self.address = f"unix:{self._directory.name}/socket"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> ManagerProcess:
        """Starts it and waits until it serves; raises AssertionError when it ends before."""
        process = spawn("--listen", self.address, "--pool-dir", str(self.pool_dir), *self.flags)
        self.process = process

        def serves() -> bool:
            assert process.poll() is None, f"the manager ended with {process.returncode}"
            # Asked again when it fails: channels of one address share a connection, and a call that is made before
            # gRPC has seen the last manager's end is lost with it.
            return is_serving(self.address, "leasehold.v1.KVManager", 5.0)

        wait_until(serves, what="the manager serving")
        return self

    def send(self, number: signal.Signals) -> int:
        """Sends a signal and waits for the end; answers the exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        status = self.process.wait(60)
        self._close_pipes()
        return status

    def kill(self) -> None:
        """kill -9, if it still runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(30)
        self._close_pipes()

    def close(self) -> None:
        """kill -9 for good."""
        self.kill()
        self._directory.cleanup()

    def _close_pipes(self) -> None:
        if self.process is not None and self.process.stderr is not None:
            self.process.stderr.close()

    @contextlib.contextmanager
    def stub(self) -> Iterator[pb_grpc.KVManagerStub]:
        with grpc.insecure_channel(self.address) as channel:
            yield pb_grpc.KVManagerStub(channel)


def spawn(*flags: str, stderr: int | None = None) -> subprocess.Popen[bytes]:
    """A manager process with these flags, as they are."""
    return subprocess.Popen([sys.executable, "-m", "services.kv_manager", *flags], cwd=ROOT, stderr=stderr)


def run_manager(*flags: str) -> tuple[int, str]:
    """Exit status and stderr of a manager that is expected to end by itself."""
    process = spawn(*flags, stderr=subprocess.PIPE)
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr.decode()


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def while_live(stub: pb_grpc.KVManagerStub, worker_id: str, epoch: int, call: Callable[[], _Answer]) -> _Answer:
    """What a call answers that the manager serves live sessions only.

    With a short TTL a busy machine keeps a worker silent for too long. As long as it has no lease, a word makes it live again.
    """
    while True:
        try:
            return call()
        except grpc.RpcError as error:
            if error_info(rich_status_of(error)).reason != "SESSION_REVOKED":
                raise
        next(stub.KeepAlive(iter([pb.KeepAliveRequest(worker_id=worker_id, epoch=epoch)]), timeout=10))


def rich_status_of(error: grpc.RpcError) -> status_pb2.Status:
    """The google.rpc.Status of a failed call."""
    status = rpc_status.from_call(error)
    assert status is not None
    return status
