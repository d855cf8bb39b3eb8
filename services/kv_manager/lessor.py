"""Leases: who may have how many blocks, until when, and what a worker hears about it.

Every method runs to its end without giving up the thread, and checks everything before it changes anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from services.kv_manager.block_pool import BlockPool, BlockState, NoFreeBlocksError
from services.kv_manager.config import Config
from services.kv_manager.errors import (
    CacheIdReusedError,
    NeverFitsError,
    PoolExhaustedError,
    SessionRevokedError,
    StaleEpochError,
    UnknownLeaseError,
)
from services.kv_manager.registrar import Registered, Registrar, Registration
from services.kv_manager.sessions import ABSENT, LIVE, REVOKED, Clock, Lease, Session

# Tickets of one manager life: 2^40 arrivals; the manager's epoch above them makes them grow over restarts.
_TICKET_BITS = 40


@dataclass(slots=True)
class Counters:
    """What happened since the start."""

    num_acquired: int = 0
    num_extended: int = 0
    num_released: int = 0
    num_exhausted: int = 0
    num_revoked: int = 0


class Lessor:
    """The manager's whole state, and every operation on it."""

    def __init__(self, config: Config, pool_dir: Path, clock: Clock) -> None:
        """Recovers what lies in pool_dir, which the caller has locked."""
        self.config = config
        self.pool_dir = pool_dir
        self.counters = Counters()
        self._clock = clock
        self._registrar = Registrar(config, pool_dir, clock)
        self._sessions = self._registrar.sessions
        self._last_ticket = self._registrar.manager_epoch << _TICKET_BITS
        self._last_tick = clock()
        self.started_at = self._last_tick

    @property
    def pool(self) -> BlockPool | None:
        """The pool, or None until a worker has registered."""
        return self._registrar.pool

    @property
    def manager_epoch(self) -> int:
        """Grows with every start on the same pool."""
        return self._registrar.manager_epoch

    def now(self) -> float:
        """The manager's monotonic clock, in seconds."""
        return self._clock()

    def sessions(self) -> list[Session]:
        """All sessions, the absent ones included."""
        return list(self._sessions.values())

    def register(self, request: Registration) -> Registered:
        """Opens or re-opens a session; raises and changes nothing on any doubt."""
        answer = self._registrar.register(request)
        for lease in answer.session.leases.values():
            # A ticket of another pool's manager would never grow old.
            if not 0 < lease.age_ticket <= self._last_ticket:
                lease.age_ticket = self._next_ticket()
        return answer

    def enter(self, worker_id: str, epoch: int, seq: int, acked_seq: int) -> Session:
        """The session of a call; raises StaleEpochError or StaleCallError when the call must not be served."""
        session = self._require_session(worker_id, epoch)
        session.admit(seq, acked_seq)
        return session

    def _require_session(self, worker_id: str, epoch: int) -> Session:
        session = self._sessions.get(worker_id)
        if session is not None and session.epoch == epoch and session.state != ABSENT:
            return session
        raise StaleEpochError(
            f"worker {worker_id} has no session of epoch {epoch}: it must register, claiming what it still holds",
            {"worker_id": worker_id, "epoch": str(epoch)},
        )

    def require_live(self, session: Session) -> None:
        """Raises SessionRevokedError when the session may not have anything more."""
        if session.state != LIVE:
            raise SessionRevokedError(
                f"the session of worker {session.worker.worker_id} was revoked, because the worker was silent or hung; it"
                " must release its leases at a step boundary, or register again and claim them",
                {"worker_id": session.worker.worker_id},
            )

    def acquire(
        self,
        session: Session,
        cache_id: int,
        num_blocks: int,
        *,
        priority: int = 0,
        tenant: str = "",
        age_ticket: int | None = None,
    ) -> Lease:
        """Creates a lease, whole or not at all; a repeat for a known cache id answers with the same one."""
        lease = session.leases.get(cache_id)
        if lease is not None:
            return lease
        if session.is_buried(cache_id):
            raise CacheIdReusedError(
                f"cache {cache_id} was released in this session: a late Acquire leases nothing, and ids are never reused",
                {"cache_id": str(cache_id)},
            )
        blocks = self._take(session, cache_id, num_blocks, num_blocks)
        if age_ticket is None or not 0 < age_ticket <= self._last_ticket:
            age_ticket = self._next_ticket()
        # Last, so that a lease is never visible half-built.
        lease = session.leases[cache_id] = Lease(cache_id, blocks, priority, tenant, age_ticket)
        self.counters.num_acquired += 1
        return lease

    def extend(self, session: Session, cache_id: int, num_blocks: int) -> Lease:
        """Grows a lease to num_blocks at least; raises UnknownLeaseError where there is none, and never creates one."""
        lease = session.leases.get(cache_id)
        if lease is None:
            raise UnknownLeaseError(
                f"cache {cache_id} has no lease in this session; Extend never creates one", {"cache_id": str(cache_id)}
            )
        missing = num_blocks - len(lease.blocks)
        if missing > 0:
            lease.blocks += self._take(session, cache_id, missing, num_blocks)
            self.counters.num_extended += 1
        return lease

    def release(self, session: Session, cache_id: int, seq: int) -> int:
        """Gives a lease back, and answers how many blocks nobody holds any more. An unknown cache id is harmless.

        Either way the id is buried: its Acquire may still be under way, and must lease nothing when it arrives.
        """
        lease = session.leases.get(cache_id)
        if lease is None:
            session.bury(cache_id, seq)
            return 0
        num_freed = self._require_pool().drop(session.slot, lease.blocks)
        del session.leases[cache_id]
        session.bury(cache_id, seq)
        self.counters.num_released += 1
        return num_freed

    def _take(self, session: Session, cache_id: int, count: int, total: int) -> list[int]:
        pool = self._require_pool()
        try:
            if total > pool.num_blocks or total > self._max_blocks(session):
                raise self._never_fits(session, cache_id, total)
            return pool.take(session.slot, count)
        except NoFreeBlocksError as error:
            self.counters.num_exhausted += 1
            raise self._exhausted(cache_id, count) from error

    def _max_blocks(self, session: Session) -> int:
        return -(-session.worker.kv_capacity_tokens // self.config.block_size)

    def _never_fits(self, session: Session, cache_id: int, total: int) -> NeverFitsError:
        pool, most = self._require_pool(), self._max_blocks(session)
        return NeverFitsError(
            f"cache {cache_id} wants {total} blocks; the pool has {pool.num_blocks} ({self._size_flag()}), and the worker's"
            f" --kv-capacity of {session.worker.kv_capacity_tokens} tokens allows {most} a sequence",
            {
                "cache_id": str(cache_id),
                "needed_blocks": str(total),
                "num_blocks": str(pool.num_blocks),
                "max_blocks_per_sequence": str(most),
            },
        )

    def _exhausted(self, cache_id: int, count: int) -> PoolExhaustedError:
        pool = self._require_pool()
        return PoolExhaustedError(
            f"cache {cache_id} needs {count} blocks and {pool.num_free} of {pool.num_blocks} are free: raise the manager's"
            f" {self._size_flag()}, or lower the decoders' --max-seqs",
            {
                "cache_id": str(cache_id),
                "needed_blocks": str(count),
                "free_blocks": str(pool.num_free),
                "num_blocks": str(pool.num_blocks),
            },
            pool.files.pool_id.hex(),
        )

    def _size_flag(self) -> str:
        if self.config.pool_bytes is not None:
            return f"--pool-bytes (now {self.config.pool_bytes})"
        return f"--num-blocks (now {self._require_pool().num_blocks})"

    def _next_ticket(self) -> int:
        self._last_ticket = max(self._last_ticket + 1, (self.manager_epoch << _TICKET_BITS) + 1)
        return self._last_ticket

    def keepalive(self, worker_id: str, epoch: int, busy_ms: int | None) -> list[int]:
        """Notes that the worker speaks, and answers the cache ids that it must give up; raises StaleEpochError."""
        session = self._require_session(worker_id, epoch)
        session.last_seen = self._clock()
        session.busy_ms = busy_ms
        is_hung = busy_ms is not None and busy_ms >= self.config.hang_limit_s * 1000
        if session.state == LIVE and is_hung:
            self._revoke(session, f"its step has lasted {busy_ms} ms")
        elif session.state == REVOKED and not is_hung and not session.leases:
            self._registrar.restore(session)
        return self.revoked_cache_ids(session)

    def revoked_cache_ids(self, session: Session) -> list[int]:
        """The leases that the worker must give up, repeated until it has."""
        if session.state == REVOKED:
            return list(session.leases)
        return [lease.cache_id for lease in session.leases.values() if lease.revoked]

    def stream_ended(self, worker_id: str, epoch: int) -> None:
        """A keepalive stream has ended: the process may be dying, so look for its lock to come free soon."""
        session = self._sessions.get(worker_id)
        if session is not None and session.epoch == epoch:
            session.probe_until = self._clock() + self.config.ttl_s

    @property
    def tick_interval_s(self) -> float:
        """How soon tick should be called again: often while some process may be dying."""
        now = self._clock()
        if any(session.probe_until > now for session in self._sessions.values()):
            return 0.02
        return min(0.25, self.config.ttl_s / 10)

    def tick(self) -> None:
        """Revokes who is silent for too long, and ends the sessions of who is provably dead."""
        now = self._clock()
        gap = now - self._last_tick
        self._last_tick = now
        if gap > max(1.0, self.config.ttl_s / 4):
            # The manager itself was stopped or swapped out: nobody could be heard meanwhile.
            for session in self._sessions.values():
                session.last_seen = now
        for session in self.sessions():
            is_silent = now - session.last_seen > self.config.ttl_s
            may_be_dead = session.state != LIVE or is_silent or session.probe_until > now
            if may_be_dead and session.probe is not None and not session.probe.is_held():
                self._registrar.end(session, "its lock is free")
            elif session.state == LIVE and is_silent:
                self._revoke(session, f"silent for {now - session.last_seen:.1f} s")

    def _revoke(self, session: Session, why: str) -> None:
        self._registrar.revoke(session, why)
        self.counters.num_revoked += 1

    def counts(self) -> dict[BlockState, int]:
        """Number of blocks in each state; all 0 until the pool exists."""
        return self.pool.counts() if self.pool is not None else dict.fromkeys(BlockState, 0)

    def leases(self, worker_id: str = "") -> Iterable[tuple[Session, Lease]]:
        """Every lease with its session, or one worker's."""
        for session in self._sessions.values():
            if not worker_id or session.worker.worker_id == worker_id:
                for lease in session.leases.values():
                    yield session, lease

    def _require_pool(self) -> BlockPool:
        assert self.pool is not None, "there are no sessions without a pool"
        return self.pool

    def check(self) -> None:
        """Proves that pool, headers, sessions and tables agree; raises AssertionError. O(blocks)."""
        if self.pool is None:
            assert not self._sessions, "sessions without a pool"
            return
        self.pool.check()
        self.pool.check_references({session.slot: session.references() for session in self._sessions.values()})
        for session, lease in self.leases():
            assert not session.is_buried(lease.cache_id), f"lease {lease.cache_id} has a tombstone"
            assert len(set(lease.blocks)) == len(lease.blocks), f"lease {lease.cache_id} has a block twice"
            assert lease.blocks, f"lease {lease.cache_id} is empty"

    def close(self) -> None:
        """Closes the files; every lease stays as it is in them."""
        for session in self._sessions.values():
            if session.probe is not None:
                session.probe.close()
        if self.pool is not None:
            self.pool.files.close()
