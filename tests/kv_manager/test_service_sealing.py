"""Sealing, waiting, events, scrub and flush over a real socket."""

from __future__ import annotations

import queue
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from protos import kv_manager_pb2 as pb
from protos import kv_manager_pb2_grpc as pb_grpc
from protos import rich_status
from tests.kv_manager.helpers import ManagerProcess, Worker, chain_of, rich_status_of, wait_until, while_live

StartManager = Callable[..., ManagerProcess]


class Client:
    """A worker over a socket, which numbers its calls."""

    def __init__(self, stub: pb_grpc.KVManagerStub, pool_dir: Path, worker_id: str = "w1") -> None:
        self.stub = stub
        self.worker = Worker(pool_dir, worker_id).lock()
        registered = stub.RegisterWorker(self.worker.request(), timeout=10)
        self.epoch, self.pool = registered.epoch, registered.pool
        self._seq = 0

    def head(self) -> dict[str, object]:
        self._seq += 1
        return {"worker_id": self.worker.worker_id, "epoch": self.epoch, "seq": self._seq, "acked_seq": self._seq - 1}

    def acquire(self, cache_id: int, num_blocks: int, *, wait_ms: int = 0, **item: object) -> pb.LeaseResult:
        items = [pb.AcquireItem(cache_id=cache_id, num_blocks=num_blocks, **item)]  # type: ignore[arg-type]
        request = pb.AcquireRequest(items=items, wait_ms=wait_ms, **self.head())  # type: ignore[arg-type]
        return self.stub.Acquire(request, timeout=30).results[0]

    def release(self, cache_id: int, *blocks: int) -> int:
        items = [pb.ReleaseItem(cache_id=cache_id, block_ids=blocks)]
        return self.stub.Release(pb.ReleaseRequest(items=items, **self.head()), timeout=10).num_freed_blocks  # type: ignore[arg-type]

    def write(self, block: int, fill: int) -> int:
        num_bytes = 2 * 2 * 2 * 16 * 8 * 4
        data = bytes([fill % 256]) * num_bytes
        with open(self.pool.kv_path, "r+b") as file:
            file.seek(self.pool.data_offset_bytes + block * self.pool.block_stride_bytes)
            file.write(data)
        return zlib.crc32(data)

    def seal(self, cache_id: int, blocks: list[int], chain: list[bytes]) -> list[pb.SealResult]:
        items = [
            pb.SealItem(
                cache_id=cache_id,
                block_index=index,
                block_id=block,
                content_hash=chain[index],
                parent_hash=chain[index - 1] if index else bytes(32),
                num_tokens=16,
                data_checksum=self.write(block, chain[index][0]),
            )
            for index, block in enumerate(blocks)
        ]
        return list(self.stub.Seal(pb.SealRequest(items=items, **self.head()), timeout=10).results)  # type: ignore[arg-type]


@pytest.fixture
def served(manager_process: StartManager) -> Iterator[tuple[ManagerProcess, pb_grpc.KVManagerStub]]:
    manager = manager_process("--num-blocks", "8", "--preempt-timeout", "30")
    with manager.stub() as stub:
        yield manager, stub


def stats(stub: pb_grpc.KVManagerStub) -> pb.StatsResponse:
    return stub.Stats(pb.StatsRequest(), timeout=10)


Served = tuple[ManagerProcess, pb_grpc.KVManagerStub]


def test_a_second_worker_hits_what_the_first_has_sealed_and_duplicates_are_given_back(served: Served) -> None:
    manager, stub = served
    first, second = (Client(stub, manager.pool_dir, name) for name in ("w1", "w2"))
    chain = chain_of("a", 2)
    blocks = list(first.acquire(1, 3).table.block_ids)
    assert [result.block_id for result in first.seal(1, blocks[:2], chain)] == blocks[:2]
    hit = second.acquire(1, 3, prefix_hashes=chain).table
    assert (list(hit.block_ids)[:2], hit.num_cached_tokens) == (blocks[:2], 32)
    own = list(second.acquire(2, 2).table.block_ids)
    assert [result.block_id for result in second.seal(2, own, chain)] == blocks[:2]
    assert second.release(2, *own) == 2
    answer = stats(stub)
    assert (answer.num_looked_up, answer.num_hits, answer.num_seals, answer.num_deduplicated) == (2, 2, 4, 2)
    refused = second.seal(1, [hit.block_ids[0]], chain_of("b", 1))[0]
    assert rich_status.error_info(refused.error).reason == "SEAL_REFUSED"


