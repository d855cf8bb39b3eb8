"""A batch of leases made at once is the batch made one by one: same tables, same order, same headers, same answers."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from protos import kv_manager_pb2 as pb
from services.kv_manager import translate
from services.kv_manager.errors import ManagerError
from services.kv_manager.leasebook import AcquireArguments
from services.kv_manager.sessions import Lease, Session
from tests.kv_manager.helpers import FakeClock, Manager

NUM_BLOCKS = 24
CHAIN = [bytes([number]) * 32 for number in range(1, 5)]

_items = st.lists(
    st.builds(
        lambda cache_id, num_blocks, priority, ticket, depth: (
            cache_id,
            num_blocks,
            priority,
            "",
            ticket,
            CHAIN[:depth],
        ),
        st.integers(0, 12),
        st.integers(1, 6),
        st.integers(-1, 1),
        st.sampled_from([None, None, None, 1]),
        st.sampled_from([0, 0, 0, 3]),
    ),
    min_size=1,
    max_size=6,
)
_steps = st.lists(st.tuples(st.sampled_from(["acquire", "acquire", "release", "seal"]), _items), max_size=12)


def _one_by_one(manager: Manager, session: Session, items: list[AcquireArguments]) -> list[object]:
    return [_outcome(manager, session, item) for item in items]


def _outcome(manager: Manager, session: Session, item: AcquireArguments) -> object:
    try:
        return _seen(manager.lessor.book.acquire(session, *item))
    except ManagerError as error:
        return str(error)


def _seen(lease: Lease) -> object:
    return lease.cache_id, list(lease.blocks), lease.priority, lease.age_ticket, lease.num_cached_tokens


def _meta(manager: Manager) -> bytes:
    assert manager.lessor.pool is not None
    return manager.lessor.pool.files.meta.header_states()


@settings(max_examples=60, deadline=None)
@given(_steps, st.sampled_from([None, 10]))
def test_a_batch_at_once_equals_the_same_items_one_by_one(
    steps: list[tuple[str, list[AcquireArguments]]], quota: int | None
) -> None:
    flags = {"tenant_quotas": {"": quota}} if quota is not None else {}
    num_at_once = 0
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        batched = Manager(Path(first), FakeClock(), num_blocks=NUM_BLOCKS, **flags)
        single = Manager(Path(second), FakeClock(), num_blocks=NUM_BLOCKS, **flags)
        ours, theirs = (manager.join(kv_capacity_tokens=5 * 16) for manager in (batched, single))
        for kind, items in steps:
            cache_id = items[0][0]
            if kind == "acquire":
                leases = batched.lessor.book.acquire_at_once(ours, items)
                num_at_once += len(leases)
                mine = [_seen(lease) for lease in leases] or _one_by_one(batched, ours, items)
                assert mine == _one_by_one(single, theirs, items)
            elif kind == "release":
                assert batched.release(ours, cache_id) == single.release(theirs, cache_id)
            elif cache_id in ours.leases and not any(lease.num_cached_tokens for lease in ours.leases.values()):
                for manager, session in ((batched, ours), (single, theirs)):
                    depth = min(len(CHAIN), len(session.leases[cache_id].blocks))
                    if manager.lessor.book.pool.find(CHAIN[0]) is None:
                        manager.seal_all(session, cache_id, CHAIN[:depth])
            assert batched.lessor.counts() == single.lessor.counts()
            assert _meta(batched) == _meta(single)
            assert batched.lessor.counters == single.lessor.counters
            batched.check()
        assert quota is None or num_at_once == 0
        for manager in (batched, single):
            manager.close()


def test_a_batch_of_new_plain_tables_is_made_at_once_and_in_order() -> None:
    with tempfile.TemporaryDirectory() as directory:
        manager = Manager(Path(directory), FakeClock(), num_blocks=NUM_BLOCKS)
        session = manager.join()
        items = translate.acquire_items([pb.AcquireItem(cache_id=number, num_blocks=number) for number in (1, 2, 3)])
        leases = manager.lessor.book.acquire_at_once(session, items)
        assert [lease.blocks for lease in leases] == [[0], [1, 2], [3, 4, 5]]
        assert [lease.age_ticket for lease in leases] == sorted({lease.age_ticket for lease in leases})
        # A known id, or one more block than there is: each item has to be looked at.
        assert manager.lessor.book.acquire_at_once(session, items) == []
        assert manager.lessor.book.acquire_at_once(session, [(9, NUM_BLOCKS - 5, 0, "", None, ())]) == []
        manager.check()
        manager.close()
