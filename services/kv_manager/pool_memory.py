"""Where a pool's bytes are, host or GPU memory, and what it takes there to prove that a worker writes no more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from services.cuda_memory import CudaError
from services.kv_manager.config import Config
from services.kv_manager.cuda_pool import GpuProbe, GpuStorage, MakeMemory, cuda_memory
from services.kv_manager.errors import StartError
from services.kv_manager.locks import LockProbe
from services.kv_manager.meta_format import WorkerRecord
from services.kv_manager.pool_file import DataFile, Storage


@dataclass(frozen=True)
class PoolMemory:
    """What `--pool-memory` chooses: how data files are made, and how a worker is probed."""

    name: str  # "host" or "cuda"
    storage: Storage
    probe: Callable[[Path, WorkerRecord], LockProbe]


def _probe_lock(pool_dir: Path, worker: WorkerRecord) -> LockProbe:
    return LockProbe(pool_dir, worker.worker_id)


HOST = PoolMemory("host", DataFile, _probe_lock)


def gpu(make_memory: MakeMemory) -> PoolMemory:
    """A pool in GPU memory that make_memory makes and maps."""
    return PoolMemory("cuda", GpuStorage(make_memory), GpuProbe)


def open_memory(config: Config) -> PoolMemory:
    """What the flags say; raises StartError when this host has no such GPU."""
    if config.pool_memory == "host":
        return HOST
    try:
        return gpu(cuda_memory(config.device))
    except CudaError as error:
        raise StartError(
            f"--pool-memory cuda: {error}. Start it where the GPU is (in a container, with the GPU passed in, such as docker run"
            " --gpus all), or use --pool-memory host"
        ) from error
