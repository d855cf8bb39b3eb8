"""What a killed process still writes to a GPU's memory, and when its lock and its pidfd say that it is dead.

A worker takes its lock, maps a real pool through the manager's hand-over, and is killed while a kernel of it writes into the pool.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from protos.pool_format import BlockShape, DataHeader
from services.kv_manager.cuda_pool import GpuDataFile, GpuProbe, GpuStorage, HandOver, cuda_memory, start_time_ticks
from services.kv_manager.locks import prepare_pool_dir
from services.kv_manager.meta_format import WorkerRecord
from services.kv_manager.sessions import LIVE

ROOT = Path(__file__).parents[2]
HEADER = DataHeader(bytes(range(16)), 64, BlockShape(4, 4, 16, 128, 2))
_RUNS = 3
_WATCH_S = 0.5  # after the death is proved

WRITER = b"""
.version 7.0
.target sm_75
.address_size 64
.visible .entry write(.param .u64 address)
{
    .reg .u64 %at, %count;
    .reg .pred %more;
    ld.param.u64 %at, [address];
    mov.u64 %count, 0;
AGAIN:
    add.u64 %count, %count, 1;
    st.volatile.global.u64 [%at], %count;
    setp.lt.u64 %more, %count, 1000000000000;
    @%more bra AGAIN;
    ret;
}
"""


@dataclass
class Death:
    """Of one killed worker: after how many milliseconds each sign came, and how many stores came after it."""

    lock_ms: float
    pidfd_ms: float
    stores_after_lock: int
    stores_after_pidfd: int


def run() -> Iterator[tuple[str, bool]]:
    """Each way to take the lock: what was seen, and whether the rule holds."""
    for order in ("before", "after"):
        deaths = [_kill_one(order) for _ in range(_RUNS)]
        for death in deaths:
            line = (
                f"lock taken {order} CUDA is initialised: free {death.lock_ms:.1f} ms after the kill,"
                f" {death.stores_after_lock} stores later; pidfd readable after {death.pidfd_ms:.1f} ms,"
                f" {death.stores_after_pidfd} stores later"
            )
            yield line, death.stores_after_pidfd == 0


def _kill_one(order: str) -> Death:
    with tempfile.TemporaryDirectory() as directory:
        pool_dir = prepare_pool_dir(Path(directory) / "pool")
        data = GpuStorage(cuda_memory(0)).create(pool_dir / "x.kv", HEADER)
        worker = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.gpu_death", str(pool_dir / "x.kv"), order],
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        try:
            return asyncio.run(_watch(pool_dir, data, worker))
        finally:
            worker.kill()
            worker.wait()
            data.close()


async def _watch(pool_dir: Path, data: GpuDataFile, worker: subprocess.Popen[bytes]) -> Death:
    (pool_dir / "workers" / "w1.lock").touch()
    start = start_time_ticks(worker.pid)
    assert start is not None
    record = WorkerRecord("w1", bytes(16), 0, 0, worker.pid, start, "", 1, 1, 256, 4)
    probe = GpuProbe(pool_dir, record)
    session: Any = SimpleNamespace(probe=probe, worker=record, state=LIVE)
    hand_over = HandOver(pool_dir, lambda _: session, lambda: data)
    hand_over.start()
    try:
        assert worker.stdout is not None
        assert await asyncio.to_thread(worker.stdout.readline) == b"writing\n"
        return _die(data, probe, worker)
    finally:
        hand_over.close()
        probe.close()


def _die(data: GpuDataFile, probe: GpuProbe, worker: subprocess.Popen[bytes]) -> Death:
    memory: Any = data.memory

    def count() -> int:
        return int.from_bytes(memory.read(0, 8), "little")

    before = count()
    time.sleep(0.01)
    assert count() > before, "the worker's kernel does not write"
    assert probe.is_locked()
    worker.kill()
    began = time.perf_counter()
    lock: tuple[float, int] | None = None
    while probe.process_lives():
        if lock is None and not probe.is_locked():
            lock = (time.perf_counter() - began) * 1e3, count()
    pidfd_ms = (time.perf_counter() - began) * 1e3
    at_death = count()
    lock = lock or (pidfd_ms, at_death)
    assert not probe.is_held(), "the process is gone, and its lock is not free"
    end = time.perf_counter() + _WATCH_S
    while time.perf_counter() < end:
        last = count()
    return Death(lock[0], pidfd_ms, last - lock[1], last - at_death)


def _work(kv_path: Path, order: str) -> None:
    """The worker's process."""
    import ctypes
    import fcntl

    from services.cuda_memory import CudaDevice
    from services.decoder.gpu_pool import map_gpu_pool

    def lock() -> None:
        fd = os.open(kv_path.parent / "workers" / "w1.lock", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)

    if order == "before":
        lock()
    pool = map_gpu_pool(kv_path, "w1", "bf16")
    if order == "after":
        lock()
    device = CudaDevice()
    module, kernel = ctypes.c_void_p(), ctypes.c_void_p()
    device.call("cuModuleLoadData", ctypes.byref(module), WRITER + b"\0")
    device.call("cuModuleGetFunction", ctypes.byref(kernel), module, b"write")
    address = ctypes.c_uint64(pool.device_address)
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(address))
    device.call("cuLaunchKernel", kernel, 1, 1, 1, 1, 1, 1, 0, device.make_stream(), arguments, None)
    print("writing", flush=True)
    time.sleep(60)


if __name__ == "__main__":
    _work(Path(sys.argv[1]), sys.argv[2])
