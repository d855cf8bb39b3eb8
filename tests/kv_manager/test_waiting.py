"""Waiting for blocks, and giving way: who is revoked for whom, and how every wait ends."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from services.kv_manager.errors import (
    CacheIdReusedError,
    LeaseRevokedError,
    ManagerError,
    PoolExhaustedError,
    StaleEpochError,
)
from services.kv_manager.sessions import Lease, Session
from services.kv_manager.waiting import Outcome, Waiter
from tests.kv_manager.helpers import Manager, chain_of

MakeManager = Callable[..., Manager]


class Wait:
    """An acquire or extend that waits, as the service makes it."""

    def __init__(self, manager: Manager, session: Session, attempt: Callable[..., Lease], wait_s: float = 30.0) -> None:
        self.outcome: Outcome | None = None
        self.waiter: Waiter | None = None
        try:
            self.outcome = attempt()
        except PoolExhaustedError as error:
            self.waiter = manager.lessor.waiting.wait(
                session, error, partial(attempt, is_first_waiter=True), self._settle, wait_s
            )

    def _settle(self, outcome: Outcome) -> None:
        assert self.outcome is None, "settled twice"
        self.outcome = outcome

    @property
    def is_over(self) -> bool:
        return self.outcome is not None

    @property
    def blocks(self) -> list[int]:
        assert isinstance(self.outcome, Lease), self.outcome
        return self.outcome.blocks


def acquire(
    manager: Manager, session: Session, cache_id: int, num_blocks: int, priority: int = 0, **more: object
) -> Wait:
    ticket, wait_s = more.pop("age_ticket", None), float(more.pop("wait_s", 30.0))  # type: ignore[arg-type]
    attempt = partial(
        manager.lessor.book.acquire,
        session,
        cache_id,
        num_blocks,
        priority,
        "",
        ticket,
        **more,  # type: ignore[arg-type]
    )
    return Wait(manager, session, attempt, wait_s)


def extend(manager: Manager, session: Session, cache_id: int, num_blocks: int, wait_s: float = 30.0) -> Wait:
    return Wait(manager, session, partial(manager.lessor.book.extend, session, cache_id, num_blocks), wait_s)


def release(manager: Manager, session: Session, cache_id: int) -> None:
    manager.release(session, cache_id)
    manager.lessor.waiting.pump()


def test_the_youngest_of_the_lowest_priority_gives_way_first(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8)
    session = manager.join()
    for cache_id, priority in ((1, 0), (2, 1), (3, 0), (4, 1)):
        acquire(manager, session, cache_id, 2, priority)
    wait = acquire(manager, session, 5, 2, priority=2)
    assert not wait.is_over
    assert manager.revoked(session) == [3]
    release(manager, session, 3)
    assert len(wait.blocks) == 2
    assert manager.lessor.counters.num_preempted == 1
    manager.check()


def test_a_request_of_equal_priority_never_displaces_an_older_one(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=4)
    session = manager.join()
    acquire(manager, session, 1, 2)
    acquire(manager, session, 2, 2)
    wait = acquire(manager, session, 3, 2)
    assert isinstance(wait.outcome, PoolExhaustedError)
    assert manager.revoked(session) == []
    manager.check()


def test_an_older_lease_that_grows_displaces_the_younger_ones(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=6)
    old, young = manager.join("w1"), manager.join("w2")
    acquire(manager, old, 1, 2)
    acquire(manager, young, 1, 2)
    acquire(manager, young, 2, 2)
    wait = extend(manager, old, 1, 5)
    assert manager.revoked(young) == [1, 2]
    release(manager, young, 2)
    assert not wait.is_over
    release(manager, young, 1)
    assert len(wait.blocks) == 5
    manager.check()


def test_nobody_gives_way_when_all_together_are_not_enough(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=6)
    session = manager.join()
    for cache_id in (1, 2, 3):
        acquire(manager, session, cache_id, 2)
    wait = extend(manager, session, 2, 6)
    assert isinstance(wait.outcome, PoolExhaustedError)
    assert manager.revoked(session) == []
    manager.check()


def test_the_oldest_never_gives_way_whatever_its_priority(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=4)
    session = manager.join()
    acquire(manager, session, 1, 2, priority=-5)
    acquire(manager, session, 2, 2, priority=-5)
    first = acquire(manager, session, 3, 2, priority=9)
    assert manager.revoked(session) == [2]
    release(manager, session, 2)
    assert len(first.blocks) == 2
    second = acquire(manager, session, 4, 2, priority=10)
    assert manager.revoked(session) == [3]
    third = acquire(manager, session, 5, 4, priority=11)
    assert isinstance(third.outcome, PoolExhaustedError)
    assert not second.is_over
    manager.check()


def test_what_is_given_up_is_set_aside_and_younger_requests_queue_behind(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8)
    session = manager.join()
    for cache_id in (1, 2, 3):
        acquire(manager, session, cache_id, 2)
    wait = extend(manager, session, 1, 6)  # needs 4, 2 are free, 3 has to give way
    assert manager.revoked(session) == [3]
    with pytest.raises(PoolExhaustedError, match="set aside for an older request"):
        manager.acquire(session, 4, 1)
    queued = acquire(manager, session, 5, 1)
    assert not queued.is_over
    release(manager, session, 3)
    assert len(wait.blocks) == 6
    assert isinstance(queued.outcome, PoolExhaustedError)  # the first now, with nobody left to give way
    manager.check()


def test_an_older_request_goes_before_the_waiters(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=6)
    session = manager.join()
    first = acquire(manager, session, 1, 2).outcome
    assert isinstance(first, Lease)
    for cache_id in (2, 3):
        acquire(manager, session, cache_id, 2)
    release(manager, session, 1)
    assert extend(manager, session, 2, 4).is_over
    waiting = extend(manager, session, 2, 5)
    assert not waiting.is_over
    resumed = acquire(manager, session, 4, 2, age_ticket=first.age_ticket)
    assert manager.revoked(session) == [3]
    release(manager, session, 3)
    assert len(resumed.blocks) == 2
    manager.check()


def test_a_victim_that_does_not_answer_is_passed_over_and_stays_revoked(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=6, preempt_timeout_s=2.0)
    old, hung = manager.join("w1"), manager.join("w2")
    acquire(manager, old, 1, 2)
    acquire(manager, old, 2, 2)
    acquire(manager, hung, 1, 2)
    wait = extend(manager, old, 1, 4)
    assert manager.revoked(hung) == [1]
    manager.pass_time(2.4)
    assert manager.revoked(old) == [2]
    assert manager.revoked(hung) == [1]
    assert not wait.is_over
    manager.pass_time(2.4)
    assert isinstance(wait.outcome, PoolExhaustedError)
    assert len(old.leases[1].blocks) == 2
    manager.check()


def test_a_wait_ends_with_its_deadline_at_the_latest(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=4, preempt_timeout_s=60.0)
    session = manager.join()
    for cache_id in (1, 2):
        acquire(manager, session, cache_id, 2)
    first = extend(manager, session, 1, 4, wait_s=3.0)
    behind = acquire(manager, session, 3, 1, wait_s=1.0)
    manager.pass_time(1.5)
    assert isinstance(behind.outcome, PoolExhaustedError)
    assert not first.is_over
    manager.pass_time(2)
    assert isinstance(first.outcome, PoolExhaustedError)
    assert len(manager.lessor.waiting) == 0
    manager.check()


def test_a_victims_own_wait_ends_and_it_gets_nothing_more(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=6, preempt_timeout_s=60.0)
    session = manager.join()
    for cache_id in (1, 2, 3):
        acquire(manager, session, cache_id, 2)
    older = extend(manager, session, 1, 4)
    assert manager.revoked(session) == [3]
    middle = extend(manager, session, 2, 3)
    assert not middle.is_over
    with pytest.raises(LeaseRevokedError):
        manager.lessor.book.extend(session, 3, 3)
    oldest = extend(manager, session, 1, 6)
    release(manager, session, 3)
    assert older.is_over
    assert isinstance(middle.outcome, LeaseRevokedError)
    assert manager.revoked(session) == [2]
    release(manager, session, 2)
    assert len(oldest.blocks) == 6
    manager.check()


def test_a_preempted_lease_is_sealed_released_and_resumed_as_a_hit_with_its_age(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=6)
    session = manager.join()
    chain = chain_of("a", 2)
    acquire(manager, session, 1, 2)
    victim = acquire(manager, session, 2, 3).outcome
    assert isinstance(victim, Lease)
    acquire(manager, session, 3, 1)
    wait = extend(manager, session, 1, 3)
    assert manager.revoked(session) == [3]
    release(manager, session, 3)
    wait = extend(manager, session, 1, 4)
    assert manager.revoked(session) == [2]
    assert manager.seal_all(session, 2, chain) == victim.blocks[:2]
    release(manager, session, 2)
    assert len(wait.blocks) == 4
    resumed = acquire(manager, session, 4, 2, age_ticket=victim.age_ticket, prefix_hashes=chain)
    assert isinstance(resumed.outcome, Lease)
    assert resumed.outcome.num_cached_tokens == 32
    assert resumed.outcome.age_ticket == victim.age_ticket
    manager.check()


def test_blocks_that_a_victim_shares_with_others_are_no_gain(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=4)
    session = manager.join()
    chain = chain_of("a", 2)
    acquire(manager, session, 1, 2)
    manager.seal_all(session, 1, chain)
    acquire(manager, session, 2, 3, prefix_hashes=chain)
    wait = extend(manager, session, 1, 4)
    assert manager.revoked(session) == [2]
    release(manager, session, 2)
    assert len(wait.blocks) == 4
    assert isinstance(extend(manager, session, 1, 5 - 1).outcome, Lease)
    manager.check()


@pytest.mark.parametrize("end", ["register", "silence", "death", "release", "cancel"])
def test_a_waiter_whose_caller_is_gone_ends_and_leaves_no_trace(make_manager: MakeManager, end: str) -> None:
    manager = make_manager(num_blocks=4, preempt_timeout_s=600.0, ttl_s=10.0)
    busy = manager.join("w1")
    acquire(manager, busy, 1, 2)
    acquire(manager, busy, 2, 2)
    worker = manager.worker("w2")
    session = manager.register(worker).session
    wait = acquire(manager, session, 7, 2, priority=1, wait_s=6000)
    assert not wait.is_over
    expected: type[ManagerError] | None = StaleEpochError
    if end == "register":
        manager.register(worker, {})
    elif end == "silence":
        for _ in range(6):
            manager.revoked(busy)
            manager.pass_time(2)
    elif end == "death":
        manager.lessor.stream_ended(session)
        worker.die()
        manager.lessor.tick()
    elif end == "release":
        release(manager, session, 7)
        expected = CacheIdReusedError
    else:
        assert wait.waiter is not None
        manager.lessor.waiting.cancel(wait.waiter)
        expected = None
    assert len(manager.lessor.waiting) == 0
    assert (type(wait.outcome) if wait.outcome else None) is expected
    release(manager, busy, 2)
    manager.acquire(busy, 3, 2)
    manager.check()


def test_a_repeated_acquire_that_waits_leases_once(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=4)
    session = manager.join()
    acquire(manager, session, 1, 2)
    acquire(manager, session, 2, 2)
    waits = [acquire(manager, session, 3, 2, priority=1) for _ in range(2)]
    release(manager, session, 2)
    assert waits[0].blocks is waits[1].blocks
    manager.check()


def test_a_preempted_lease_that_is_claimed_anew_is_still_to_give_way(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=4)
    worker = manager.worker()
    session = manager.register(worker).session
    acquire(manager, session, 1, 2)
    acquire(manager, session, 2, 2)
    acquire(manager, manager.join("w2"), 1, 2, priority=1)
    again = manager.register(worker, {1: [0, 1], 2: [2, 3]}).session
    assert manager.revoked(again) == [2]
    manager.check()


def test_the_session_is_told_of_a_revocation_at_once(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=4)
    session = manager.join()
    told: list[Session] = []
    manager.lessor.waiting.on_revoked = told.append
    acquire(manager, session, 1, 2)
    acquire(manager, session, 2, 2)
    acquire(manager, session, 3, 1, priority=1)
    assert told == [session]
    manager.check()
