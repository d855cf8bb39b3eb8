"""Leases on a fake clock: the manager's rows of BEHAVIOURS.md."""

from __future__ import annotations

import gc
import itertools
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from protos import kv_manager_pb2 as pb
from protos import rich_status
from services.kv_manager.block_pool import BlockState
from services.kv_manager.errors import (
    CacheIdReusedError,
    NeverFitsError,
    PoolExhaustedError,
    StaleCallError,
    UnackedCallsError,
    UnknownLeaseError,
    to_status,
)
from services.kv_manager.sessions import MAX_TOMBSTONES
from services.kv_manager.translate import registration
from tests.kv_manager.helpers import FakeClock, Manager, chain_of, geometry

MakeManager = Callable[..., Manager]


def test_s05_acquire_of_a_known_id_changes_nothing(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8)
    session = manager.join()
    first = list(manager.acquire(session, 7, 3).blocks)
    again = manager.acquire(session, 7, 5)
    assert again.blocks == first
    assert manager.lessor.counts()[BlockState.LEASED] == 3
    assert manager.lessor.counters.num_acquired == 1
    manager.check()


@pytest.mark.parametrize("block_size", [8, 16, 32])
def test_s08_any_power_of_two_is_a_block_size_and_16_the_default(make_manager: MakeManager, block_size: int) -> None:
    manager = make_manager(block_size=block_size)
    manager.join(max_seqs=2, kv_capacity_tokens=64)
    assert manager.lessor.pool is not None
    assert manager.lessor.pool.files.block_size == block_size
    assert manager.lessor.pool.num_blocks == 2 * 64 // block_size
    manager.check()


def test_s09_s10_the_default_pool_holds_the_first_workers_max_seqs_at_full_capacity(make_manager: MakeManager) -> None:
    manager = make_manager()
    manager.join(max_seqs=32, kv_capacity_tokens=2041)
    assert manager.lessor.pool is not None
    assert manager.lessor.pool.num_blocks == 32 * 128
    manager.check()


def test_s10_pool_bytes_overrides_the_default_size(make_manager: MakeManager) -> None:
    manager = make_manager(pool_bytes=10 * 4096 + 17)
    manager.join()
    assert manager.lessor.pool is not None
    assert manager.lessor.pool.num_blocks == 10
    manager.check()