def test_sealed_blocks_survive_kill_9_of_manager_and_worker_and_corrupt_ones_do_not(served: Served) -> None:
    manager, stub = served
    client = Client(stub, manager.pool_dir)
    chain = chain_of("a", 3)
    client.seal(1, list(client.acquire(1, 3).table.block_ids), chain)
    manager.kill()
    client.worker.die()
    client.write(2, 1 + chain[2][0])
    manager.start()
    with manager.stub() as stub:
        assert (stats(stub).cached, stats(stub).num_unverified) == (3, 3)
        hit = Client(stub, manager.pool_dir, "w2").acquire(1, 3, prefix_hashes=chain).table
        assert hit.num_cached_tokens == 32
        assert (stats(stub).num_corrupt, stats(stub).num_unverified) == (1, 0)


def test_fork_shares_the_sealed_front(served: Served) -> None:
    manager, stub = served
    client = Client(stub, manager.pool_dir)
    blocks = list(client.acquire(1, 2).table.block_ids)
    client.seal(1, blocks[:1], chain_of("a", 1))
    items = [
        pb.ForkItem(parent_cache_id=1, cache_id=2, num_blocks=2, max_shared_blocks=1),
        pb.ForkItem(parent_cache_id=9, cache_id=3, num_blocks=2),
    ]
    results = stub.Fork(pb.ForkRequest(items=items, **client.head()), timeout=10).results  # type: ignore[arg-type]
    assert (results[0].table.block_ids[0], results[0].table.num_cached_tokens) == (blocks[0], 16)
    assert rich_status.error_info(results[1].error).reason == "UNKNOWN_LEASE"


def test_a_waiting_acquire_is_answered_when_its_victim_has_given_way(served: Served) -> None:
    manager, stub = served
    client = Client(stub, manager.pool_dir)
    client.acquire(1, 4)
    client.acquire(2, 4)
    requests: queue.Queue[pb.KeepAliveRequest | None] = queue.Queue()
    requests.put(pb.KeepAliveRequest(worker_id="w1", epoch=client.epoch))
    replies = stub.KeepAlive(iter(requests.get, None))
    assert list(next(replies).revoked_cache_ids) == []
    answers: list[pb.LeaseResult] = []
    thread = threading.Thread(target=lambda: answers.append(client.acquire(3, 2, priority=1, wait_ms=20_000)))
    thread.start()
    # Without another keepalive: the manager tells at once.
    assert list(next(replies).revoked_cache_ids) == [2]
    assert stats(stub).num_waiting == 1
    client.release(2)
    thread.join(30)
    assert len(answers[0].table.block_ids) == 2
    assert (stats(stub).num_preempted, stats(stub).num_waiting) == (1, 0)
    requests.put(None)
    refused = client.acquire(4, 8, wait_ms=200)
    assert rich_status.error_info(refused.error).reason == "POOL_EXHAUSTED"


def test_a_waiter_that_hangs_up_is_forgotten(served: Served) -> None:
    manager, stub = served
    client = Client(stub, manager.pool_dir)
    client.acquire(1, 4)
    client.acquire(2, 4)
    items = [pb.AcquireItem(cache_id=3, num_blocks=2, priority=1)]
    future = stub.Acquire.future(pb.AcquireRequest(items=items, wait_ms=60_000, **client.head()), timeout=60)  # type: ignore[arg-type]
    wait_until(lambda: stats(stub).num_waiting == 1)
    future.cancel()
    wait_until(lambda: stats(stub).num_waiting == 0)


