"""The worker's lock file: as long as it is locked, nobody may take this process's blocks for those of a dead one."""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from pathlib import Path

from services.decoder.errors import ConfigError

WORKERS_DIR = "workers"
LOCK_WAIT_S = 1.0
_RETRY_S = 0.02


class WorkerLock:
    """An exclusive flock, held from `take_worker_lock` to `close` or the end of the process. Never unlinked, never unlocked."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd
        stat = os.fstat(fd)
        self.device = stat.st_dev
        self.inode = stat.st_ino

    def is_in_place(self) -> bool:
        """Whether the path still leads to the locked file: not when somebody deleted or replaced it."""
        return _leads_to(self.path, self.device, self.inode)

    def close(self) -> None:
        """Proves this worker dead: only for when nothing of it can touch a block any more."""
        os.close(self._fd)


def _leads_to(path: Path, device: int, inode: int) -> bool:
    try:
        stat = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    return (stat.st_dev, stat.st_ino) == (device, inode)


async def take_worker_lock(pool_dir: Path, worker_id: str, boot_id: bytes = b"") -> WorkerLock:
    """Locks `<pool_dir>/workers/<worker_id>.lock`, made if missing; raises ConfigError when it cannot within LOCK_WAIT_S.

    The file holds boot_id from then on: a late copy of a dead predecessor's registration is told by it.
    """
    path = pool_dir / WORKERS_DIR / f"{worker_id}.lock"
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        lock = _try_lock(path, boot_id)
        if lock is not None:
            return lock
        # The manager's probes hold it for microseconds, and a predecessor that is being killed for a little longer.
        if time.monotonic() >= deadline:
            raise ConfigError(
                f"--worker-id: another process holds {path}: a decoder of the worker id {worker_id!r} runs; "
                "stop it, or choose another --worker-id"
            )
        await asyncio.sleep(_RETRY_S)


def _try_lock(path: Path, boot_id: bytes) -> WorkerLock | None:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ConfigError(
            f"--kv-manager: cannot open the lock file {path} in the manager's pool directory ({error.strerror}); "
            "run the decoder on the manager's host, with the directory mounted at the same path and writable"
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock = WorkerLock(path, fd)
        os.ftruncate(fd, 0)
        os.pwrite(fd, boot_id.hex().encode(), 0)
    except BlockingIOError:
        os.close(fd)
        return None
    except BaseException:
        os.close(fd)
        raise
    if not lock.is_in_place():  # replaced between open and flock: what is locked proves nothing
        lock.close()
        return None
    return lock
