"""Copies of calls that arrive late, doubled or out of order, over a real socket: they lease nothing and give nothing back."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from protos import kv_manager_pb2 as pb
from protos import rich_status
from tests.kv_manager.helpers import ManagerProcess, chain_of
from tests.kv_manager.test_service_sealing import Client, stats

StartManager = Callable[..., ManagerProcess]


class Unacknowledging(Client):
    """A worker one of whose first calls is never answered: all later ones may be served again."""

    def head(self) -> dict[str, object]:
        return {**super().head(), "acked_seq": 0}


@pytest.fixture
def client(manager_process: StartManager) -> Iterator[Unacknowledging]:
    manager = manager_process("--num-blocks", "8")
    with manager.stub() as stub:
        yield Unacknowledging(stub, manager.pool_dir)


def _recycled(client: Unacknowledging, chain: list[bytes]) -> tuple[pb.ReleaseRequest, int, list[int]]:
    """A Release that gave a duplicate back, its block, and the table of the lease, to which the block has come back."""
    original = list(client.acquire(1, 2).table.block_ids)
    client.seal(1, original, chain)
    [duplicate] = client.acquire(2, 1).table.block_ids
    client.seal(2, [duplicate], chain)
    items = [pb.ReleaseItem(cache_id=2, block_ids=[duplicate])]
    release = pb.ReleaseRequest(items=items, **client.head())  # type: ignore[arg-type]
    assert client.stub.Release(release, timeout=10).num_freed_blocks == 1
    extend = pb.ExtendRequest(items=[pb.ExtendItem(cache_id=2, num_blocks=2)], **client.head())  # type: ignore[arg-type]
    table = list(client.stub.Extend(extend, timeout=10).results[0].table.block_ids)
    assert table == [original[0], duplicate], "the block that was given back last is the next to be handed out"
    return release, duplicate, table


def test_a_copy_of_a_partial_release_takes_no_block_that_has_come_back_as_another_duplicate(
    client: Unacknowledging,
) -> None:
    chain = chain_of("a", 2)
    release, duplicate, table = _recycled(client, chain)
    # Sealed as what another lease has already: a duplicate again, which this worker may read until it says otherwise.
    assert client.seal(2, table, chain)[1].block_id != duplicate
    before = stats(client.stub)
    assert client.stub.Release(release, timeout=10).num_freed_blocks == 0
    assert stats(client.stub).free == before.free
    assert client.release(2, duplicate) == 1


def test_a_copy_of_a_partial_release_drops_no_reference_that_a_seal_put_there_later(client: Unacknowledging) -> None:
    release, duplicate, table = _recycled(client, chain_of("a", 2))
    other = [chain_of("a", 1)[0], chain_of("b", 2)[1]]
    assert client.seal(2, table, other)[1].block_id == duplicate
    before = stats(client.stub)
    assert client.stub.Release(release, timeout=10).num_freed_blocks == 0
    after = stats(client.stub)
    assert (after.free, after.sealed, after.cached) == (before.free, before.sealed, before.cached)


def test_an_acquire_that_arrives_again_after_its_release_leases_nothing(client: Unacknowledging) -> None:
    items = [pb.AcquireItem(cache_id=1, num_blocks=3)]
    acquire = pb.AcquireRequest(items=items, **client.head())  # type: ignore[arg-type]
    client.stub.Acquire(acquire, timeout=10)
    client.release(1)
    result = client.stub.Acquire(acquire, timeout=10).results[0]
    assert rich_status.error_info(result.error).reason == "CACHE_ID_RELEASED"
    assert (stats(client.stub).free, stats(client.stub).num_leases) == (8, 0)
