"""Sessions of workers and the leases in them, as plain records: lessor.py and registrar.py change them."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass, field

from services.kv_manager.errors import StaleCallError, UnackedCallsError
from services.kv_manager.locks import LockProbe
from services.kv_manager.meta_format import WorkerRecord

# Monotonic seconds. Injected, so that tests own the time.
Clock = Callable[[], float]

LIVE = "live"
REVOKED = "revoked"
ABSENT = "absent"
# Another process has the worker's name, and nothing can prove this one dead any more: its lock file was deleted before the
# manager started, so that no descriptor leads to the lock that it may still hold. What proof remains is a reboot of the host,
# which ends every process; or a new file with the deleted one's inode, which no process can have open then. Until one of
# them is seen its blocks stay quarantined, in its own slot.
ORPHANED = "orphaned"

# A worker that never acknowledges would make the manager remember every lease it ever released.
MAX_TOMBSTONES = 1 << 16


@dataclass(slots=True, eq=False)
class Lease:
    """One block table: metadata only, for all layers at once."""

    cache_id: int
    blocks: list[int]
    priority: int
    tenant: str
    age_ticket: int
    num_cached_tokens: int = 0
    # It has to give way to an older request; repeated to the worker until Release answers.
    revoked: bool = False
    # Blocks that a Seal replaced in the table: the worker may read them until it gives them back.
    duplicates: frozenset[int] = frozenset()


@dataclass(slots=True, eq=False)
class Session:
    """One registration of a worker. `pinned` are blocks of a worker that has not come back since a restart."""

    worker: WorkerRecord
    slot: int
    probe: LockProbe | None
    state: str
    last_seen: float
    # The longest table that the worker may have: its capacity, or the whole pool.
    max_blocks: int = 0
    leases: dict[int, Lease] = field(default_factory=dict)
    pinned: list[int] = field(default_factory=list)
    # It registered with this pool mapped, so that it can bring the memory of a GPU pool back after a restart of the manager.
    maps_pool: bool = False
    busy_ms: int | None = None
    # Until then the lock is probed often: the worker's stream has ended, and sockets close before locks do.
    probe_until: float = float("-inf")
    acked_seq: int = 0
    # Blocks in the tables of each tenant's leases; kept only where quotas are set.
    tenant_blocks: Counter[str] = field(default_factory=Counter)
    _tombstones: set[int] = field(default_factory=set)
    # The same by the call that released them, the lowest sequence number first.
    _burials: list[tuple[int, list[int]]] = field(default_factory=list)
    # Calls that gave back single blocks: a late copy must not give them back a second time.
    _done: set[int] = field(default_factory=set)

    @property
    def epoch(self) -> int:
        """The epoch that the worker's calls must state."""
        return self.worker.epoch

    def references(self) -> list[int]:
        """Every reference of the session: one entry for each place in each table."""
        blocks = list(self.pinned)
        for lease in self.leases.values():
            blocks += lease.blocks
            blocks += lease.duplicates
        return blocks

    def admit(self, seq: int, acked_seq: int) -> None:
        """Notes what the worker acknowledges; raises StaleCallError for a late copy of a call that has ended.

        A tombstone goes when acked_seq has passed its Release: every call that could revive the lease is refused now.
        """
        if seq <= self.acked_seq:
            raise StaleCallError(
                f"seq {seq} is not above the acknowledged {self.acked_seq}: a late copy of a call that has ended",
                {"seq": str(seq), "acked_seq": str(self.acked_seq)},
            )
        if len(self._tombstones) + len(self._done) >= MAX_TOMBSTONES and acked_seq <= self.acked_seq:
            raise UnackedCallsError(
                f"{len(self._tombstones)} leases were released since acked_seq last advanced (it is {self.acked_seq});"
                " the worker must acknowledge the calls that have ended",
                {"acked_seq": str(self.acked_seq)},
            )
        if acked_seq > self.acked_seq:
            self.acked_seq = acked_seq
            burials = self._burials
            while burials and burials[0][0] <= acked_seq:
                self._tombstones.difference_update(heapq.heappop(burials)[1])
            if self._done:
                self._done = {done for done in self._done if done > acked_seq}

    def is_first_copy(self, seq: int) -> bool:
        """Whether the call is served for the first time; its later copies are not."""
        if seq in self._done:
            return False
        self._done.add(seq)
        return True

    def bury(self, cache_ids: Iterable[int], seq: int) -> None:
        """Leaves a tombstone for each: an Acquire of this cache id that arrives late leases nothing."""
        new = [cache_id for cache_id in cache_ids if cache_id not in self._tombstones]
        if new:
            self._tombstones.update(new)
            heapq.heappush(self._burials, (seq, new))

    def is_buried(self, cache_id: int) -> bool:
        """Whether the cache id was released in this session."""
        return cache_id in self._tombstones

    def is_any_buried(self, cache_ids: Set[int]) -> bool:
        """Whether one of them was released in this session."""
        return not self._tombstones.isdisjoint(cache_ids)

    @property
    def num_tombstones(self) -> int:
        """Released leases that are still remembered."""
        return len(self._tombstones)
