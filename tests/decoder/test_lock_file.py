"""The worker's lock file, with real processes."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.decoder.errors import ConfigError
from services.decoder.lock_file import take_worker_lock
from tests.decoder.engine_fakes import poll

HOLD = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
fcntl.flock(fd, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def pool_dir(tmp_path: Path) -> Path:
    (tmp_path / "workers").mkdir()
    return tmp_path


@pytest.fixture
def holder(pool_dir: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds w1's lock until its stdin closes."""
    path = pool_dir / "workers" / "w1.lock"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def is_locked(path: Path) -> bool:
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


async def test_the_lock_is_held_until_close_and_the_file_stays(pool_dir: Path) -> None:
    lock = await take_worker_lock(pool_dir, "w1")
    path = pool_dir / "workers" / "w1.lock"
    stat = path.stat()
    assert (lock.device, lock.inode) == (stat.st_dev, stat.st_ino)
    assert stat.st_mode & 0o777 == 0o600
    assert lock.is_in_place()
    assert is_locked(path)
    lock.close()
    assert not is_locked(path)
    assert path.exists()


async def test_a_lock_that_another_process_holds_names_the_worker_id(
    pool_dir: Path, holder: subprocess.Popen[bytes]
) -> None:
    with pytest.raises(ConfigError, match=r"--worker-id.*'w1'"):
        await take_worker_lock(pool_dir, "w1")


async def test_a_predecessor_that_dies_meanwhile_makes_way(
    pool_dir: Path, holder: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.decoder.lock_file.LOCK_WAIT_S", 60.0)  # however long a busy machine lets it die
    taking = asyncio.create_task(take_worker_lock(pool_dir, "w1"))
    await asyncio.sleep(0)
    holder.send_signal(signal.SIGKILL)
    lock = await taking
    assert lock.is_in_place()
    lock.close()


async def test_a_replaced_file_is_noticed(pool_dir: Path) -> None:
    first = await take_worker_lock(pool_dir, "w1")
    first.path.unlink()
    assert not first.is_in_place()
    second = await take_worker_lock(pool_dir, "w1")
    assert not first.is_in_place()
    assert second.is_in_place()
    first.close()
    second.close()


async def test_a_child_that_execs_does_not_inherit_the_lock(pool_dir: Path) -> None:
    lock = await take_worker_lock(pool_dir, "w1")
    path = pool_dir / "workers" / "w1.lock"
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "input()", stdin=asyncio.subprocess.PIPE, close_fds=False
    )
    try:
        lock.close()
        # The kernel closes the child's copy in the midst of its exec.
        await asyncio.to_thread(poll, lambda: not is_locked(path))
    finally:
        child.kill()
        await child.communicate()


async def test_a_pool_directory_that_is_not_there_names_the_mount(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="same path"):
        await take_worker_lock(tmp_path / "missing", "w1")