def test_s20_one_pool_bytes_holds_nearly_twice_the_blocks_in_int8(tmp_path: Path) -> None:
    num_blocks = {}
    for kv_dtype in (pb.KV_DTYPE_BF16, pb.KV_DTYPE_INT8):
        manager = Manager(tmp_path / str(kv_dtype), FakeClock(), pool_bytes=64 << 20)
        request = manager.worker().request()
        request.geometry.CopyFrom(geometry(kv_dtype=kv_dtype, layer_ids=range(8), num_kv_heads=4, head_dim=128))
        manager.lessor.register(registration(request))
        assert manager.lessor.pool is not None
        num_blocks[kv_dtype] = manager.lessor.pool.num_blocks
        manager.check()
        manager.close()
    # A row of 256 bytes becomes one of 128 with a scale of 4.
    assert num_blocks == {pb.KV_DTYPE_BF16: 256, pb.KV_DTYPE_INT8: 256 * 256 // 132}


def test_s12_s31_one_block_holds_all_layers_so_one_table_serves_them(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=4)
    lease = manager.acquire(manager.join(), 1, 2)
    assert manager.lessor.pool is not None
    assert manager.lessor.pool.files.data.header.shape.num_layers == 2
    assert lease.blocks == [0, 1]
    manager.check()


def test_s16_blocks_come_out_in_order_and_the_last_released_first(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8)
    session = manager.join()
    assert manager.acquire(session, 1, 3).blocks == [0, 1, 2]
    assert manager.acquire(session, 2, 2).blocks == [3, 4]
    manager.release(session, 1)
    manager.release(session, 2)
    assert manager.acquire(session, 3, 2).blocks == [3, 4]
    assert manager.acquire(session, 4, 3).blocks == [0, 1, 2]
    manager.check()


def test_s17_s28_a_new_lease_is_a_table_with_nothing_in_it_yet(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8)
    session = manager.join()
    for cache_id in (1, 2):
        lease = manager.acquire(session, cache_id, 3)
        assert len(lease.blocks) == 3
        assert lease.num_cached_tokens == 0
        manager.release(session, cache_id)
    manager.check()


def test_s21_a_full_reservation_is_all_or_nothing(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=20)
    session = manager.join(kv_capacity_tokens=256)
    assert len(manager.acquire(session, 1, 16).blocks) == 16
    with pytest.raises(PoolExhaustedError):
        manager.acquire(session, 2, 16)
    assert manager.lessor.counts()[BlockState.FREE] == 4
    manager.check()


def test_s22_an_exception_in_the_middle_of_any_operation_leaves_the_pool_consistent(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = make_manager(num_blocks=16)
    session = manager.join()
    manager.acquire(session, 1, 3)
    assert manager.lessor.pool is not None
    meta = manager.lessor.pool.files.meta
    operations = [
        ("write_leased", lambda: manager.acquire(session, 2, 4)),
        ("write_leased", lambda: manager.lessor.book.extend(session, 1, 5)),
        ("write_free", lambda: manager.release(session, 1)),
    ]
    for method, operation in operations:
        original = getattr(meta, method)
        fail_once = iter([True])

        def broken(
            blocks: list[int], *rest: object, write: Callable[..., None] = original, once: object = fail_once
        ) -> None:
            if next(once, False):  # type: ignore[call-overload]
                write(list(blocks)[:2], *rest)
                raise RuntimeError("a fault in the middle of the stores")
            write(blocks, *rest)

        monkeypatch.setattr(meta, method, broken)
        with pytest.raises(RuntimeError):
            operation()
        monkeypatch.undo()
        manager.check()
        assert len(session.leases[1].blocks) == 3
        assert manager.lessor.counts()[BlockState.LEASED] == 3


@pytest.mark.parametrize("fails_at", range(4))
def test_s22_an_exception_while_shared_blocks_are_given_back_leaves_the_lease_whole(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    manager = make_manager(num_blocks=16)
    session, other = manager.join(), manager.join("w2")
    chain = chain_of("a", 3)
    manager.acquire(session, 1, 4)
    manager.seal_all(session, 1, chain)
    shared = manager.acquire(other, 2, 4, prefix_hashes=chain)
    pool = manager.lessor.pool
    assert pool is not None
    pool.discard(shared.blocks[1])  # void: it goes to nobody when its last holder has let go
    manager.release(session, 1)
    before = pool.counts()
    stores = {name: getattr(pool.files.meta, name) for name in ("write_holders", "write_void", "write_free")}
    num_stores = itertools.count()

    def breaking(store: Callable[..., None]) -> Callable[..., None]:
        def stored(*arguments: object) -> None:
            if next(num_stores) == fails_at:
                raise RuntimeError("a fault between two stores")
            store(*arguments)

        return stored

    for name, store in stores.items():
        monkeypatch.setattr(pool.files.meta, name, breaking(store))
    with pytest.raises(RuntimeError):
        manager.release(other, 2)
    monkeypatch.undo()
    assert pool.counts() == before
    assert other.leases[2].blocks == shared.blocks
    manager.check()
    manager.release(other, 2)
    assert [pool.counts()[state] for state in (BlockState.FREE, BlockState.CACHED)] == [14, 2]
    manager.check()


def test_s24_s30_an_exhausted_acquire_raises_and_leaves_the_id_unregistered(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=4)
    session = manager.join()
    manager.acquire(session, 1, 2)
    manager.acquire(session, 3, 1)
    with pytest.raises(PoolExhaustedError):
        manager.acquire(session, 2, 2)
    with pytest.raises(PoolExhaustedError):
        manager.lessor.book.extend(session, 1, 4)
    assert 2 not in session.leases
    assert session.leases[1].blocks == [0, 1]
    assert manager.lessor.counts()[BlockState.FREE] == 1
    manager.release(session, 1)
    assert len(manager.acquire(session, 2, 2).blocks) == 2
    manager.check()


def test_s25_the_exhausted_message_names_the_cache_the_blocks_and_the_settings(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=4)
    session = manager.join()
    manager.acquire(session, 1, 3)
    with pytest.raises(PoolExhaustedError) as caught:
        manager.acquire(session, 42, 2)
    for part in ("cache 42", "needs 2 blocks", "1 of 4 are free", "--num-blocks (now 4)", "--max-seqs"):
        assert part in caught.value.message
    status = to_status(caught.value)
    info = rich_status.error_info(status)
    assert info.reason == "POOL_EXHAUSTED"
    metadata = dict(info.metadata)
    assert int(metadata.pop("age_ticket")) == session.leases[1].age_ticket + 1
    assert metadata == {"cache_id": "42", "needed_blocks": "2", "free_blocks": "1", "num_blocks": "4"}
    assert rich_status.retry_delay_s(status) == 1.0
    manager.check()


def test_s26_a_million_failed_acquires_leave_nothing_behind(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=4)
    session = manager.join()
    manager.acquire(session, 0, 4)
    acquire = manager.lessor.book.acquire

    def fail(first: int, count: int) -> None:
        for cache_id in range(first, first + count):
            try:
                acquire(session, cache_id, 1)
            except PoolExhaustedError:
                continue
            raise AssertionError("the pool should be exhausted")

    started = time.process_time()
    fail(1, 980_000)
    tracemalloc.start()
    fail(2_000_000, 1_000)
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    fail(3_000_000, 19_000)
    gc.collect()
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert after - before < 10_000
    assert (len(session.leases), session.num_tombstones) == (1, 0)
    assert time.process_time() - started < 30  # 10 on an idle core
    manager.check()


def test_s29_a_lease_is_not_visible_before_its_blocks_are(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = make_manager(num_blocks=4)
    session = manager.join()
    assert manager.lessor.pool is not None
    pool = manager.lessor.pool
    take = pool.take

    def watched(slot: int, count: int) -> list[int]:
        assert 5 not in session.leases
        return take(slot, count)

    monkeypatch.setattr(pool, "take", watched)
    assert manager.acquire(session, 5, 2).blocks == [0, 1]
    manager.check()


def test_s34_a_new_lease_has_nothing_of_a_longer_old_table(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=16)
    session = manager.join()
    old = list(manager.acquire(session, 1, 10).blocks)
    manager.release(session, 1)
    new = manager.acquire(session, 2, 3)
    assert new.blocks == old[:3]
    assert new.blocks is not old
    manager.check()


def test_extend_names_an_absolute_length_so_a_repeat_changes_nothing(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8)
    session = manager.join()
    manager.acquire(session, 1, 2)
    for _ in range(3):
        assert manager.lessor.book.extend(session, 1, 4).blocks == [0, 1, 2, 3]
    assert manager.lessor.book.extend(session, 1, 1).blocks == [0, 1, 2, 3]
    assert manager.lessor.counters.num_extended == 1
    manager.check()


def test_extend_never_creates_a_lease(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8)
    session = manager.join()
    with pytest.raises(UnknownLeaseError):
        manager.lessor.book.extend(session, 9, 2)
    assert not session.leases
    manager.check()


def test_more_blocks_than_the_pool_or_the_capacity_allow_never_fit(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8)
    small = manager.join("small", kv_capacity_tokens=40)
    large = manager.join("large", kv_capacity_tokens=4096)
    with pytest.raises(NeverFitsError, match="allows 3 a sequence"):
        manager.acquire(small, 1, 4)
    with pytest.raises(NeverFitsError, match="the pool has 8"):
        manager.acquire(large, 1, 9)
    manager.acquire(small, 1, 3)
    with pytest.raises(NeverFitsError):
        manager.lessor.book.extend(small, 1, 4)
    manager.check()


def test_a_released_cache_id_leases_nothing_when_its_acquire_arrives_late(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8)
    session = manager.join()
    manager.acquire(session, 1, 2)
    manager.release(session, 1)
    manager.release(session, 2)  # overtook its Acquire
    for cache_id in (1, 2):
        with pytest.raises(CacheIdReusedError):
            manager.acquire(session, cache_id, 2)
    assert manager.lessor.counts()[BlockState.FREE] == 8
    manager.check()


def test_a_tombstone_lasts_until_every_copy_of_its_acquire_is_refused(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8)
    session = manager.join()
    session.admit(seq=1, acked_seq=0)
    manager.acquire(session, 1, 2)
    session.admit(seq=2, acked_seq=1)
    manager.lessor.book.release(session, [1], 2)
    assert session.num_tombstones == 1
    session.admit(seq=3, acked_seq=2)
    assert session.num_tombstones == 0
    with pytest.raises(StaleCallError):
        session.admit(seq=1, acked_seq=0)
    manager.check()


def test_a_worker_that_never_acknowledges_is_stopped_before_its_tombstones_grow_without_bound(
    make_manager: MakeManager,
) -> None:
    manager = make_manager(num_blocks=8)
    session = manager.join()
    for seq in range(1, MAX_TOMBSTONES + 1):
        session.admit(seq, 0)
        manager.lessor.book.release(session, [seq], seq)
    with pytest.raises(UnackedCallsError):
        session.admit(MAX_TOMBSTONES + 1, 0)
    session.admit(MAX_TOMBSTONES + 1, MAX_TOMBSTONES)
    assert session.num_tombstones == 0
    manager.check()


def test_age_tickets_grow_over_arrivals_and_restarts_and_are_kept_when_sent_again(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=8)
    worker = manager.worker()
    session = manager.register(worker).session
    first = manager.acquire(session, 1, 1).age_ticket
    second = manager.acquire(session, 2, 1).age_ticket
    assert second > first
    manager.release(session, 1)
    assert manager.acquire(session, 3, 1, age_ticket=first).age_ticket == first
    assert manager.acquire(session, 4, 1, age_ticket=1 << 63).age_ticket < 1 << 63
    manager.crash_and_restart()
    session = manager.register(worker, {2: [1]}).session
    assert manager.acquire(session, 5, 1).age_ticket > second
    manager.check()
