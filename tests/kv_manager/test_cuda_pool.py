"""A pool in GPU memory without a GPU: a memfd stands in for the memory, everything else is real."""

from __future__ import annotations

import asyncio
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
from services.cuda_memory import CudaError
from services.decoder.gpu_pool import ManagedGpuPool, PoolAwayError, is_gpu_pool
from services.decoder.kv_view import copy_tokens
from services.kv_manager.cuda_pool import GpuDataFile, GpuProbe, GpuStorage, HandOver
from services.kv_manager.errors import PoolFileError, StorageFullError
from services.kv_manager.locks import prepare_pool_dir
from services.kv_manager.meta_format import WorkerRecord
from services.kv_manager.pool_file import DataFile
from services.kv_manager.sessions import LIVE
from tests.gpu_stand_in import StandIn

HEADER = DataHeader(bytes(range(16)), 8, BlockShape(2, 2, 16, 8, 2))


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
        self.session: Any = SimpleNamespace(probe=GpuProbe(pool_dir, worker), worker=worker, state=LIVE)
        self.is_registered = True
        self.hand_over = HandOver(pool_dir, lambda _: self.session if self.is_registered else None, lambda: data)


async def map_pool(path: Path) -> ManagedGpuPool:
    return await asyncio.to_thread(ManagedGpuPool, path, "w1", "bf16", StandIn, StandIn.device_uuid)


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
        with pytest.raises(PoolAwayError, match="another pool"):
            await map_pool(path)
    finally:
        other.hand_over.close()
        data.close()


def test_a_free_lock_is_no_proof_of_death_but_a_pidfd_is(pool_dir: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        probe = GpuProbe(pool_dir, record(child.pid))
        assert not probe.is_locked()
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
    elsewhere = GpuProbe(pool_dir, replace(ours, pid=1 << 22, pid_namespace=1))
    assert living.is_held()
    assert not reused.is_held()  # the pid is somebody else's by now
    assert elsewhere.is_held()  # a number in another pid namespace says nothing
    for probe in (living, reused, elsewhere):
        probe.close()


def test_a_file_of_the_other_kind_is_refused(pool_dir: Path) -> None:
    path = pool_dir / "x.kv"
    DataFile.create(path, HEADER).close()
    assert not is_gpu_pool(path)
    with pytest.raises(PoolFileError, match="--pool-memory host"):
        GpuStorage(StandIn).open(path)
    path.unlink()
    GpuStorage(StandIn).create(path, HEADER).close()
    assert path.stat().st_size == PAGE_BYTES
    with pytest.raises(PoolFileError, match="start with --pool-memory cuda"):
        DataFile.open(path)


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8"])
@pytest.mark.parametrize("layout", ["hnd", "nhd"])
async def test_a_forks_partial_block_is_copied_where_it_is(pool_dir: Path, kv_dtype: str, layout: str) -> None:
    path = pool_dir / "x.kv"
    header = replace(HEADER, shape=BlockShape.of(kv_dtype, layout, 2, 2, 16, 8))
    data = GpuStorage(StandIn).create(path, header)
    side = ManagerSide(pool_dir, data, record(os.getpid()))
    side.hand_over.start()
    pool = await asyncio.to_thread(ManagedGpuPool, path, "w1", kv_dtype, StandIn, StandIn.device_uuid)
    try:
        stand_in: Any = pool._memory
        stand_in.map[:] = np.random.default_rng(0).bytes(len(stand_in.map))
        before = [pool.block(block).copy() for block in range(8)]
        pool_scales = [pool.scales(block).copy() for block in range(8)] if kv_dtype == "int8" else []
        copy_tokens(pool, np.array([0, 5], np.int32), np.array([0, 2], np.int32), 19, 29)
        expected = before[2].copy()
        expected[:, :, :, 3:13] = before[5][:, :, :, 3:13]
        for block in range(8):
            assert np.array_equal(pool.block(block), expected if block == 2 else before[block])
        for block, scales in enumerate(pool_scales):
            if block == 2:
                scales[:, :, :, 3:13] = pool_scales[5][:, :, :, 3:13]
            assert np.array_equal(pool.scales(block), scales, equal_nan=True)
        assert pool.checksums([2, 5]) == [data.checksum(2), data.checksum(5)]
        with pytest.raises(IndexError):
            pool.checksums([8])
    finally:
        pool.close()
        side.hand_over.close()
        data.close()
    with pytest.raises(IndexError, match="closed"):
        pool.checksums([2])


async def test_a_pool_on_another_gpu_is_refused_by_name(pool_dir: Path) -> None:
    path = pool_dir / "x.kv"
    data = GpuStorage(StandIn).create(path, HEADER)
    side = ManagerSide(pool_dir, data, record(os.getpid()))
    side.hand_over.start()
    try:
        with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES"):
            await asyncio.to_thread(ManagedGpuPool, path, "w1", "bf16", StandIn, "another")
    finally:
        side.hand_over.close()
        data.close()


def test_a_gpu_without_room_is_a_full_storage(pool_dir: Path) -> None:
    def no_room(num_bytes: int, fd: int | None) -> StandIn:
        raise CudaError("cuMemCreate: out of memory (2)")

    with pytest.raises(StorageFullError, match="smaller --num-blocks or --pool-bytes"):
        GpuStorage(no_room).create(pool_dir / "x.kv", HEADER)
