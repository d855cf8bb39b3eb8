"""The operations on leases: acquire, extend, fork, seal, release. Each is all or nothing, and checks before it changes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from services.kv_manager.block_pool import BlockPool
from services.kv_manager.config import Config
from services.kv_manager.counters import Counters
from services.kv_manager.errors import (
    NeverFitsError,
    PoolExhaustedError,
    SealRefusedError,
    StorageFullError,
    TenantQuotaError,
    UnknownLeaseError,
)
from services.kv_manager.meta_format import Content
from services.kv_manager.refusals import released_error, revoked_error
from services.kv_manager.registrar import Registrar
from services.kv_manager.sessions import Lease, Session

# Tickets of one manager life: 2^40 arrivals; the manager's epoch above them makes them grow over restarts.
_TICKET_BITS = 40


@dataclass(frozen=True, slots=True)
class SealOrder:
    """What a worker asks of Seal, for one block of a lease."""

    cache_id: int
    block_index: int
    block: int
    content_hash: bytes
    parent_hash: bytes
    num_tokens: int
    data_checksum: int


def rank(priority: int, age_ticket: int) -> tuple[int, int]:
    """Sorts requests: the lowest rank is served first and gives way last."""
    return -priority, age_ticket


# cache id, blocks, priority, tenant, age ticket, prefix hashes: as LeaseBook.acquire takes them
AcquireArguments = tuple[int, int, int, str, int | None, Sequence[bytes]]


class LeaseBook:
    """The leases of all sessions, over one pool."""

    def __init__(self, config: Config, registrar: Registrar, counters: Counters) -> None:
        self._config = config
        self._registrar = registrar
        self._counters = counters
        self._last_ticket = registrar.manager_epoch << _TICKET_BITS
        # Whether blocks are set aside for a request of a better rank; waiting.py puts its own in here.
        self.is_behind_waiters: Callable[[int, int], bool] = lambda _, __: False

    @property
    def pool(self) -> BlockPool:
        """The pool; there is one as soon as there is a session."""
        assert self._registrar.pool is not None, "there are no sessions without a pool"
        return self._registrar.pool

    def ticket(self, stated: int | None) -> int:
        """The stated age ticket if this pool's manager issued it, or else that of a new arrival."""
        if stated is not None and 0 < stated <= self._last_ticket:
            return stated
        self._last_ticket += 1
        return self._last_ticket

    def acquire(
        self,
        session: Session,
        cache_id: int,
        num_blocks: int,
        priority: int = 0,
        tenant: str = "",
        age_ticket: int | None = None,
        prefix_hashes: Sequence[bytes] = (),
        is_first_waiter: bool = False,
    ) -> Lease:
        """Creates a lease, whole or not at all; a repeat for a known cache id answers with the same one."""
        lease = session.leases.get(cache_id)
        if lease is not None:
            return lease
        if session.is_buried(cache_id):
            raise released_error(cache_id)
        if age_ticket is None:
            self._last_ticket = ticket = self._last_ticket + 1
        else:
            ticket = self.ticket(age_ticket)
        hits: list[int] = []
        if prefix_hashes:
            hits = self._find_chain(prefix_hashes, num_blocks)
            self._counters.num_looked_up += len(prefix_hashes)
            self._counters.num_hits += len(hits)
        lease = Lease(cache_id, hits, priority, tenant, ticket, len(hits) * self._config.block_size)
        if hits:
            self._fill_shared(session, lease, num_blocks, is_first_waiter)
        else:
            lease.blocks = self._take(session, lease, num_blocks, 0, is_first_waiter)
        # Last, so that a lease is never visible half-built.
        session.leases[cache_id] = lease
        self._counters.num_acquired += 1
        return lease

    def acquire_at_once(self, session: Session, items: Sequence[AcquireArguments]) -> list[Lease]:
        """The leases that acquire would make one by one, for a fraction of the work; none where it must look at each.

        What goes at once: new requests without a prefix, for blocks that are free, where nobody waits and no quota is set.
        """
        leases, ticket, total, worst = session.leases, self._last_ticket, 0, 0
        for cache_id, num_blocks, priority, _, age_ticket, hashes in items:
            if hashes or age_ticket or cache_id in leases or num_blocks > session.max_blocks:
                return []
            total += num_blocks
            worst = max(worst, -priority)
        cache_ids = {item[0] for item in items}
        if (
            total > self.pool.num_free
            or len(cache_ids) < len(items)
            or session.is_any_buried(cache_ids)
            or self._config.tenant_quotas
            or self.is_behind_waiters(worst, ticket + len(items))
        ):
            return []
        try:
            blocks = self.pool.take(session.slot, total)
        except StorageFullError:  # there may be room for some
            return []
        made, end = [], 0
        for cache_id, num_blocks, priority, tenant, _, _ in items:
            ticket, start, end = ticket + 1, end, end + num_blocks
            lease = leases[cache_id] = Lease(cache_id, blocks[start:end], priority, tenant, ticket)
            made.append(lease)
        self._last_ticket = ticket
        self._counters.num_acquired += len(made)
        return made

    def fork(self, session: Session, parent_id: int, cache_id: int, num_blocks: int, max_shared: int) -> Lease:
        """Creates a lease that shares the sealed blocks at the front of its parent; a repeat answers with the same."""
        lease = session.leases.get(cache_id)
        if lease is not None:
            return lease
        if session.is_buried(cache_id):
            raise released_error(cache_id)
        parent = self._require_lease(session, parent_id)
        if parent.revoked:
            raise revoked_error(parent)
        shared: list[int] = []
        for block in parent.blocks[: min(max_shared, num_blocks)]:
            if self.pool.content(block) is None:
                break
            shared.append(block)
        num_cached = len(shared) * self._config.block_size
        lease = Lease(cache_id, shared, parent.priority, parent.tenant, parent.age_ticket, num_cached)
        self._fill_shared(session, lease, num_blocks, False)
        session.leases[cache_id] = lease
        self._counters.num_acquired += 1
        return lease

    def extend(self, session: Session, cache_id: int, num_blocks: int, *, is_first_waiter: bool = False) -> Lease:
        """Grows a lease to num_blocks at least; raises UnknownLeaseError where there is none, and never creates one."""
        lease = self._require_lease(session, cache_id)
        if num_blocks <= len(lease.blocks):
            return lease
        if lease.revoked:
            raise revoked_error(lease)
        lease.blocks += self._take(session, lease, num_blocks, len(lease.blocks), is_first_waiter)
        self._counters.num_extended += 1
        return lease

    def release(self, session: Session, cache_ids: Sequence[int], seq: int) -> int:
        """Gives leases back, and answers how many blocks nobody holds any more. An unknown cache id is harmless.

        Each id is buried: its Acquire may still be under way, and must lease nothing when it arrives.
        """
        known = [lease for cache_id in dict.fromkeys(cache_ids) if (lease := session.leases.get(cache_id)) is not None]
        blocks: list[int] = []
        # The pool takes the last block first: leases are given back in the order of the call.
        for lease in reversed(known):
            blocks += lease.blocks
            if lease.duplicates:
                blocks += lease.duplicates
        num_freed = self.pool.drop(session.slot, blocks)
        for lease in known:
            del session.leases[lease.cache_id]
            if self._config.tenant_quotas:
                session.tenant_blocks[lease.tenant] -= len(lease.blocks)
        session.bury(cache_ids, seq)
        self._counters.num_released += len(known)
        return num_freed

    def release_duplicates(self, session: Session, cache_id: int, blocks: Sequence[int]) -> int:
        """Gives back blocks that a Seal replaced in the lease's table; leaves every other block alone."""
        lease = session.leases.get(cache_id)
        if lease is None:
            return 0
        mine = [block for block in dict.fromkeys(blocks) if block in lease.duplicates]
        num_freed = self.pool.drop(session.slot, mine)
        lease.duplicates = lease.duplicates.difference(mine)
        return num_freed

    def seal(self, session: Session, order: SealOrder) -> int:
        """Seals one block of a lease; answers the block that its table names at that place from now on."""
        lease, pool = self._require_lease(session, order.cache_id), self.pool
        index = order.block_index
        if index >= len(lease.blocks):
            raise self._refused(order, f"the table has {len(lease.blocks)} blocks")
        present = lease.blocks[index]
        content = pool.content(present)
        if content is not None:
            if content.content_hash == order.content_hash:
                return present
            raise self._refused(order, f"block {present} is sealed with another content")
        if present != order.block:
            raise self._refused(order, f"the table names block {present} there, not {order.block}")
        if pool.is_shared(present):
            raise self._refused(order, f"block {present} is not this lease's alone")
        if index > 0:
            parent = pool.content(lease.blocks[index - 1])
            if parent is None or parent.content_hash != order.parent_hash:
                raise self._refused(order, "the block before it is not sealed with parent_hash")
        if pool.find(order.content_hash) in lease.blocks:
            raise self._refused(order, "the same content stands elsewhere in this table")
        sealed = pool.seal(session.slot, present, _content(order, lease.tenant, session.epoch))
        self._counters.num_seals += 1
        if sealed != present:
            lease.blocks[index] = sealed
            lease.duplicates |= {present}
            self._counters.num_deduplicated += 1
        return sealed

    def unverified(self, content_hashes: Iterable[bytes]) -> list[int]:
        """The blocks of a chain that could be hit, were they verified; it ends where a content is missing."""
        blocks = []
        for content_hash in content_hashes:
            block = self.pool.find(content_hash)
            if block is None:
                break
            content = self.pool.content(block)
            if content is not None and not content.verified:
                blocks.append(block)
        return blocks

    def recount_tenants(self, session: Session) -> None:
        """Counts the blocks of each tenant anew, after a session took up what it had claimed."""
        session.tenant_blocks.clear()
        for lease in session.leases.values():
            session.tenant_blocks[lease.tenant] += len(lease.blocks)

    def _find_chain(self, prefix_hashes: Sequence[bytes], limit: int) -> list[int]:
        pool = self.pool
        hits: list[int] = []
        for content_hash in prefix_hashes[:limit]:
            block = pool.find(content_hash)
            if block is None:
                break
            content = pool.content(block)
            if content is None or not content.verified:
                break
            hits.append(block)
        return hits

    def _fill_shared(self, session: Session, lease: Lease, num_blocks: int, is_first_waiter: bool) -> None:
        """Completes a new lease whose table so far is blocks to share; or raises and undoes it."""
        pool, shared = self.pool, lease.blocks
        for block in shared:
            pool.share(session.slot, block)
        try:
            lease.blocks = shared + self._take(session, lease, num_blocks, 0, is_first_waiter)
        except BaseException:
            pool.drop(session.slot, shared)
            raise

    def _take(self, session: Session, lease: Lease, total: int, held: int, is_first_waiter: bool) -> list[int]:
        """Fresh blocks that make the lease's table total long; held of its blocks count for its tenant already."""
        if total > session.max_blocks:
            raise self._never_fits(session, lease, total)
        if self._config.tenant_quotas:
            self._require_quota(lease, total, total - held)
        pool = self.pool
        count = total - len(lease.blocks)
        available = pool.num_available
        if count > available or (
            not is_first_waiter and count and self.is_behind_waiters(-lease.priority, lease.age_ticket)
        ):
            raise self._exhausted(lease, count, available)
        blocks = pool.take(session.slot, count)
        if self._config.tenant_quotas:
            session.tenant_blocks[lease.tenant] += total - held
        return blocks

    def _require_lease(self, session: Session, cache_id: int) -> Lease:
        lease = session.leases.get(cache_id)
        if lease is None:
            raise UnknownLeaseError(
                f"cache {cache_id} has no lease in this session; only Acquire and Fork create one",
                {"cache_id": str(cache_id)},
            )
        return lease

    def _never_fits(self, session: Session, lease: Lease, total: int) -> NeverFitsError:
        pool, capacity = self.pool, session.worker.kv_capacity_tokens
        most = -(-capacity // self._config.block_size)
        return NeverFitsError(
            f"cache {lease.cache_id} wants {total} blocks; the pool has {pool.num_blocks} ({self._size_flag()}), and the"
            f" worker's --kv-capacity of {capacity} tokens allows {most} a sequence",
            {
                "cache_id": str(lease.cache_id),
                "needed_blocks": str(total),
                "num_blocks": str(pool.num_blocks),
                "max_blocks_per_sequence": str(most),
            },
        )

    def _require_quota(self, lease: Lease, total: int, added: int) -> None:
        quota = self._config.quota_of(lease.tenant)
        if quota is None:
            return
        used = sum(session.tenant_blocks[lease.tenant] for session in self._registrar.sessions.values())
        metadata = {
            "cache_id": str(lease.cache_id),
            "tenant": lease.tenant,
            "needed_blocks": str(added),
            "used_blocks": str(used),
            "quota_blocks": str(quota),
        }
        if total > quota:
            raise NeverFitsError(
                f"cache {lease.cache_id} wants {total} blocks, and tenant {lease.tenant!r} may have {quota} in all: raise"
                " the manager's --tenant-quota",
                metadata,
            )
        if used + added > quota:
            raise TenantQuotaError(
                f"cache {lease.cache_id} needs {added} blocks, and tenant {lease.tenant!r} holds {used} of its {quota}:"
                " wait for its other requests, or raise the manager's --tenant-quota",
                metadata,
                lease.tenant,
            )

    def _exhausted(self, lease: Lease, count: int, available: int) -> PoolExhaustedError:
        pool = self.pool
        return PoolExhaustedError(
            lease.cache_id,
            needed=count,
            free=available,
            num_blocks=pool.num_blocks,
            size_flag=self._size_flag(),
            pool_id=pool.files.pool_id,
            priority=lease.priority,
            age_ticket=lease.age_ticket,
        )

    def _refused(self, order: SealOrder, why: str) -> SealRefusedError:
        return SealRefusedError(
            f"cache {order.cache_id}, place {order.block_index}: not sealed, because {why}",
            {"cache_id": str(order.cache_id), "block_index": str(order.block_index)},
        )

    def _size_flag(self) -> str:
        if self._config.pool_bytes is not None:
            return f"--pool-bytes (now {self._config.pool_bytes})"
        return f"--num-blocks (now {self.pool.num_blocks})"


@lru_cache(maxsize=1024)
def tenant_digest(tenant: str) -> bytes:
    """What a block's header says of its tenant."""
    return hashlib.blake2b(tenant.encode(), digest_size=16).digest()


def _content(order: SealOrder, tenant: str, epoch: int) -> Content:
    return Content(
        content_hash=order.content_hash,
        parent_hash=order.parent_hash,
        num_tokens=order.num_tokens,
        data_checksum=order.data_checksum,
        tenant_digest=tenant_digest(tenant),
        generation=epoch,
    )
