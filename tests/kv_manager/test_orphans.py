"""A lock file that was deleted: nothing is freed without proof, its process goes on, and the name of a dead one can be had again."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from services.kv_manager.block_pool import BlockState
from services.kv_manager.errors import LockProofError, StaleEpochError, StaleRegistrationError
from services.kv_manager.sessions import ABSENT, ORPHANED
from tests.kv_manager.helpers import Manager, Worker

MakeManager = Callable[..., Manager]
NUM_BLOCKS = 8


def _orphan(manager: Manager) -> tuple[Worker, Worker]:
    """A worker with three blocks whose lock file was deleted, and the process that has its name since."""
    first = manager.worker()
    manager.acquire(manager.register(first).session, 1, 3)
    _delete_lock(manager)
    manager.crash_and_restart()
    second = Worker(manager.pool_dir).lock()
    manager.register(second)
    return first, second


def _delete_lock(manager: Manager) -> None:
    (manager.pool_dir / "workers" / "w1.lock").unlink()


def _states(manager: Manager) -> dict[str, str]:
    return {session.worker.worker_id: session.state for session in manager.lessor.sessions()}


def test_a_new_process_gets_the_name_and_none_of_the_blocks(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=NUM_BLOCKS)
    first, second = _orphan(manager)
    assert _states(manager) == {"w1?0": ORPHANED, "w1": "live"}
    session = manager.register(second).session
    assert set(manager.acquire(session, 1, 5).blocks) == {3, 4, 5, 6, 7}
    first.die()  # which nothing shows
    manager.pass_time(1000)
    assert manager.lessor.counts()[BlockState.QUARANTINED] == 3 + 5  # the second is silent, too
    second.die()
    manager.pass_time(1)
    assert _states(manager) == {"w1?0": ORPHANED}
    assert manager.lessor.counts()[BlockState.QUARANTINED] == 3
    manager.check()


def test_it_is_the_same_after_more_restarts(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=NUM_BLOCKS)
    _, second = _orphan(manager)
    manager.acquire(manager.register(second).session, 1, 2)
    for _ in range(2):
        manager.crash_and_restart()
        assert _states(manager) == {"w1?0": ORPHANED, "w1": ABSENT}
        answer = manager.register(second, {1: [3, 4]})
        assert answer.session.leases[1].blocks == [3, 4]
        assert manager.lessor.counts()[BlockState.QUARANTINED] == 3
        manager.check()
    _delete_lock(manager)
    manager.crash_and_restart()
    third = Worker(manager.pool_dir).lock()
    manager.register(third)
    assert _states(manager) == {"w1?0": ORPHANED, "w1?1": ORPHANED, "w1": "live"}
    assert manager.lessor.counts()[BlockState.QUARANTINED] == 5
    manager.crash_and_restart()
    assert _states(manager) == {"w1?0": ORPHANED, "w1?1": ORPHANED, "w1": ABSENT}
    manager.check()


def test_a_reboot_is_proof(make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = make_manager(num_blocks=NUM_BLOCKS)
    _, second = _orphan(manager)
    second.die()
    monkeypatch.setattr("services.kv_manager.locks.kernel_boot_id", lambda: "another boot")
    manager.crash_and_restart()
    assert _states(manager) == {}
    assert manager.lessor.counts()[BlockState.FREE] == NUM_BLOCKS
    manager.check()


@pytest.mark.parametrize("is_restarted", [False, True])
def test_whatever_the_first_process_still_says_harms_nobody(make_manager: MakeManager, is_restarted: bool) -> None:
    manager = make_manager(num_blocks=NUM_BLOCKS)
    first, second = _orphan(manager)
    session = manager.register(second).session
    manager.acquire(session, 1, 4)
    if is_restarted:
        manager.crash_and_restart()
        session = manager.register(second, {1: [3, 4, 5, 6]}).session
    # With its own lock, which is not the file any more; and as a late copy, with the file that the second holds.
    with pytest.raises((LockProofError, StaleRegistrationError)):
        manager.register(first)
    late = Worker(manager.pool_dir, boot_id=first.boot_id, attempt=9, fd=second.fd)
    with pytest.raises(StaleRegistrationError):
        manager.register(late)
    orphan = next(other for other in manager.lessor.sessions() if other.state == ORPHANED)
    with pytest.raises(StaleEpochError):
        manager.lessor.enter(orphan.worker.worker_id, orphan.epoch, 1, 0)
    assert manager.lessor.enter("w1", session.epoch, 99, 0) is session
    assert manager.lessor.counts()[BlockState.LEASED] == 4
    manager.check()


@pytest.mark.parametrize("is_restarted", [False, True])
def test_the_process_itself_goes_on_with_another_lock_that_proves_its_death_from_then_on(
    make_manager: MakeManager, is_restarted: bool
) -> None:
    manager = make_manager(num_blocks=NUM_BLOCKS)
    first = manager.worker()
    manager.acquire(manager.register(first).session, 1, 3)
    _delete_lock(manager)
    if is_restarted:
        manager.crash_and_restart()
    again = Worker(manager.pool_dir, boot_id=first.boot_id, attempt=first.attempt).lock()
    session = manager.register(again, {1: [0, 1, 2]}).session
    assert session.leases[1].blocks == [0, 1, 2]
    assert manager.lessor.counts()[BlockState.LEASED] == 3
    first.die()  # the deleted file's lock says nothing any more
    manager.pass_time(1000)
    assert manager.lessor.counts()[BlockState.QUARANTINED] == 3
    manager.check()
    manager.crash_and_restart()
    manager.pass_time(1000)
    assert manager.lessor.counts()[BlockState.QUARANTINED] == 3
    again.die()
    manager.pass_time(1)
    assert _states(manager) == {}
    assert manager.lessor.counts()[BlockState.FREE] == NUM_BLOCKS
    manager.check()


def test_a_new_lock_without_the_boot_id_is_no_proof_and_the_error_names_the_file_and_the_fix(
    make_manager: MakeManager,
) -> None:
    manager = make_manager(num_blocks=NUM_BLOCKS)
    first = manager.worker()
    manager.acquire(manager.register(first).session, 1, 3)
    _delete_lock(manager)
    manager.crash_and_restart()
    again = Worker(manager.pool_dir, boot_id=first.boot_id, attempt=first.attempt).lock()
    os.ftruncate(again.fd, 0)
    with pytest.raises(LockProofError, match=r"w1\.lock of worker w1 was deleted .* Restart this worker") as caught:
        manager.register(again, {1: [0, 1, 2]})
    assert caught.value.metadata["lock_path"].endswith("/workers/w1.lock")
    assert _states(manager) == {"w1": ABSENT}
    assert manager.lessor.counts()[BlockState.QUARANTINED] == 3
    manager.register(again.reborn())
    assert _states(manager) == {"w1?0": ORPHANED, "w1": "live"}
    manager.check()
