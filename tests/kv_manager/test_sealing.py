"""Sealed, cached and shared blocks: reuse, deduplication, forks, eviction, quotas, and what a restart keeps of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from services.kv_manager.block_pool import BlockPool, BlockState
from services.kv_manager.errors import (
    NeverFitsError,
    PoolExhaustedError,
    SealRefusedError,
    TenantQuotaError,
    UnknownLeaseError,
)
from services.kv_manager.leasebook import SealOrder, tenant_digest
from services.kv_manager.scrub import Verifier
from tests.kv_manager.helpers import Manager, chain_of

MakeManager = Callable[..., Manager]


def counts(manager: Manager) -> tuple[int, int, int, int, int]:
    """Free, leased, sealed, cached and quarantined blocks."""
    by_state = manager.lessor.counts()
    return tuple(by_state[state] for state in BlockState)  # type: ignore[return-value]


def pool_of(manager: Manager) -> BlockPool:
    assert manager.lessor.pool is not None
    return manager.lessor.pool


def verify(manager: Manager, *chains: list[bytes]) -> None:
    """What the service does before it looks a prefix up."""
    asyncio.run(Verifier(manager.lessor).verify_for_hits(chains))


def test_a_sealed_prefix_is_shared_with_a_later_lease_and_outlives_its_own(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8)
    session = manager.join()
    chain = chain_of("a", 2)
    manager.acquire(session, 1, 3)
    assert manager.seal_all(session, 1, chain) == [0, 1]
    assert counts(manager) == (5, 1, 2, 0, 0)
    shared = manager.acquire(session, 2, 4, prefix_hashes=chain)
    assert (shared.blocks[:2], shared.num_cached_tokens) == ([0, 1], 32)
    manager.release(session, 1)
    assert counts(manager) == (4, 2, 2, 0, 0)
    manager.release(session, 2)
    assert counts(manager) == (6, 0, 0, 2, 0)
    again = manager.acquire(manager.join("w2"), 1, 3, prefix_hashes=chain)
    assert (again.blocks[:2], again.num_cached_tokens) == ([0, 1], 32)
    assert manager.lessor.counters.num_hits == 4
    manager.check()


def test_the_longest_chain_that_is_there_is_found_and_nothing_behind_a_gap(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8)
    session = manager.join()
    chain = chain_of("a", 4)
    manager.acquire(session, 1, 2)
    manager.seal_all(session, 1, chain[:2])
    assert manager.acquire(session, 2, 4, prefix_hashes=chain).num_cached_tokens == 32
    assert manager.acquire(session, 3, 1, prefix_hashes=chain[1:]).num_cached_tokens == 16
    assert manager.acquire(session, 4, 1, prefix_hashes=chain_of("b", 2)).num_cached_tokens == 0
    manager.check()


def test_a_lease_never_gets_more_hits_than_blocks(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8)
    session = manager.join()
    chain = chain_of("a", 3)
    manager.acquire(session, 1, 3)
    manager.seal_all(session, 1, chain)
    assert manager.acquire(session, 2, 2, prefix_hashes=chain).blocks == [0, 1]
    manager.check()


def test_sealing_what_is_sealed_already_answers_with_the_existing_block(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8)
    first, second = manager.join("w1"), manager.join("w2")
    chain = chain_of("a", 2)
    manager.acquire(first, 1, 2)
    manager.acquire(second, 1, 2)
    manager.seal_all(first, 1, chain)
    assert manager.seal_all(second, 1, chain) == [0, 1]
    lease = second.leases[1]
    assert (lease.blocks, lease.duplicates) == ([0, 1], {2, 3})
    assert counts(manager) == (4, 2, 2, 0, 0)
    # A repeat, with the block that was sent first.
    repeat = SealOrder(1, 0, 2, chain[0], bytes(32), 16, 0)
    assert manager.lessor.book.seal(second, repeat) == 0
    assert manager.lessor.book.release_duplicates(second, 1, [2, 0, 3, 7]) == 2
    assert manager.lessor.book.release_duplicates(second, 1, [2, 3]) == 0
    assert counts(manager) == (6, 0, 2, 0, 0)
    manager.release(first, 1)
    assert counts(manager) == (6, 0, 2, 0, 0)
    manager.check()


def test_releasing_a_lease_gives_its_duplicates_back_too(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8)
    session = manager.join()
    chain = chain_of("a", 1)
    for cache_id in (1, 2):
        manager.acquire(session, cache_id, 1)
        manager.seal_all(session, cache_id, chain)
    assert session.leases[2].duplicates == {1}
    manager.release(session, 2)
    manager.release(session, 1)
    assert counts(manager) == (7, 0, 0, 1, 0)
    manager.check()


def test_a_block_that_may_not_be_sealed_stays_writable(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8)
    session = manager.join()
    chain, other = chain_of("a", 3), chain_of("b", 1)
    manager.acquire(session, 1, 3)
    book = manager.lessor.book
    with pytest.raises(SealRefusedError, match="the block before it"):
        manager.seal(session, 1, 1, chain)
    manager.seal(session, 1, 0, chain)
    with pytest.raises(SealRefusedError, match="another content"):
        manager.seal(session, 1, 0, other)
    with pytest.raises(SealRefusedError, match="names block 1"):
        book.seal(session, SealOrder(1, 1, 2, chain[1], chain[0], 16, 0))
    with pytest.raises(SealRefusedError, match="has 3 blocks"):
        book.seal(session, SealOrder(1, 3, 2, chain[1], chain[0], 16, 0))
    with pytest.raises(SealRefusedError, match="elsewhere"):
        book.seal(session, SealOrder(1, 1, 1, chain[0], chain[0], 16, 0))
    with pytest.raises(UnknownLeaseError):
        book.seal(session, SealOrder(9, 0, 1, chain[0], chain[0], 16, 0))
    assert counts(manager) == (5, 2, 1, 0, 0)
    manager.check()


def test_a_fork_shares_the_sealed_front_and_gets_fresh_blocks_behind(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=12)
    session = manager.join()
    manager.acquire(session, 1, 3, priority=5)
    manager.seal_all(session, 1, chain_of("a", 2))
    fork = manager.lessor.book.fork(session, 1, 2, 4, 9)
    assert (fork.blocks[:2], fork.num_cached_tokens) == ([0, 1], 32)
    assert not set(fork.blocks[2:]) & set(session.leases[1].blocks)
    assert (fork.priority, fork.age_ticket) == (5, session.leases[1].age_ticket)
    assert manager.lessor.book.fork(session, 1, 2, 4, 9) is fork
    assert manager.lessor.book.fork(session, 1, 3, 2, 1).blocks[:1] == [0]
    with pytest.raises(UnknownLeaseError):
        manager.lessor.book.fork(session, 77, 4, 1, 1)
    manager.release(session, 1)
    manager.check()
    manager.release(session, 2)
    manager.release(session, 3)
    assert counts(manager) == (10, 0, 0, 2, 0)
    manager.check()


def test_a_fork_that_finds_no_blocks_shares_nothing(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=4)
    session = manager.join()
    manager.acquire(session, 1, 3)
    manager.seal_all(session, 1, chain_of("a", 2))
    with pytest.raises(PoolExhaustedError):
        manager.lessor.book.fork(session, 1, 2, 4, 2)
    assert list(session.leases) == [1]
    manager.check()


def test_cached_blocks_give_way_the_longest_unused_first_and_deeper_ones_before_their_parents(
    make_manager: MakeManager,
) -> None:
    manager = make_manager(num_blocks=6)
    session = manager.join()
    chains = {1: chain_of("a", 3), 2: chain_of("b", 3)}
    for cache_id, chain in chains.items():
        manager.acquire(session, cache_id, 3)
        manager.seal_all(session, cache_id, chain)
    manager.release(session, 1)
    manager.release(session, 2)
    pool = pool_of(manager)
    gone = []
    for cache_id in range(3, 9):
        before = {
            content_hash for chain in chains.values() for content_hash in chain if pool.find(content_hash) is not None
        }
        manager.acquire(session, cache_id, 1)
        gone += [content_hash for content_hash in before if pool.find(content_hash) is None]
    assert gone == [*reversed(chains[1]), *reversed(chains[2])]
    assert pool.num_evicted == 6
    manager.check()


def test_a_hit_makes_a_cached_chain_recently_used(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=4)
    session = manager.join()
    chains = {1: chain_of("a", 2), 2: chain_of("b", 2)}
    for cache_id, chain in chains.items():
        manager.acquire(session, cache_id, 2)
        manager.seal_all(session, cache_id, chain)
        manager.release(session, cache_id)
    manager.acquire(session, 3, 2, prefix_hashes=chains[1])
    manager.release(session, 3)
    manager.acquire(session, 4, 2)
    pool = pool_of(manager)
    assert [pool.find(content_hash) is not None for content_hash in chains[1] + chains[2]] == [True, True, False, False]
    manager.check()


def test_a_sealed_block_in_use_is_never_evicted(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=4)
    session = manager.join()
    manager.acquire(session, 1, 3)
    manager.seal_all(session, 1, chain_of("a", 3))
    with pytest.raises(PoolExhaustedError):
        manager.acquire(session, 2, 2)
    assert counts(manager) == (1, 0, 3, 0, 0)
    manager.check()


def test_a_dead_workers_sealed_blocks_are_cached_and_its_others_free_at_once(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8)
    worker = manager.worker()
    session = manager.register(worker).session
    manager.acquire(session, 1, 4)
    manager.seal_all(session, 1, chain_of("a", 2))
    manager.lessor.stream_ended(session)
    worker.die()
    manager.lessor.tick()
    assert counts(manager) == (6, 0, 0, 2, 0)
    manager.check()


def test_a_sealed_block_shared_with_a_healthy_worker_stays_in_use_when_the_other_is_revoked(
    make_manager: MakeManager,
) -> None:
    manager = make_manager(num_blocks=8, ttl_s=10.0)
    chain = chain_of("a", 1)
    silent = manager.join("w1")
    manager.acquire(silent, 1, 2)
    manager.seal_all(silent, 1, chain)
    healthy = manager.join("w2")
    manager.acquire(healthy, 1, 2, prefix_hashes=chain)
    for _ in range(8):
        manager.pass_time(2)
        manager.revoked(healthy)
    assert counts(manager) == (5, 1, 1, 0, 1)
    third = manager.acquire(healthy, 2, 1, prefix_hashes=chain)
    assert third.num_cached_tokens == 16
    for cache_id in (1, 2):
        manager.release(healthy, cache_id)
    # Only the hung worker has it now: it may be reading, so it stays put, and it can still be found.
    assert counts(manager) == (6, 0, 0, 0, 2)
    assert manager.acquire(healthy, 3, 1, prefix_hashes=chain).num_cached_tokens == 16
    assert counts(manager) == (6, 0, 1, 0, 1)
    manager.check()


def test_a_restart_keeps_sealed_blocks_and_verifies_them_before_their_first_hit(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8)
    worker = manager.worker()
    session = manager.register(worker).session
    chain = chain_of("a", 3)
    manager.acquire(session, 1, 4)
    manager.seal_all(session, 1, chain)
    worker.die()
    manager.crash_and_restart()
    assert counts(manager) == (5, 0, 0, 3, 0)
    session = manager.join("w2")
    assert manager.acquire(session, 1, 1, prefix_hashes=chain).num_cached_tokens == 0
    verify(manager, chain)
    assert manager.acquire(session, 2, 4, prefix_hashes=chain).num_cached_tokens == 48
    assert pool_of(manager).num_unverified == 0
    manager.check()


def test_bytes_that_do_not_match_their_checksum_are_never_served(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8)
    worker = manager.worker()
    session = manager.register(worker).session
    chain = chain_of("a", 3)
    manager.acquire(session, 1, 3)
    manager.seal_all(session, 1, chain)
    worker.die()
    manager.crash_and_restart()
    manager.write(1, 99)
    session = manager.join("w2")
    verify(manager, chain)
    assert manager.acquire(session, 1, 3, prefix_hashes=chain).num_cached_tokens == 16
    assert manager.lessor.counters.num_corrupt == 1
    manager.check()


def test_a_damaged_header_of_a_cached_block_costs_that_block_only(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8)
    worker = manager.worker()
    session = manager.register(worker).session
    chain = chain_of("a", 3)
    manager.acquire(session, 1, 3)
    manager.seal_all(session, 1, chain)
    manager.release(session, 1)
    worker.die()
    manager.stop()
    (path,) = manager.pool_dir.glob("*.meta")
    data = bytearray(path.read_bytes())
    data[-7 * 128 + 40] ^= 1  # block 1's content hash
    path.write_bytes(data)
    manager.crash_and_restart()
    manager.lessor.tick()
    verify(manager, chain)
    session = manager.join("w2")
    assert manager.acquire(session, 1, 3, prefix_hashes=chain).num_cached_tokens == 16
    manager.check()


def test_a_living_worker_claims_its_sealed_blocks_and_its_duplicates_over_a_restart(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=12)
    worker = manager.worker()
    session = manager.register(worker).session
    chain = chain_of("a", 2)
    for cache_id in (1, 2):
        manager.acquire(session, cache_id, 3)
    manager.seal_all(session, 1, chain)
    manager.seal(session, 2, 0, chain)
    assert session.leases[2].blocks == [0, 4, 5]
    manager.crash_and_restart()
    # It never heard that block 0 replaced its block 3.
    answer = manager.register(worker, {1: [0, 1, 2], 2: [3, 4, 5]})
    assert not answer.lost_cache_ids
    assert counts(manager) == (6, 4, 2, 0, 0)
    manager.check()
    verify(manager, chain)
    assert manager.seal(answer.session, 2, 0, chain) == 0
    assert manager.seal(answer.session, 2, 1, chain) == 1
    manager.check()


def test_a_restart_evicts_deeper_blocks_first_too(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=4)
    worker = manager.worker()
    session = manager.register(worker).session
    chain = chain_of("a", 4)
    manager.acquire(session, 1, 4)
    manager.seal_all(session, 1, chain)
    worker.die()
    manager.crash_and_restart()
    session = manager.join("w2")
    for cache_id, depth in enumerate((3, 2, 1, 0)):
        manager.acquire(session, cache_id, 1)
        assert pool_of(manager).find(chain[depth]) is None
        assert depth == 0 or pool_of(manager).find(chain[depth - 1]) is not None
    manager.check()


def test_unverified_content_gives_way_to_the_same_content_sealed_anew(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8)
    worker = manager.worker()
    session = manager.register(worker).session
    chain = chain_of("a", 1)
    manager.acquire(session, 1, 1)
    manager.seal_all(session, 1, chain)
    worker.die()
    manager.crash_and_restart()
    session = manager.join("w2")
    fresh = manager.acquire(session, 1, 1).blocks[0]
    assert manager.seal(session, 1, 0, chain) == fresh
    assert counts(manager) == (7, 0, 1, 0, 0)
    manager.check()


def test_a_tenant_may_not_hold_more_blocks_than_its_quota(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=16, tenant_quotas={"alice": 4, "*": 6})
    first, second = manager.join("w1"), manager.join("w2")
    manager.acquire(first, 1, 3, tenant="alice")
    with pytest.raises(TenantQuotaError, match="'alice' holds 3 of its 4") as caught:
        manager.acquire(second, 1, 2, tenant="alice")
    assert caught.value.quota_subject == "tenant:alice"
    with pytest.raises(NeverFitsError, match="--tenant-quota"):
        manager.acquire(second, 1, 5, tenant="alice")
    manager.acquire(second, 1, 1, tenant="alice")
    with pytest.raises(TenantQuotaError):
        manager.lessor.book.extend(first, 1, 4)
    manager.release(second, 1)
    assert len(manager.lessor.book.extend(first, 1, 4).blocks) == 4
    manager.acquire(second, 2, 6, tenant="bob")
    manager.release(first, 1)
    manager.acquire(second, 3, 4, tenant="alice")
    manager.check()


def test_a_quota_counts_what_a_worker_claims_and_forgets_what_a_dead_one_held(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=16, tenant_quotas={"": 4})
    worker = manager.worker()
    session = manager.register(worker).session
    manager.acquire(session, 1, 2)
    manager.acquire(session, 2, 2)
    manager.register(worker, {1: [0, 1]})
    other = manager.join("w2")
    with pytest.raises(TenantQuotaError):
        manager.acquire(other, 1, 3)
    manager.register(worker.reborn(), {})
    manager.acquire(other, 1, 4)
    manager.check()


def test_flush_drops_cached_blocks_all_or_a_tenants_and_nothing_in_use(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=16)
    session = manager.join()
    for cache_id, tenant in ((1, "alice"), (2, "bob"), (3, "alice")):
        manager.acquire(session, cache_id, 2, tenant=tenant)
        manager.seal_all(session, cache_id, chain_of(f"chain {cache_id}", 2))
    manager.release(session, 1)
    manager.release(session, 2)
    verifier = Verifier(manager.lessor)
    assert asyncio.run(verifier.flush(tenant_digest("alice"))) == 2
    assert counts(manager) == (12, 0, 2, 2, 0)
    assert asyncio.run(verifier.flush(None)) == 2
    assert counts(manager) == (14, 0, 2, 0, 0)
    manager.check()


def test_scrub_finds_a_flipped_bit_and_the_block_is_not_found_again(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=64)
    session = manager.join(kv_capacity_tokens=4096)
    chain = chain_of("a", 40)
    manager.acquire(session, 1, 40)
    manager.seal_all(session, 1, chain)

    async def scrub() -> list[tuple[int, int, bool]]:
        verifier = Verifier(manager.lessor)
        return [(step.num_checked, step.num_corrupt, step.done) async for step in verifier.scrub(0)]

    assert asyncio.run(scrub())[-1] == (40, 0, True)
    manager.write(39, 1 + chain[39][0])
    assert asyncio.run(scrub())[-1] == (40, 1, True)
    assert pool_of(manager).find(chain[39]) is None
    manager.check()
    manager.release(session, 1)
    assert counts(manager) == (25, 0, 0, 39, 0)
    assert asyncio.run(scrub())[-1] == (39, 0, True)
    manager.check()


def test_a_scrub_keeps_to_its_bytes_a_second(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=64)
    session = manager.join(kv_capacity_tokens=4096)
    manager.acquire(session, 1, 64)
    manager.seal_all(session, 1, chain_of("a", 64))
    num_bytes = 64 * pool_of(manager).files.data.header.shape.block_bytes

    async def scrub() -> float:
        loop = asyncio.get_running_loop()
        started = loop.time()
        async for _ in Verifier(manager.lessor).scrub(num_bytes * 4):
            pass
        return loop.time() - started

    assert asyncio.run(scrub()) >= 0.24
    manager.check()


def test_a_block_is_not_evicted_while_its_bytes_are_being_read(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=2)
    session = manager.join()
    manager.acquire(session, 1, 2)
    manager.seal_all(session, 1, chain_of("a", 2))
    manager.release(session, 1)
    pool = pool_of(manager)
    pool.pin(1)
    assert manager.acquire(session, 2, 1).blocks == [0]
    with pytest.raises(PoolExhaustedError):
        manager.acquire(session, 3, 1)
    pool.unpin(1)
    assert manager.acquire(session, 3, 1).blocks == [1]
    manager.check()


def test_an_exception_in_the_middle_of_a_seal_leaves_the_block_unsealed(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = make_manager(num_blocks=4)
    session = manager.join()
    manager.acquire(session, 1, 2)
    meta = pool_of(manager).files.meta
    write = meta.write_sealed

    def broken(*arguments: object) -> None:
        write(*arguments)  # type: ignore[arg-type]
        raise RuntimeError("a fault after the store")

    monkeypatch.setattr(meta, "write_sealed", broken)
    with pytest.raises(RuntimeError):
        manager.seal_all(session, 1, chain_of("a", 1))
    monkeypatch.undo()
    assert counts(manager) == (2, 2, 0, 0, 0)
    manager.check()
    assert manager.seal_all(session, 1, chain_of("a", 1)) == [0]
    manager.check()