def test_a_watcher_gets_a_snapshot_then_events_and_goes_on_from_its_cursor(served: Served) -> None:
    manager, stub = served
    client = Client(stub, manager.pool_dir)
    chain = chain_of("a", 3)
    blocks = list(client.acquire(1, 3).table.block_ids)
    client.seal(1, blocks[:1], chain)
    stream = stub.WatchEvents(pb.WatchEventsRequest(), timeout=30)
    snapshot = next(stream)
    assert snapshot.cleared
    assert [event.content_hash for event in snapshot.events] == chain[:1]
    client.seal(1, blocks, chain)
    events = []
    while len(events) < 2:
        message = next(stream)
        events += message.events
    assert [(event.kind, event.content_hash, event.parent_hash) for event in events] == [
        (pb.Event.KIND_STORED, chain[1], chain[0]),
        (pb.Event.KIND_STORED, chain[2], chain[1]),
    ]
    stream.cancel()
    client.release(1)
    stub.Flush(pb.FlushRequest(), timeout=10)
    resumed = stub.WatchEvents(
        pb.WatchEventsRequest(incarnation=message.incarnation, cursor=message.cursor), timeout=30
    )
    removed = next(resumed)
    assert not removed.cleared
    assert [event.kind for event in removed.events] == [pb.Event.KIND_REMOVED] * 3
    manager.kill()
    manager.start()
    with manager.stub() as stub:
        request = pb.WatchEventsRequest(incarnation=message.incarnation, cursor=message.cursor)
        assert next(stub.WatchEvents(request, timeout=30)).cleared


def test_scrub_and_flush_answer_over_the_wire(served: Served) -> None:
    manager, stub = served
    client = Client(stub, manager.pool_dir)
    chain = chain_of("a", 4)
    client.seal(1, list(client.acquire(1, 4).table.block_ids), chain)
    client.write(3, 1 + chain[3][0])
    last = list(stub.Scrub(pb.ScrubRequest(), timeout=30))[-1]
    assert (last.num_blocks, last.num_checked, last.num_corrupt, last.done) == (4, 4, 1, True)
    client.release(1)
    assert stub.Flush(pb.FlushRequest(tenant="nobody"), timeout=10).num_flushed_blocks == 0
    assert stub.Flush(pb.FlushRequest(tenant=""), timeout=10).num_flushed_blocks == 3
    assert stats(stub).free == 8


def test_a_scrub_in_the_background_finds_a_flipped_bit(manager_process: StartManager) -> None:
    manager = manager_process("--num-blocks", "4", "--scrub-rate", "1MiB")
    with manager.stub() as stub:
        client = Client(stub, manager.pool_dir)
        chain = chain_of("a", 1)
        client.seal(1, list(client.acquire(1, 1).table.block_ids), chain)
        client.write(0, 1 + chain[0][0])
        client.worker.die()
        manager.kill()
        manager.start()
        wait_until(lambda: stats(stub).num_corrupt == 1, what="the background scrub")


def test_malformed_seals_fail_whole_and_name_their_field(served: Served) -> None:
    manager, stub = served
    client = Client(stub, manager.pool_dir)
    for item, field in (
        (pb.SealItem(content_hash=b"short", parent_hash=bytes(32), num_tokens=16), "items[0].content_hash"),
        (pb.SealItem(content_hash=bytes(32), parent_hash=b"", num_tokens=16), "items[0].parent_hash"),
        (pb.SealItem(content_hash=bytes(32), parent_hash=bytes(32), num_tokens=15), "items[0].num_tokens"),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            stub.Seal(pb.SealRequest(items=[item], **client.head()), timeout=10)  # type: ignore[arg-type]
        assert rich_status.error_info(rich_status_of(caught.value)).metadata["field"] == field


def test_a_keepalive_says_that_the_whole_session_is_revoked(manager_process: StartManager) -> None:
    manager = manager_process("--num-blocks", "4", "--ttl", "0.5")
    with manager.stub() as stub:
        client = Client(stub, manager.pool_dir)
        while_live(stub, "w1", client.epoch, lambda: client.acquire(1, 2))
        wait_until(lambda: stats(stub).quarantined == 2)
        request = pb.KeepAliveRequest(worker_id="w1", epoch=client.epoch)
        reply = next(stub.KeepAlive(iter([request]), timeout=10))
        assert (reply.session_revoked, list(reply.revoked_cache_ids)) == (True, [1])
