"""A pool in GPU memory without a GPU: a memfd stands in for the memory, everything else is real."""

from __future__ import annotations

import asyncio
import mmap
import os
import signal
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from protos.pool_format import PAGE_BYTES, BlockShape, DataHeader
from services.decoder.gpu_pool import ManagedGpuPool, is_gpu_pool
from services.kv_manager.cuda_pool import GpuDataFile, GpuProbe, GpuStorage, HandOver
from services.kv_manager.errors import PoolFileError
from services.kv_manager.locks import prepare_pool_dir
from services.kv_manager.meta_format import WorkerRecord
from services.kv_manager.pool_file import DataFile

HEADER = DataHeader(bytes(range(16)), 8, BlockShape(2, 2, 16, 8, 2))


class StandIn:
    """Memory behind a descriptor that survives its maker, like a CUDA handle's."""

    def __init__(self, num_bytes: int, fd: int | None = None) -> None:
        if fd is None:
            fd = os.memfd_create("stand-in")
            os.ftruncate(fd, num_bytes)
        self.fd, self.address = fd, 0
        self.map = mmap.mmap(fd, num_bytes)

    def read(self, offset: int, num_bytes: int) -> bytes:
        return self.map[offset : offset + num_bytes]

    def close(self) -> None:
        self.map.close()
        os.close(self.fd)


def record(pid: int, start_ticks: int | None = None) -> WorkerRecord:
    if start_ticks is None:
        start_ticks = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
    return WorkerRecord("w1", bytes(16), 0, 0, pid, start_ticks, "", 1, 1, 256, 4)


@pytest.fixture
def pool_dir(tmp_path: Path) -> Path:
    directory = prepare_pool_dir(tmp_path / "pool")
    (directory / "workers" / "w1.lock").touch()
    return directory


class ManagerSide:
    """What the hand-over needs of a manager: one session and one data file."""

    def __init__(self, pool_dir: Path, data: GpuDataFile, worker: WorkerRecord) -> None:
        self.data = data
        self.session: Any = SimpleNamespace(probe=GpuProbe(pool_dir, worker))
        self.is_registered = True
        self.hand_over = HandOver(pool_dir, lambda _: self.session if self.is_registered else None, lambda: data)


async def map_pool(path: Path) -> ManagedGpuPool:
    return await asyncio.to_thread(ManagedGpuPool, path, "w1", "bf16", StandIn)


async def test_a_worker_gets_the_memory_and_both_see_each_others_stores(pool_dir: Path) -> None:
    path = pool_dir / "x.kv"
    data = GpuStorage(StandIn).create(path, HEADER)
    side = ManagerSide(pool_dir, data, record(os.getpid()))
    side.hand_over.start()
    try:
        assert is_gpu_pool(path)
        pool = await map_pool(path)
        assert pool.pool_id == HEADER.pool_id
        stand_in: Any = pool._memory
        stride = HEADER.shape.stride_bytes
        stand_in.map[3 * stride : 3 * stride + 5] = b"hello"
        assert data.checksum(3) == zlib.crc32(np.ascontiguousarray(pool.block(3)))
        assert data.checksum(3) != data.checksum(2)
        with pytest.raises(ValueError, match="read-only"):
            pool.block(3)[:] = 0
        pool.close()
    finally:
        side.hand_over.close()
        data.close()


async def test_the_memory_outlives_the_manager_because_workers_hand_it_back(pool_dir: Path) -> None:
    path = pool_dir / "x.kv"
    storage = GpuStorage(StandIn)
    first = ManagerSide(pool_dir, storage.create(path, HEADER), record(os.getpid()))
    first.hand_over.start()
    pool = await map_pool(path)
    stand_in: Any = pool._memory
    stand_in.map[:4] = b"kept"
    first.hand_over.close()
    first.data.close()

    second = ManagerSide(pool_dir, storage.open(path), record(os.getpid()))
    second.is_registered = False  # the worker asks again until it has registered
    assert second.data.memory is None
    second.hand_over.start()
    try:
        await asyncio.sleep(0.2)
        assert second.data.memory is None
        second.is_registered = True
        checksum = await asyncio.to_thread(second.data.checksum, 0)  # waits for the memory
        assert checksum == zlib.crc32(np.ascontiguousarray(pool.block(0)))
        assert second.data.memory is not None
        assert second.data.memory.read(0, 4) == b"kept"
    finally:
        pool.close()
        second.hand_over.close()
        second.data.close()


async def test_strangers_get_nothing(pool_dir: Path) -> None:
    path = pool_dir / "x.kv"
    data = GpuStorage(StandIn).create(path, HEADER)
    other = ManagerSide(
        pool_dir, GpuDataFile(path, replace(HEADER, pool_id=bytes(16)), StandIn, data.memory), record(os.getpid())
    )
    other.hand_over.start()
    try:
        with pytest.raises(ValueError, match="another pool"):
            await map_pool(path)
    finally:
        other.hand_over.close()
        data.close()


def test_a_free_lock_is_no_proof_of_death_but_a_pidfd_is(pool_dir: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        probe = GpuProbe(pool_dir, record(child.pid))
        assert probe.is_held()  # nobody holds the lock, and the process is there
        assert not probe.allows_successor()
        probe.take_pidfd(os.pidfd_open(child.pid))
        assert probe.is_held()
        again = GpuProbe(pool_dir, record(child.pid))
        again.take_over(probe)
        probe.close()
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert not again.is_held()
        assert again.allows_successor()
        again.close()
    finally:
        child.kill()
        child.wait()


def test_after_a_restart_the_process_itself_must_be_gone(pool_dir: Path) -> None:
    ours = record(os.getpid())
    living, reused = GpuProbe(pool_dir, ours), GpuProbe(pool_dir, replace(ours, process_start_time_ticks=1))
    assert living.is_held()
    assert not reused.is_held()  # the pid is somebody else's by now
    living.close()
    reused.close()


def test_a_file_of_the_other_kind_is_refused(pool_dir: Path) -> None:
    path = pool_dir / "x.kv"
    DataFile.create(path, HEADER).close()
    assert not is_gpu_pool(path)
    with pytest.raises(PoolFileError, match="--pool-memory host"):
        GpuStorage(StandIn).open(path)
    path.unlink()
    GpuStorage(StandIn).create(path, HEADER).close()
    assert path.stat().st_size == PAGE_BYTES
    with pytest.raises(PoolFileError, match="truncated"):
        DataFile.open(path)
