"""The pool's files, looked at while no manager runs: the same proof that the manager's own tests end with."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from services.kv_manager.block_pool import BlockState
from services.kv_manager.config import Config
from services.kv_manager.lessor import Lessor
from services.kv_manager.locks import ManagerLock, prepare_pool_dir


def check_pool_files(pool_dir: Path, block_size: int = 16) -> dict[str, int]:
    """Recovers the pool, proves it consistent and its sealed bytes whole; blocks by state. Raises AssertionError."""
    lock = ManagerLock(prepare_pool_dir(pool_dir))
    try:
        lessor = Lessor(Config(pool_dir=pool_dir, block_size=block_size), pool_dir, time.monotonic)
        try:
            lessor.check()
            pool = lessor.pool
            assert pool is not None, "no decoder ever registered"
            for block in pool.sealed_blocks():
                content = pool.content(block)
                assert content is not None
                assert pool.files.data.checksum(block) == content.data_checksum, f"sealed block {block} is corrupt"
            counts = lessor.counts()
            assert sum(counts.values()) == pool.num_blocks
            return {state.name.lower(): counts[state] for state in BlockState}
        finally:
            lessor.close()
    finally:
        lock.close()


def held_locks(pool_dir: Path) -> list[str]:
    """Names of the lock files that some process holds."""
    return [path.name for path in sorted(pool_dir.rglob("*.lock")) if _is_held(path)]


def _is_held(path: Path) -> bool:
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
