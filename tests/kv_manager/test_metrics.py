"""The manager's figures: what is in its pool, and what its calls were."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from protos import kv_manager_pb2 as pb
from protos import kv_manager_pb2_grpc as pb_grpc
from services.kv_manager.call_meter import CallMeter
from services.kv_manager.config import Config, parse_args
from services.kv_manager.metrics import ManagerCollector
from services.kv_manager.service import Service
from tests.kv_manager.helpers import FakeClock, Manager, run_manager

DEADLINE_S = 30.0
Figures = dict[tuple[str, ...], float]


def figures(collector: ManagerCollector) -> Figures:
    """Every sample by its name, without the prefix, and its labels' values."""
    prefix = "leasehold_kv_manager_"
    return {
        (sample.name.removeprefix(prefix), *sample.labels.values()): sample.value
        for family in collector.collect()
        for sample in family.samples
    }


def test_counts_of_a_manager_without_a_pool(make_manager: Callable[..., Manager]) -> None:
    seen = figures(ManagerCollector(make_manager().lessor, CallMeter("x")))
    assert seen["blocks", "free"] == 0
    assert seen["block_size_bytes",] == 0
    assert seen["sessions", "live"] == 0


def test_blocks_leases_and_sessions_by_state(make_manager: Callable[..., Manager], clock: FakeClock) -> None:
    manager = make_manager(num_blocks=8, ttl_s=10.0)
    collector = ManagerCollector(manager.lessor, CallMeter("x"))
    session = manager.join()
    manager.acquire(session, 1, 3)
    manager.seal_all(session, 1, [b"a" * 32, b"b" * 32])
    seen = figures(collector)
    assert [seen["blocks", state] for state in ("free", "leased", "sealed", "cached", "quarantined")] == [5, 1, 2, 0, 0]
    assert (seen["leases",], seen["leases_acquired_total",], seen["sealed_blocks_total",]) == (1, 1, 2)
    assert (seen["sessions", "live"], seen["sessions", "revoked"]) == (1, 0)
    assert seen["block_size_bytes",] == 4096
    manager.pass_time(11.0)
    seen = figures(collector)
    assert seen["blocks", "quarantined"] == 3
    assert (seen["sessions", "live"], seen["sessions", "revoked"], seen["sessions_revoked_total",]) == (0, 1, 1)


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    """A manager with its endpoint, on this loop."""
    config = Config(pool_dir=tmp_path / "pool", listen="127.0.0.1:0", metrics_listen="127.0.0.1:0")
    async with Service(config) as running:
        yield running


async def scrape(service: Service) -> Figures:
    """The samples at its endpoint."""
    host, port = service.metrics.address.rsplit(":", 1)
    async with asyncio.timeout(DEADLINE_S):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
        _, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
    prefix = "leasehold_kv_manager_"
    return {
        (sample.name.removeprefix(prefix), *dict(sorted(sample.labels.items())).values()): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


async def test_calls_are_counted_by_method_and_status(service: Service) -> None:
    async with grpc.aio.insecure_channel(service.address) as channel:
        stub = pb_grpc.KVManagerStub(channel)
        for _ in range(2):
            await stub.Stats(pb.StatsRequest(), timeout=DEADLINE_S)
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Acquire(pb.AcquireRequest(worker_id="w", epoch=1, seq=1), timeout=DEADLINE_S)
        unknown = channel.unary_unary("/leasehold.v1.KVManager/Nonsense")
        with pytest.raises(grpc.aio.AioRpcError, match="UNIMPLEMENTED"):
            await unknown(b"", timeout=DEADLINE_S)
        seen = await scrape(service)
    assert seen["calls_total", "OK", "Stats"] == 2
    assert seen["calls_total", "ABORTED", "Acquire"] == 1
    assert seen["call_seconds_count", "Stats"] == 2
    assert not any("Nonsense" in key for key in seen)


async def test_streams_are_counted_while_they_are_open(service: Service) -> None:
    async with grpc.aio.insecure_channel(service.address) as channel:
        stub = pb_grpc.KVManagerStub(channel)
        events = stub.WatchEvents(pb.WatchEventsRequest(), timeout=DEADLINE_S)
        await events.read()
        assert (await scrape(service))["open_streams", "WatchEvents"] == 1
        events.cancel()
        async with asyncio.timeout(DEADLINE_S):
            while (await scrape(service))["open_streams", "WatchEvents"]:
                pass  # each scrape gives the loop a turn
        scrubbed = [progress async for progress in stub.Scrub(pb.ScrubRequest(), timeout=DEADLINE_S)]
        seen = await scrape(service)
    assert scrubbed[-1].done
    assert seen["calls_total", "CANCELLED", "WatchEvents"] == 1
    assert seen["calls_total", "OK", "Scrub"] == 1


def test_the_endpoint_is_off_by_default(tmp_path: Path) -> None:
    assert parse_args(["--pool-dir", str(tmp_path)]).metrics_listen is None


def test_a_wrong_metrics_address_is_refused_before_anything_is_opened(tmp_path: Path) -> None:
    status, stderr = run_manager("--pool-dir", str(tmp_path / "pool"), "--metrics-listen", "unix:/tmp/x")
    assert status == 2
    assert "--metrics-listen" in stderr
    assert not (tmp_path / "pool").exists()
