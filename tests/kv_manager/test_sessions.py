"""Sessions, epochs and the safety rule: timeouts revoke, only proof frees."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from services.kv_manager.block_pool import BlockState
from services.kv_manager.errors import (
    InvalidRequestError,
    LockProofError,
    SessionRevokedError,
    StaleEpochError,
    StaleRegistrationError,
    TooManyWorkersError,
)
from services.kv_manager.sessions import LIVE, REVOKED
from services.kv_manager.translate import registration
from tests.kv_manager.helpers import Manager, Worker

MakeManager = Callable[..., Manager]


def test_epochs_grow_with_every_registration_and_a_stale_one_is_refused(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8)
    worker = manager.worker()
    epochs = [manager.register(worker).session.epoch for _ in range(3)]
    epochs.append(manager.join("w2").epoch)
    assert epochs == sorted(set(epochs))
    for stale in (0, epochs[1], epochs[3]):
        with pytest.raises(StaleEpochError):
            manager.lessor.enter("w1", stale, 1, 0)
    assert manager.lessor.enter("w1", epochs[2], 1, 0).epoch == epochs[2]
    manager.check()


def test_a_silent_worker_is_revoked_and_its_blocks_are_quarantined_not_freed(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8, ttl_s=10.0)
    session = manager.join()
    manager.acquire(session, 1, 3)
    manager.pass_time(9.5)
    assert session.state == LIVE
    manager.pass_time(1000)
    assert session.state == REVOKED
    counts = manager.lessor.counts()
    assert (counts[BlockState.QUARANTINED], counts[BlockState.FREE]) == (3, 5)
    other = manager.join("w2")
    assert set(manager.acquire(other, 1, 5).blocks).isdisjoint(session.leases[1].blocks)
    manager.check()


def test_revocations_are_repeated_until_release_answers(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8, ttl_s=10.0)
    session = manager.join()
    for cache_id in (1, 2):
        manager.acquire(session, cache_id, 2)
    manager.pass_time(11)
    for _ in range(3):
        assert manager.revoked(session) == [1, 2]
    with pytest.raises(SessionRevokedError):
        manager.lessor.require_live(session)
    manager.release(session, 1)
    assert manager.revoked(session) == [2]
    assert session.state == REVOKED
    manager.release(session, 2)
    assert manager.revoked(session) == []
    assert session.state == LIVE
    manager.acquire(session, 3, 8)
    manager.check()


def test_a_revoked_worker_takes_its_leases_up_again_by_claiming_them(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8, ttl_s=10.0)
    worker = manager.worker()
    session = manager.register(worker).session
    for cache_id in (1, 2, 3):
        manager.acquire(session, cache_id, 2)
    manager.pass_time(11)
    answer = manager.register(worker, {1: [0, 1], 3: [4]})
    assert answer.claims_accepted
    assert not answer.lost_cache_ids
    counts = manager.lessor.counts()
    assert (counts[BlockState.LEASED], counts[BlockState.FREE], counts[BlockState.QUARANTINED]) == (3, 5, 0)
    assert answer.session.epoch > session.epoch
    manager.check()


def test_a_claim_of_a_block_that_is_not_the_workers_is_lost_and_the_others_hold(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8)
    worker = manager.worker()
    session = manager.register(worker).session
    manager.acquire(session, 1, 2)
    manager.acquire(session, 2, 1)
    manager.acquire(manager.join("w2"), 1, 2)
    answer = manager.register(worker, {1: [0, 1], 5: [3], 6: [7], 7: [1]})
    assert answer.claims_accepted
    assert answer.lost_cache_ids == [5, 6, 7]
    assert list(answer.session.leases) == [1]
    assert manager.lessor.counts()[BlockState.LEASED] == 4
    manager.check()


def test_claims_through_a_mapping_of_another_pool_hold_nothing(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8)
    worker = manager.worker()
    session = manager.register(worker).session
    manager.acquire(session, 1, 2)
    answer = manager.lessor.register(registration(worker.request(bytes(16), {1: [0, 1]})))
    assert not answer.claims_accepted
    assert manager.lessor.counts()[BlockState.FREE] == 8
    manager.check()


def test_malformed_claims_are_refused_and_change_nothing(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8)
    worker = manager.worker()
    session = manager.register(worker).session
    manager.acquire(session, 1, 2)
    for claims in ({1: [0, 0]}, {1: [0, 8]}, {1: []}):
        with pytest.raises(InvalidRequestError, match=r"claims\[0\]\.block_ids"):
            manager.register(worker, claims)
    assert manager.lessor.enter("w1", session.epoch, 1, 0) is session
    assert session.leases[1].blocks == [0, 1]
    manager.check()


def test_a_free_lock_is_proof_and_brings_the_blocks_back(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8, ttl_s=10.0)
    worker = manager.worker()
    session = manager.register(worker).session
    manager.acquire(session, 1, 3)
    manager.pass_time(11)
    assert manager.lessor.counts()[BlockState.QUARANTINED] == 3
    worker.die()
    manager.pass_time(0.3)
    assert manager.lessor.counts()[BlockState.FREE] == 8
    assert not manager.lessor.sessions()
    manager.check()


def test_after_its_stream_has_ended_a_workers_lock_is_probed_until_it_is_free(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8, ttl_s=10.0)
    worker = manager.worker()
    session = manager.register(worker).session
    manager.acquire(session, 1, 3)
    slow = manager.lessor.tick_interval_s
    manager.lessor.stream_ended(session)
    assert manager.lessor.tick_interval_s < slow / 5
    manager.lessor.tick()
    assert manager.lessor.counts()[BlockState.LEASED] == 3  # sockets close before locks do
    worker.die()
    manager.lessor.tick()
    assert manager.lessor.counts()[BlockState.FREE] == 8
    assert manager.lessor.tick_interval_s == slow
    manager.check()


def test_a_stream_that_ends_while_its_worker_lives_costs_it_nothing(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8, ttl_s=10.0)
    session = manager.join()
    manager.acquire(session, 1, 3)
    manager.lessor.stream_ended(session)
    manager.pass_time(5)
    manager.lessor.keepalive("w1", session.epoch, None)
    manager.pass_time(8)
    assert session.state == LIVE
    assert manager.lessor.tick_interval_s > 0.1
    manager.check()


def test_a_new_life_on_the_same_lock_file_proves_the_old_one_dead(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8)
    worker = manager.worker()
    manager.acquire(manager.register(worker).session, 1, 3)
    answer = manager.register(worker.reborn(), {})
    assert not answer.session.leases
    assert manager.lessor.counts()[BlockState.FREE] == 8
    manager.check()


def test_a_second_process_with_a_replaced_lock_file_is_refused_while_the_first_may_live(
    make_manager: MakeManager,
) -> None:
    manager = make_manager(num_blocks=8)
    worker = manager.worker()
    session = manager.register(worker).session
    manager.acquire(session, 1, 3)
    (manager.pool_dir / "workers" / "w1.lock").unlink()
    second = Worker(manager.pool_dir).lock()
    with pytest.raises(LockProofError, match="not proved dead") as caught:
        manager.register(second)
    assert "--worker-id" in caught.value.message
    assert manager.lessor.enter("w1", session.epoch, 1, 0) is session
    assert manager.lessor.counts()[BlockState.LEASED] == 3
    worker.die()
    manager.register(second)
    assert manager.lessor.counts()[BlockState.FREE] == 8
    second.die()
    manager.check()


@pytest.mark.parametrize("fault", ["missing", "unlocked", "other inode", "other device"])
def test_a_registration_without_a_held_lock_is_refused(make_manager: MakeManager, fault: str) -> None:
    manager = make_manager(num_blocks=8)
    worker = manager.worker()
    request = worker.request()
    if fault == "missing":
        (manager.pool_dir / "workers" / "w1.lock").unlink()
    elif fault == "unlocked":
        worker.die()
    elif fault == "other inode":
        request.lock_inode += 1
    else:
        request.lock_device += 1
    with pytest.raises(LockProofError):
        manager.lessor.register(registration(request))
    assert not manager.lessor.sessions()
    manager.check()


def test_a_late_copy_of_a_registration_frees_nothing(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8)
    worker = manager.worker()
    first = worker.request()
    manager.lessor.register(registration(first))
    session = manager.register(worker, {}).session
    manager.acquire(session, 1, 3)
    with pytest.raises(StaleRegistrationError, match="late copy"):
        manager.lessor.register(registration(first))
    next_life = manager.register(worker.reborn(), {}).session
    manager.acquire(next_life, 1, 3)
    with pytest.raises(StaleRegistrationError, match="dead"):
        manager.lessor.register(registration(first))
    assert manager.lessor.counts()[BlockState.LEASED] == 3
    manager.check()


def test_a_step_beyond_the_hang_limit_revokes_though_the_worker_speaks(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8, ttl_s=10.0, hang_limit_s=60.0)
    session = manager.join()
    manager.acquire(session, 1, 3)
    assert manager.revoked(session, 59_999) == []
    assert manager.revoked(session, 60_000) == [1]
    assert manager.lessor.counts()[BlockState.QUARANTINED] == 3
    manager.check()


def test_after_a_gap_in_the_managers_own_loop_everyone_is_renewed(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8, ttl_s=10.0)
    session = manager.join()
    manager.acquire(session, 1, 3)
    manager.pass_time(1)
    manager.clock.advance(3600)
    manager.lessor.tick()
    assert session.state == LIVE
    manager.pass_time(11)
    assert session.state == REVOKED
    manager.check()


@pytest.mark.parametrize("ttl_s", [1.0, 4.0, 60.0])
def test_a_stop_of_the_manager_however_long_revokes_nobody_who_was_heard_just_before(
    make_manager: MakeManager, ttl_s: float
) -> None:
    manager = make_manager(num_blocks=8, ttl_s=ttl_s)
    session = manager.join()
    for stop_s in (share / 10 * ttl_s for share in range(1, 31)):
        manager.revoked(session)
        manager.clock.advance(manager.lessor.tick_interval_s)
        manager.lessor.tick()
        manager.clock.advance(stop_s)
        manager.lessor.tick()
        assert session.state == LIVE
    manager.pass_time(ttl_s + 0.3)
    assert session.state == REVOKED


def test_the_65th_worker_is_refused_and_a_freed_slot_is_used_again(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8)
    workers = [manager.worker(f"w{number}") for number in range(65)]
    for worker in workers[:64]:
        manager.register(worker)
    with pytest.raises(TooManyWorkersError):
        manager.register(workers[64])
    manager.lessor.stream_ended(manager.lessor.sessions()[7])
    workers[7].die()
    manager.lessor.tick()
    assert manager.register(workers[64]).session.slot == 7
    manager.check()


@pytest.mark.parametrize(
    ("field", "value"),
    [("worker_id", "../etc"), ("worker_id", ""), ("boot_id", b"short"), ("max_seqs", 0), ("kv_capacity_tokens", 0)],
)
def test_a_malformed_registration_names_its_field(make_manager: MakeManager, field: str, value: object) -> None:
    manager = make_manager(num_blocks=8)
    request = manager.worker().request()
    setattr(request, field, value)
    with pytest.raises(InvalidRequestError) as caught:
        registration(request)
    assert caught.value.field == field


def test_more_than_one_group_of_layers_is_refused_by_name(make_manager: MakeManager) -> None:
    request = make_manager(num_blocks=8).worker().request()
    request.geometry.layer_groups.append(request.geometry.layer_groups[0])
    with pytest.raises(InvalidRequestError, match="2 groups"):
        registration(request)
