"""Proofs of life by flock: the manager's own lock on the pool directory, and probes of the workers' lock files.

A lock belongs to an open file description, so the kernel drops it when the last process that holds the descriptor is
gone, in any container of this host. The manager probes through descriptors of its own.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from services.kv_manager.errors import LockProofError, PoolLockedError

WORKERS_DIR = "workers"
MANAGER_LOCK = "manager.lock"


def kernel_boot_id() -> str:
    """The id of this boot of the kernel, or an empty string where the kernel has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


class ManagerLock:
    """The exclusive lock on a pool directory, held from construction until close or the end of the process."""

    def __init__(self, pool_dir: Path) -> None:
        """Takes the lock; raises PoolLockedError when another manager has it."""
        path = pool_dir / MANAGER_LOCK
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._fd)
            raise PoolLockedError(
                f"--pool-dir: another manager serves {pool_dir} (it holds {path.name}); stop it, or use another directory"
            ) from error

    def close(self) -> None:
        """Gives the directory up."""
        os.close(self._fd)


class LockProbe:
    """One worker's lock file, opened by the manager: tells whether some process still holds it."""

    def __init__(self, pool_dir: Path, worker_id: str) -> None:
        """Opens the worker's lock file; raises LockProofError when there is none."""
        self.path = pool_dir / WORKERS_DIR / f"{worker_id}.lock"
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise LockProofError(
                f"the manager cannot open the lock file {self.path} ({error.strerror}); the worker must hold it, on the same"
                " host and in the directory that DescribePool names",
                {"lock_path": str(self.path)},
            ) from error
        stat = os.fstat(self._fd)
        self.identity = (stat.st_dev, stat.st_ino)

    def is_held(self) -> bool:
        """Whether the worker may still touch a block: False is proof that it does not."""
        return self.is_locked()

    def is_locked(self) -> bool:
        """Whether a process holds the lock at this moment; takes microseconds."""
        try:
            # Shared: it fails only on a worker's exclusive lock, never on another probe.
            fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        return False

    def holder(self) -> str:
        """What the lock's holder has written into the file: its boot_id as hex digits, or nothing."""
        return os.pread(self._fd, 64, 0).decode("ascii", "replace").strip()

    def allows_successor(self) -> bool:
        """Whether a new process that holds this lock proves that the one before is gone."""
        return True

    def take_over(self, old: LockProbe | None) -> None:
        """Keeps what another probe of the same process knows."""

    def close(self) -> None:
        """Closes the descriptor; once is enough."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def prepare_pool_dir(pool_dir: Path) -> Path:
    """Makes the pool directory and its workers directory where missing, both 0700; answers the absolute path."""
    absolute = Path(os.path.abspath(pool_dir))
    for path in (absolute, absolute / WORKERS_DIR):
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise PoolLockedError(f"--pool-dir: cannot make the directory {path}: {error.strerror}") from error
    return absolute
