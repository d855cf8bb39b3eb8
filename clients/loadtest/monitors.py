"""What is watched beside the requests: the client's own lag, the pool, and how decoders spend their steps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from clients.errors import ClientError
from clients.kv_manager import KvManagerClient
from clients.loadtest.records import PoolSample, RunRecord, StepSample
from clients.metrics import scrape, step_parts
from protos import kv_manager_pb2 as kv_pb

LAG_INTERVAL_S = 0.01
POOL_INTERVAL_S = 0.25
STEP_INTERVAL_S = 1.0


async def watch_lag(run: RunRecord, now_s: Callable[[], float]) -> None:
    """Sleeps for a short while again and again, and records how much later than asked the event loop woke it."""
    while True:
        asked = now_s() + LAG_INTERVAL_S
        await asyncio.sleep(LAG_INTERVAL_S)
        run.lags.append((asked, max(0.0, now_s() - asked)))


async def watch_pool(run: RunRecord, now_s: Callable[[], float], manager: KvManagerClient) -> None:
    """Samples the pool; a manager that is away leaves a gap."""
    while True:
        try:
            stats = await manager.stats()
        except ClientError:
            pass
        else:
            run.pool.append(pool_sample(now_s(), stats))
        await asyncio.sleep(POOL_INTERVAL_S)


def pool_sample(time_s: float, stats: kv_pb.StatsResponse) -> PoolSample:
    """A manager's counts at a time."""
    return PoolSample(
        time_s,
        stats.num_blocks,
        stats.free,
        stats.leased,
        stats.sealed,
        stats.cached,
        stats.quarantined,
        stats.num_leases,
        stats.num_sessions,
    )


async def watch_steps(run: RunRecord, now_s: Callable[[], float], address: str) -> None:
    """Samples a decoder's Prometheus endpoint: how many seconds of each second went into each part of its steps."""
    before: Mapping[str, float] = {}
    before_s = now_s()
    while True:
        try:
            parts = step_parts(await scrape(address))
        except (OSError, TimeoutError, ValueError):  # away, or no such endpoint: a gap
            parts = {}
        at_s = now_s()
        if before and parts and at_s > before_s:
            rates = {part: max(0.0, total - before.get(part, 0.0)) / (at_s - before_s) for part, total in parts.items()}
            run.steps.append(StepSample(at_s, address, rates))
        before, before_s = parts, at_s
        await asyncio.sleep(STEP_INTERVAL_S)
