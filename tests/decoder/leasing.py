"""A decoder's session with a real manager in a process of its own, as several test files need it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from clients.kv_manager import KvManagerClient
from protos import kv_manager_pb2 as pb
from services.decoder.engine import EngineSettings
from services.decoder.kv_view import PagedKv
from services.decoder.leases import KvGeometry, Post
from services.decoder.request import DecodeRequest
from services.decoder.session import ManagerLeases, MappedPool, WorkerSettings
from tests.decoder.engine_fakes import DEADLINE_S, EngineHarness, Outcome, expected_tokens, make_request
from tests.kv_manager.helpers import ManagerProcess

StartManager = Callable[..., ManagerProcess]


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    """Polls until the condition holds."""
    async with asyncio.timeout(DEADLINE_S):
        while not await condition():  # noqa: ASYNC110  # the state is another process's
            await asyncio.sleep(0.005)


class Decoder:
    """An engine with a fake model that leases from a real manager."""

    def __init__(
        self,
        address: str,
        worker_id: str = "w1",
        settings: EngineSettings | None = None,
        map_pool: Callable[[pb.PoolInfo], MappedPool] | None = None,
        pool_memory: str = "host",
    ) -> None:
        settings = settings or EngineSettings(max_seqs=8, kv_capacity=512, max_num_batched_tokens=64)
        worker = WorkerSettings(worker_id, settings.max_seqs, settings.kv_capacity, pool_memory)
        # No call of a test is to fail because a busy machine is late.
        self.client = KvManagerClient(address, deadline_s=20.0)
        map_pool = map_pool or (lambda pool: PagedKv(Path(pool.kv_path), "f32"))
        self.leases = ManagerLeases(self.client, worker, map_pool)
        self.harness = EngineHarness(self.leases, settings)
        self.model = self.harness.model
        # So many times longer than it takes does a step seem to the manager: a test need not wait for hang limits.
        self.busy_factor = 1
        bind = self.leases.bind

        def bind_stretched(geometry: KvGeometry, post: Post, busy_ms: Callable[[], int | None]) -> None:
            def stretched_ms() -> int | None:
                elapsed_ms = busy_ms()
                return None if elapsed_ms is None else elapsed_ms * self.busy_factor

            bind(geometry, post, stretched_ms)

        self.leases.bind = bind_stretched  # type: ignore[method-assign]

    async def __aenter__(self) -> Decoder:
        await asyncio.to_thread(self.harness.engine.start)
        try:
            await self.leases.open()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def stop(self, drain_s: float = 0.0) -> None:
        self.model.gate.set()
        await asyncio.to_thread(self.harness.engine.stop, drain_s)
        await self.leases.close()

    def submit(self, *requests: DecodeRequest) -> None:
        for request in requests:
            self.harness.engine.submit(request)

    async def outcome(self, request_id: str) -> Outcome:
        return await asyncio.to_thread(self.harness.outcome, request_id)

    async def run(self, *requests: DecodeRequest) -> list[Outcome]:
        self.submit(*requests)
        return [await self.outcome(request.request_id) for request in requests]

    async def until_tokens(self, request_id: str, num_tokens: int) -> None:
        await asyncio.to_thread(self.harness.wait, lambda: self.harness.num_tokens(request_id) >= num_tokens)


async def stats(manager: ManagerProcess) -> pb.StatsResponse:
    async with KvManagerClient(manager.address) as client:
        return await client.stats()


async def assert_all_free(manager: ManagerProcess) -> None:
    """Nothing is leased, or will be in a moment: releases are answered after the last token was."""

    async def free() -> bool:
        counts = await stats(manager)
        held = counts.leased + counts.sealed + counts.quarantined
        return counts.num_blocks > 0 and held == 0 and counts.num_leases == 0

    await until(free)


async def served(decoder: Decoder) -> bool:
    """The registration is answered a moment before the engine has heard of it."""
    [outcome] = await decoder.run(make_request("served"))
    return outcome.tokens == expected_tokens(make_request("served"))


@contextmanager
def managers_in(pool_dir: Path) -> Iterator[StartManager]:
    """A function that starts managers on one pool directory; whatever still runs at the end is killed."""
    managers: list[ManagerProcess] = []

    def start(*flags: str) -> ManagerProcess:
        manager = ManagerProcess(pool_dir, *flags)
        managers.append(manager)
        return manager.start()

    yield start
    for manager in managers:
        manager.close()
