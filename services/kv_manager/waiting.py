"""Requests that wait for blocks, and the leases that give way to them.

The pool serves waiters in order of rank: priority, then age. For the first of them it revokes leases of worse rank, the
worst first; what they give up is set aside for it, and whoever ranks behind it gets nothing meanwhile. The oldest
request of all never gives way, so some request always gets to its end.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import structlog

from services.kv_manager.counters import Counters
from services.kv_manager.errors import ManagerError, PoolExhaustedError, StaleEpochError
from services.kv_manager.leasebook import LeaseBook, rank
from services.kv_manager.refusals import revoked_error
from services.kv_manager.sessions import LIVE, Clock, Lease, Session

_log = structlog.get_logger("kv_manager.waiting")

# A table, or the error that ended the wait.
Outcome = Lease | ManagerError


@dataclass(order=True)
class Waiter:
    """One item of an Acquire or Extend. `attempt` leases, or raises PoolExhaustedError when there are too few blocks."""

    rank: tuple[int, int]
    arrival: int
    session: Session = field(compare=False)
    cache_id: int = field(compare=False)
    attempt: Callable[[], Lease] = field(compare=False)
    settle: Callable[[Outcome], None] = field(compare=False)
    deadline: float = field(compare=False)
    error: PoolExhaustedError = field(compare=False)


@dataclass(frozen=True)
class _Victim:
    session: Session
    lease: Lease
    deadline: float

    @property
    def is_leased(self) -> bool:
        """Whether it is still to release its blocks."""
        return self.session.leases.get(self.lease.cache_id) is self.lease


class WaitQueue:
    """All waiters, best rank first, and the leases that were asked to give way."""

    def __init__(
        self,
        book: LeaseBook,
        sessions: dict[str, Session],
        counters: Counters,
        clock: Clock,
        preempt_timeout_s: float,
    ) -> None:
        self._book = book
        self._sessions = sessions
        self._counters = counters
        self._clock = clock
        self._preempt_timeout_s = preempt_timeout_s
        self._queue: list[Waiter] = []
        self._victims: list[_Victim] = []
        self._num_arrived = 0
        # Told of every session one of whose leases was revoked, so that its worker hears of it at once.
        self.on_revoked: Callable[[Session], None] = lambda _: None
        book.is_behind_waiters = self._is_behind

    def __len__(self) -> int:
        return len(self._queue)

    def _is_behind(self, *request_rank: int) -> bool:
        return bool(self._queue) and self._queue[0].rank < request_rank

    def wait(
        self,
        session: Session,
        error: PoolExhaustedError,
        attempt: Callable[[], Lease],
        settle: Callable[[Outcome], None],
        wait_s: float,
    ) -> Waiter:
        """Queues a request that ended with error just now; settle hears of its end, maybe before this returns."""
        self._num_arrived += 1
        waiter = Waiter(
            rank(error.priority, error.age_ticket),
            self._num_arrived,
            session,
            error.cache_id,
            attempt,
            settle,
            self._clock() + wait_s,
            error,
        )
        bisect.insort(self._queue, waiter)
        self.pump()
        return waiter

    def cancel(self, waiter: Waiter) -> None:
        """Forgets a waiter whose caller has gone; harmless when it was settled already."""
        if waiter in self._queue:
            self._queue.remove(waiter)
            self.pump()

    def pump(self) -> None:
        """Serves whom it can; to be called after anything that may have made blocks available, and with time."""
        if not self._queue:
            self._victims.clear()
            return
        now = self._clock()
        self._victims = [
            victim
            for victim in self._victims
            if victim.is_leased and victim.deadline > now and self._is_current(victim.session)
        ]
        for waiter in self._queue[1:]:
            if waiter.deadline <= now:
                self._settle(waiter, waiter.error)
        while self._queue:
            head = self._queue[0]
            outcome = self._outcome_of(head, now)
            if outcome is None:
                return
            self._settle(head, outcome)

    def _settle(self, waiter: Waiter, outcome: Outcome) -> None:
        self._queue.remove(waiter)
        waiter.settle(outcome)

    def _is_current(self, session: Session) -> bool:
        return self._sessions.get(session.worker.worker_id) is session and session.state == LIVE

    def _outcome_of(self, head: Waiter, now: float) -> Outcome | None:
        """How the first waiter's wait ends; None when it goes on."""
        if not self._is_current(head.session):
            return _stale(head.session)
        try:
            return head.attempt()
        except PoolExhaustedError as error:
            if head.deadline <= now or not self._make_room(head, error.missing, now):
                return error
            return None
        except ManagerError as error:
            return error

    def _make_room(self, head: Waiter, missing: int, now: float) -> bool:
        """Has leases of worse rank revoked until enough blocks are promised; False when there never will be."""
        promised = sum(self._gain(victim.session, victim.lease) for victim in self._victims)
        chosen: list[tuple[Session, Lease]] = []
        for session, lease in self._candidates(head) if promised < missing else ():
            if promised >= missing:
                break
            gain = self._gain(session, lease)
            if gain:
                chosen.append((session, lease))
                promised += gain
        if promised < missing:
            return False
        for session, lease in chosen:
            self._preempt(session, lease, head, now)
        return True

    def _candidates(self, head: Waiter) -> Iterable[tuple[Session, Lease]]:
        """Leases that may give way to the first waiter: the youngest of the lowest priority first, the oldest never."""
        live = [
            (session, lease)
            for session in self._sessions.values()
            if session.state == LIVE
            for lease in session.leases.values()
        ]
        oldest = min([lease.age_ticket for _, lease in live] + [waiter.rank[1] for waiter in self._queue])
        worse = [
            (session, lease)
            for session, lease in live
            if rank(lease.priority, lease.age_ticket) > head.rank and not lease.revoked and lease.age_ticket != oldest
        ]
        return sorted(worse, key=lambda pair: rank(pair[1].priority, pair[1].age_ticket), reverse=True)

    def _gain(self, session: Session, lease: Lease) -> int:
        pool, slot = self._book.pool, session.slot
        return sum(pool.is_last_reference(slot, block) for block in [*lease.blocks, *lease.duplicates])

    def _preempt(self, session: Session, lease: Lease, head: Waiter, now: float) -> None:
        lease.revoked = True
        self._victims.append(_Victim(session, lease, now + self._preempt_timeout_s))
        self._counters.num_preempted += 1
        _log.info(
            "preempted",
            worker=session.worker.worker_id,
            cache_id=lease.cache_id,
            for_worker=head.session.worker.worker_id,
            for_cache_id=head.cache_id,
        )
        for waiter in [waiter for waiter in self._queue if waiter.session is session]:
            if waiter.cache_id == lease.cache_id:
                self._settle(waiter, revoked_error(lease))
        self.on_revoked(session)


def _stale(session: Session) -> StaleEpochError:
    return StaleEpochError(
        f"the session of worker {session.worker.worker_id} with epoch {session.epoch} ended while the call waited",
        {"worker_id": session.worker.worker_id, "epoch": str(session.epoch)},
    )
