"""Leases: who may have how many blocks, until when, and what a worker hears about it.

Every method runs to its end without giving up the thread, and checks everything before it changes anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from services.kv_manager.block_pool import BlockPool, BlockState
from services.kv_manager.config import Config
from services.kv_manager.counters import Counters
from services.kv_manager.errors import SessionRevokedError, StaleEpochError
from services.kv_manager.leasebook import LeaseBook
from services.kv_manager.pool_check import check_pool, check_references
from services.kv_manager.pool_file import DataFile
from services.kv_manager.pool_memory import HOST, PoolMemory
from services.kv_manager.registrar import Registrar
from services.kv_manager.registration import Registered, Registration
from services.kv_manager.sessions import LIVE, REVOKED, Clock, Lease, Session
from services.kv_manager.waiting import WaitQueue


class Lessor:
    """The manager's whole state, and every operation on it."""

    def __init__(self, config: Config, pool_dir: Path, clock: Clock, memory: PoolMemory = HOST) -> None:
        """Recovers what lies in pool_dir, which the caller has locked."""
        self.config = config
        self.pool_dir = pool_dir
        self.counters = Counters()
        self._clock = clock
        self._registrar = Registrar(config, pool_dir, clock, memory)
        self._sessions = self._registrar.sessions
        self.events = self._registrar.events
        self.book = LeaseBook(config, self._registrar, self.counters)
        self.waiting = WaitQueue(self.book, self._sessions, self.counters, clock, config.preempt_timeout_s)
        self._last_tick = clock()
        self.started_at = self._last_tick

    @property
    def pool(self) -> BlockPool | None:
        """The pool, or None until a worker has registered."""
        return self._registrar.pool

    @property
    def pool_memory(self) -> str:
        """ "host" or "cuda"."""
        return self._registrar.memory.name

    @property
    def num_pools_lost(self) -> int:
        """Pools in GPU memory, since the start, that no living worker could bring back."""
        return self._registrar.num_pools_lost

    @property
    def data(self) -> DataFile | None:
        """Where the pool's bytes are; None until the pool exists."""
        return self.pool.files.data if self.pool is not None else None

    @property
    def manager_epoch(self) -> int:
        """Grows with every start on the same pool."""
        return self._registrar.manager_epoch

    def now(self) -> float:
        """The manager's monotonic clock, in seconds."""
        return self._clock()

    def session(self, worker_id: str) -> Session | None:
        """A worker's session."""
        return self._sessions.get(worker_id)

    def sessions(self) -> list[Session]:
        """All sessions, the absent ones included."""
        return list(self._sessions.values())

    def register(self, request: Registration) -> Registered:
        """Opens or re-opens a session; raises and changes nothing on any doubt."""
        answer = self._registrar.register(request)
        for lease in answer.session.leases.values():
            lease.age_ticket = self.book.ticket(lease.age_ticket)
        if self.config.tenant_quotas:
            self.book.recount_tenants(answer.session)
        self.waiting.pump()
        return answer

    def enter(self, worker_id: str, epoch: int, seq: int, acked_seq: int) -> Session:
        """The session of a call; raises StaleEpochError or StaleCallError when the call must not be served."""
        session = self._require_session(worker_id, epoch)
        session.admit(seq, acked_seq)
        return session

    def _require_session(self, worker_id: str, epoch: int) -> Session:
        session = self._sessions.get(worker_id)
        if session is not None and session.epoch == epoch and session.state in (LIVE, REVOKED):
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

    def keepalive(self, worker_id: str, epoch: int, busy_ms: int | None) -> Session:
        """Notes that the worker speaks; raises StaleEpochError when it has to register."""
        session = self._require_session(worker_id, epoch)
        session.last_seen = self._clock()
        session.busy_ms = busy_ms
        is_hung = busy_ms is not None and busy_ms >= self.config.hang_limit_s * 1000
        if session.state == LIVE and is_hung:
            self._revoke(session, f"its step has lasted {busy_ms} ms")
        elif session.state == REVOKED and not is_hung and not session.leases:
            self._registrar.restore(session)
        return session

    def revoked_cache_ids(self, session: Session) -> list[int]:
        """The leases that the worker must give up, repeated until it has."""
        if session.state == REVOKED:
            return list(session.leases)
        return [lease.cache_id for lease in session.leases.values() if lease.revoked]

    def stream_ended(self, session: Session) -> None:
        """A keepalive stream has ended: the process may be dying, so look for its lock to come free soon."""
        session.probe_until = self._clock() + self.config.ttl_s

    @property
    def tick_interval_s(self) -> float:
        """How soon tick should be called again: often while some process may be dying."""
        now = self._clock()
        if self.waiting or any(session.probe_until > now for session in self._sessions.values()):
            return 0.02
        return min(0.25, self.config.ttl_s / 10)

    def tick(self) -> None:
        """Revokes who is silent for too long, and ends the sessions of who is provably dead."""
        now = self._clock()
        gap = now - self._last_tick
        self._last_tick = now
        if gap > self.config.ttl_s / 4:
            # The manager itself was stopped or swapped out: nobody could be heard meanwhile. A shorter gap and the longest time
            # between two keepalives, a fifth of the TTL, are far from a whole one.
            for session in self._sessions.values():
                session.last_seen = now
        for session in self.sessions():
            is_silent = now - session.last_seen > self.config.ttl_s
            may_be_dead = session.state != LIVE or is_silent or session.probe_until > now
            if may_be_dead and session.probe is not None and not session.probe.is_held():
                self._registrar.end(
                    session, "its lock is free" if self.pool_memory == "host" else "its process is gone"
                )
            elif session.state == LIVE and is_silent:
                self._revoke(session, f"silent for {now - session.last_seen:.1f} s")
        self._registrar.drop_lost_pool()
        self.waiting.pump()

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

    def discard_corrupt(self, block: int) -> None:
        """A sealed block's bytes do not match their checksum: its content is never found again."""
        if self.pool is not None:
            self.pool.discard(block)
            self.counters.num_corrupt += 1

    def check(self) -> None:
        """Proves that pool, headers, sessions and tables agree; raises AssertionError. O(blocks)."""
        if self.pool is None:
            assert not self._sessions, "sessions without a pool"
            return
        check_pool(self.pool)
        check_references(self.pool, {session.slot: session.references() for session in self._sessions.values()})
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
