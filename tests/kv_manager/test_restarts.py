"""The manager's restart: what it reads back, whom it waits for, and what proves a worker dead that it has not heard since."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import pytest

from services.kv_manager.block_pool import BlockState
from services.kv_manager.errors import StaleEpochError, StaleRegistrationError
from services.kv_manager.translate import registration
from tests.kv_manager.helpers import Manager

MakeManager = Callable[..., Manager]


def test_restart_keeps_the_blocks_of_a_worker_that_lives_until_it_claims(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8)
    worker = manager.worker()
    before = manager.register(worker).session
    manager.acquire(before, 1, 2)
    manager.acquire(before, 2, 2)
    manager.crash_and_restart()
    counts = manager.lessor.counts()
    assert (counts[BlockState.QUARANTINED], counts[BlockState.FREE]) == (4, 4)
    assert set(manager.acquire(manager.join("w2"), 1, 4).blocks) == {4, 5, 6, 7}
    with pytest.raises(StaleEpochError):
        manager.lessor.enter("w1", before.epoch, 9, 0)
    answer = manager.register(worker, {2: [2, 3]})
    assert answer.session.epoch > before.epoch
    assert answer.session.leases[2].blocks == [2, 3]
    assert manager.lessor.counts()[BlockState.FREE] == 2
    manager.check()


def test_restart_frees_the_blocks_of_a_worker_that_died_meanwhile(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8)
    worker = manager.worker()
    manager.acquire(manager.register(worker).session, 1, 3)
    worker.die()
    manager.crash_and_restart()
    assert manager.lessor.counts()[BlockState.FREE] == 8
    assert not manager.lessor.sessions()
    manager.check()


def test_restart_and_a_worker_that_dies_later_is_found_dead(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8)
    worker = manager.worker()
    manager.acquire(manager.register(worker).session, 1, 3)
    manager.crash_and_restart()
    manager.pass_time(100)
    assert manager.lessor.counts()[BlockState.QUARANTINED] == 3
    worker.die()
    manager.pass_time(0.3)
    assert manager.lessor.counts()[BlockState.FREE] == 8
    manager.check()


@pytest.mark.parametrize("fate", ["deleted", "replaced"])
def test_restart_and_a_lock_file_that_is_gone_means_unknown_and_not_dead(make_manager: MakeManager, fate: str) -> None:
    manager = make_manager(num_blocks=8)
    worker = manager.worker()
    manager.acquire(manager.register(worker).session, 1, 3)
    path = manager.pool_dir / "workers" / "w1.lock"
    path.rename(path.with_suffix(".away"))
    if fate == "replaced":
        path.touch()
    manager.crash_and_restart()
    manager.pass_time(1000)
    assert manager.lessor.counts()[BlockState.QUARANTINED] == 3
    manager.check()


def test_a_reboot_proves_every_worker_dead_even_without_its_lock_file(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = make_manager(num_blocks=8)
    manager.acquire(manager.join(), 1, 3)
    os.unlink(manager.pool_dir / "workers" / "w1.lock")
    monkeypatch.setattr("services.kv_manager.locks.kernel_boot_id", lambda: "another-boot")
    manager.crash_and_restart()
    assert manager.lessor.counts()[BlockState.FREE] == 8
    manager.check()


def test_a_worker_of_another_kernel_is_not_proved_dead_by_a_reboot_of_this_one(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = make_manager(num_blocks=8)
    request = registration(manager.worker().request())
    foreign = replace(request, worker=replace(request.worker, kernel_boot_id="of-a-virtual-machine"))
    manager.acquire(manager.lessor.register(foreign).session, 1, 3)
    monkeypatch.setattr("services.kv_manager.locks.kernel_boot_id", lambda: "another-boot")
    manager.crash_and_restart()
    assert manager.lessor.counts()[BlockState.QUARANTINED] == 3
    manager.check()


def test_a_damaged_header_pins_its_block_until_every_known_worker_is_accounted_for(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8)
    workers = [manager.worker(name) for name in ("w1", "w2")]
    for worker in workers:
        manager.acquire(manager.register(worker).session, 1, 2)
    manager.stop()
    (path,) = manager.pool_dir.glob("*.meta")
    data = bytearray(path.read_bytes())
    data[-8 * 128 + 20] ^= 1  # block 0's generation
    data[-7 * 128] ^= 4  # block 1's state
    path.write_bytes(data)
    manager.crash_and_restart()
    manager.check()
    assert manager.lessor.counts()[BlockState.FREE] == 4
    manager.register(workers[1], {1: [2, 3]})
    assert manager.lessor.counts()[BlockState.FREE] == 4
    answer = manager.register(workers[0], {1: [0, 1]})
    assert answer.session.leases[1].blocks == [0, 1]
    manager.check()
    manager.release(answer.session, 1)
    assert manager.lessor.counts()[BlockState.FREE] == 6
    manager.check()


def test_a_damaged_worker_slot_pins_its_blocks_until_the_host_reboots(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = make_manager(num_blocks=8)
    manager.acquire(manager.join(), 1, 3)
    manager.stop()
    (path,) = manager.pool_dir.glob("*.meta")
    data = bytearray(path.read_bytes())
    data[8192 + 40] ^= 1
    path.write_bytes(data)
    manager.crash_and_restart()
    manager.pass_time(1000)
    assert manager.lessor.counts()[BlockState.QUARANTINED] == 3
    monkeypatch.setattr("services.kv_manager.locks.kernel_boot_id", lambda: "another-boot")
    manager.crash_and_restart()
    assert manager.lessor.counts()[BlockState.FREE] == 8
    manager.check()


def test_a_late_registration_of_a_dead_process_is_told_by_the_lock_file_even_after_a_restart(
    make_manager: MakeManager,
) -> None:
    manager = make_manager(num_blocks=8)
    worker = manager.worker()
    manager.register(worker)
    late = worker.request()
    worker.die()
    for _ in range(2):
        manager.crash_and_restart()  # the second one has never heard of it
    session = manager.register(worker.reborn()).session
    manager.acquire(session, 1, 3)
    with pytest.raises(StaleRegistrationError, match="lock file"):
        manager.lessor.register(registration(late))
    assert manager.lessor.counts()[BlockState.LEASED] == 3
    manager.check()
