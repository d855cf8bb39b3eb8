"""One manager process: locks the pool directory, serves, ticks, and stops cleanly."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import TracebackType

import grpc
import structlog
from grpc_health.v1.health import aio as health_aio

from protos import kv_manager_pb2_grpc as pb_grpc
from services import serving
from services.kv_manager.call_meter import CallMeter
from services.kv_manager.config import Config
from services.kv_manager.cuda_pool import HandOver
from services.kv_manager.lessor import Lessor
from services.kv_manager.locks import ManagerLock, prepare_pool_dir
from services.kv_manager.metrics import ManagerCollector
from services.kv_manager.pool_memory import PoolMemory, open_memory
from services.kv_manager.scrub import Verifier
from services.kv_manager.servicer import KVManagerServicer
from services.kv_manager.sessions import Clock
from services.metrics import MetricsEndpoint

SERVICE_NAME = "leasehold.v1.KVManager"
_GRACE_S = 2.0

_log = structlog.get_logger("kv_manager")


class Service:
    """A manager that serves while the `async with` block runs; `address` is where."""

    def __init__(
        self, config: Config, clock: Clock = time.monotonic, memory: Callable[[Config], PoolMemory] = open_memory
    ) -> None:
        """Locks and recovers the pool directory; raises StartError when it cannot serve."""
        pool_dir = prepare_pool_dir(config.pool_dir)
        self._lock = ManagerLock(pool_dir)
        try:
            self.lessor = Lessor(config, pool_dir, clock, memory(config))
        except BaseException:
            self._lock.close()
            raise
        self._config = config
        # Without an endpoint nobody counts the calls, and they take their shortest way.
        calls = CallMeter(SERVICE_NAME)
        interceptors = [calls] if config.metrics_listen is not None else []
        self._server = grpc.aio.server(options=serving.SERVER_OPTIONS, interceptors=interceptors)
        self.metrics = MetricsEndpoint(ManagerCollector(self.lessor, calls))
        self._health: health_aio.HealthServicer | None = None
        self._verifier = Verifier(self.lessor)
        self._wake = asyncio.Event()
        self._servicer = KVManagerServicer(self.lessor, self._verifier, self._wake.set)
        self._hand_over = HandOver(pool_dir, self.lessor.session, lambda: self.lessor.data)
        self._tasks: list[asyncio.Task[None]] = []
        self.address = ""

    async def __aenter__(self) -> Service:
        """Starts serving; raises services.serving.AddressError when the address is taken."""
        try:
            pb_grpc.add_KVManagerServicer_to_server(self._servicer, self._server)
            self._health = await serving.add_health_and_reflection(self._server, [SERVICE_NAME])
            if self._config.metrics_listen is not None:
                await self.metrics.start(self._config.metrics_listen)
                _log.info("metrics", address=self.metrics.address)
            if self.lessor.pool_memory == "cuda":
                self._hand_over.start()
            # Last: gRPC accepts connections from here on.
            self.address = serving.bind(self._server, "--listen", self._config.listen)
            await self._server.start()
        except BaseException:
            self._close()
            raise
        self._tasks.append(asyncio.create_task(self._tick_forever()))
        if self._config.scrub_bytes_per_s:
            self._tasks.append(asyncio.create_task(self._verifier.scrub_forever(self._config.scrub_bytes_per_s)))
        where = {"pool_dir": str(self.lessor.pool_dir), "pool_memory": self.lessor.pool_memory}
        _log.info("serving", address=self.address, **where)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stops taking calls, lets those under way end, and closes the files; leases stay as they are in them."""
        if self._health is not None:
            await self._health.enter_graceful_shutdown()
        self._servicer.stopping.set()
        await self._server.stop(_GRACE_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._close()
        _log.info("stopped")

    def _close(self) -> None:
        self.metrics.stop()
        self._hand_over.close()
        self.lessor.close()
        self._lock.close()

    async def _tick_forever(self) -> None:
        while True:
            try:
                self.lessor.tick()
            except Exception:
                _log.exception("tick failed")
            self._wake.clear()
            try:
                async with asyncio.timeout(self.lessor.tick_interval_s):
                    await self._wake.wait()
            except TimeoutError:
                continue


async def serve(config: Config, memory: Callable[[Config], PoolMemory] = open_memory) -> None:
    """Serves until SIGTERM or SIGINT."""
    stop = serving.stop_event_on_signals()
    async with Service(config, memory=memory):
        await stop.wait()
        _log.info("stopping")
