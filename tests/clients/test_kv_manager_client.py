"""The typed client of the manager, against a real one on a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from clients.errors import BadTargetError, DeadlineError, RequestRefusedError, UnavailableError
from clients.kv_manager import KvManagerClient
from protos import kv_manager_pb2 as pb
from services.kv_manager.config import Config
from services.kv_manager.service import Service
from tests.kv_manager.helpers import Worker


@pytest_asyncio.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    config = Config(pool_dir=tmp_path / "pool", listen="127.0.0.1:0", num_blocks=32, ttl_s=1.0)
    async with Service(config) as running:
        yield running


@pytest_asyncio.fixture
async def client(service: Service) -> AsyncIterator[KvManagerClient]:
    async with KvManagerClient(service.address) as connected:
        yield connected


async def test_a_lease_from_registration_to_release(service: Service, client: KvManagerClient) -> None:
    assert not (await client.describe_pool()).HasField("pool")
    worker = Worker(service.lessor.pool_dir).lock()
    try:
        session = await client.register_worker(worker.request())
        head = {"worker_id": "w1", "epoch": session.epoch}
        item = pb.AcquireItem(cache_id=7, num_blocks=2)
        acquired = await client.acquire(pb.AcquireRequest(**head, seq=1, items=[item]))  # type: ignore[arg-type]
        assert len(acquired.results[0].table.block_ids) == 2
        grown = pb.ExtendItem(cache_id=7, num_blocks=5)
        extended = await client.extend(pb.ExtendRequest(**head, seq=2, acked_seq=1, items=[grown]))  # type: ignore[arg-type]
        assert len(extended.results[0].table.block_ids) == 5
        assert [lease.cache_id for lease in (await client.list_leases("w1")).leases] == [7]
        assert (await client.list_leases("w2")).leases == []
        assert (await client.stats()).leased == 5
        freed = pb.ReleaseItem(cache_id=7)
        released = await client.release(pb.ReleaseRequest(**head, seq=3, acked_seq=2, items=[freed]))  # type: ignore[arg-type]
        assert released.num_freed_blocks == 5
        assert (await client.describe_pool()).pool.num_blocks == 32
    finally:
        worker.die()


async def test_an_error_comes_with_its_reason_and_metadata(client: KvManagerClient) -> None:
    with pytest.raises(RequestRefusedError) as caught:
        await client.acquire(
            pb.AcquireRequest(worker_id="nobody", epoch=3, seq=1, items=[pb.AcquireItem(cache_id=1, num_blocks=1)])
        )
    assert caught.value.code is grpc.StatusCode.ABORTED
    assert caught.value.reason == "STALE_EPOCH"
    assert caught.value.details.metadata["worker_id"] == "nobody"


async def test_the_keepalive_stream_answers_and_ends_with_the_epoch(service: Service, client: KvManagerClient) -> None:
    worker = Worker(service.lessor.pool_dir).lock()
    try:
        session = await client.register_worker(worker.request())
        epochs: asyncio.Queue[int] = asyncio.Queue()

        async def requests() -> AsyncIterator[pb.KeepAliveRequest]:
            while True:
                yield pb.KeepAliveRequest(worker_id="w1", epoch=await epochs.get(), busy_ms=5)

        async with aclosing(client.keep_alive(requests())) as replies:
            epochs.put_nowait(session.epoch)
            assert (await anext(replies)).epoch == session.epoch
            assert (await client.list_leases("w1")).sessions[0].busy_ms == 5
            epochs.put_nowait(session.epoch + 1)
            with pytest.raises(RequestRefusedError) as caught:
                await anext(replies)
            assert caught.value.reason == "STALE_EPOCH"
    finally:
        worker.die()


async def test_a_manager_that_is_not_there_is_unavailable() -> None:
    async with KvManagerClient("127.0.0.1:1", deadline_s=20.0) as client:
        with pytest.raises(UnavailableError):
            await client.stats()


async def test_every_unary_call_has_a_deadline() -> None:
    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    silent = await asyncio.start_server(swallow, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    calls = ("describe_pool", "stats", "list_leases")
    async with KvManagerClient(f"127.0.0.1:{port}", deadline_s=0.05) as client:
        for name in calls:
            with pytest.raises(DeadlineError):
                await getattr(client, name)()
        for name, request in (
            ("register_worker", pb.RegisterWorkerRequest()),
            ("acquire", pb.AcquireRequest()),
            ("extend", pb.ExtendRequest()),
            ("release", pb.ReleaseRequest()),
        ):
            with pytest.raises(DeadlineError):
                await getattr(client, name)(request)
    silent.close()


def test_a_bad_address_is_refused_at_once() -> None:
    with pytest.raises(BadTargetError):
        KvManagerClient("not an address")
