"""A pool in real GPU memory: it outlives its manager and its workers. Skipped where there is no GPU."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from protos.pool_format import BlockShape, DataHeader
from services.cuda_memory import CudaError
from services.kv_manager.cuda_pool import GpuDataFile, GpuProbe, GpuStorage, HandOver, cuda_memory
from services.kv_manager.locks import prepare_pool_dir
from services.kv_manager.meta_format import WorkerRecord
from services.kv_manager.sessions import LIVE

HEADER = DataHeader(bytes(range(16)), 64, BlockShape(4, 4, 16, 128, 2))
BLOCK = bytes(range(256)) * (HEADER.shape.block_bytes // 256)

_WORKER = """
import sys, time
from pathlib import Path
from services.decoder.gpu_pool import map_gpu_pool
pool = map_gpu_pool(Path(sys.argv[1]), "w1", "bf16")
pool._memory.write(5 * pool.shape.stride_bytes, bytes(range(256)) * (pool.shape.block_bytes // 256))
print("written", flush=True)
time.sleep(60)
"""


def test_the_pool_outlives_its_manager_and_its_worker(tmp_path: Path) -> None:
    try:
        make_memory = cuda_memory(0)
    except CudaError as error:
        pytest.skip(f"needs an NVIDIA GPU: {error}")
    pool_dir = prepare_pool_dir(tmp_path / "pool")
    (pool_dir / "workers" / "w1.lock").touch()
    storage, path = GpuStorage(make_memory), pool_dir / "x.kv"
    first = storage.create(path, HEADER)
    worker = subprocess.Popen([sys.executable, "-c", _WORKER, str(path)], stdout=subprocess.PIPE, cwd=os.getcwd())
    try:
        start = int(Path(f"/proc/{worker.pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
        record = WorkerRecord("w1", bytes(16), 0, 0, worker.pid, start, "", 1, 1, 256, 4)
        asyncio.run(_outlive(pool_dir, storage, first, worker, record))
    finally:
        worker.kill()
        worker.wait()


async def _outlive(
    pool_dir: Path, storage: GpuStorage, first: GpuDataFile, worker: subprocess.Popen[bytes], record: WorkerRecord
) -> None:
    hand_over, _ = _serve(pool_dir, first, record)
    assert worker.stdout is not None
    assert await asyncio.to_thread(worker.stdout.readline) == b"written\n"
    assert first.checksum(5) == zlib.crc32(BLOCK)
    hand_over.close()
    first.close()  # the first manager is gone, and all that it had mapped

    second = storage.open(pool_dir / "x.kv")
    hand_over, probe = _serve(pool_dir, second, record)
    assert await asyncio.to_thread(second.checksum, 5) == zlib.crc32(BLOCK)
    assert probe.is_held()
    worker.kill()
    deadline = time.monotonic() + 10
    while probe.is_held():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)
    assert second.checksum(5) == zlib.crc32(BLOCK)
    hand_over.close()
    second.close()
    probe.close()


def _serve(pool_dir: Path, data: GpuDataFile, worker: WorkerRecord) -> tuple[HandOver, GpuProbe]:
    probe = GpuProbe(pool_dir, worker)
    session: Any = SimpleNamespace(probe=probe, worker=worker, state=LIVE)
    hand_over = HandOver(pool_dir, lambda _: session, lambda: data)
    hand_over.start()
    return hand_over, probe
