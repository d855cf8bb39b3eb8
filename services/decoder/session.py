"""Leases from a KV manager: the asyncio side of the engine's port. Opens the session, keeps it alive, and opens it anew."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import grpc
import structlog

from clients.errors import CallError
from clients.kv_manager import KvManagerClient
from protos import kv_manager_pb2 as pb
from services.decoder.errors import ConfigError
from services.decoder.gpu_pool import PoolAwayError
from services.decoder.kv_view import KvView
from services.decoder.lease_calls import LeaseCalls, SessionBrokenError, broken_by
from services.decoder.leases import (
    AcquireAsk,
    ClaimsWanted,
    ExtendAsk,
    ForkAsk,
    HeldLease,
    KvGeometry,
    LeaseRevoked,
    ManagerAway,
    ManagerBack,
    PoolReady,
    Post,
    SealAsk,
    SessionEnded,
)
from services.decoder.lock_file import WorkerLock, take_worker_lock
from services.decoder.outbox import Ask, Outbox, ReleaseAsk
from services.decoder.registration import Registrar, WorkerSettings

__all__ = ["ManagerLeases", "MappedPool", "WorkerSettings"]

_log = structlog.get_logger()

CLOSE_WAIT_S = 5.0
_FIRST_BACKOFF_S = 0.05
_MAX_BACKOFF_S = 1.0
# Refusals of a registration that no retry changes: another model, a wrong mount, another process in our place.
_FINAL = frozenset(
    {grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE}
)


class MappedPool(KvView, Protocol):
    """A pool's data file, mapped."""

    @property
    def pool_id(self) -> bytes:
        """As the header in the mapping has it now; raises OSError or ValueError when the file is not whole any more."""
        ...

    def close(self) -> None:
        """Unmaps the file, as soon as nothing looks at its blocks any more."""
        ...


@dataclass
class _Session:
    epoch: int
    ttl_s: float
    keepalive_interval_s: float
    calls: LeaseCalls


@dataclass(frozen=True)
class _Bound:
    geometry: KvGeometry
    post: Post
    busy_ms: Callable[[], int | None]


class ManagerLeases:
    """A LeasePort over gRPC. What the engine calls only puts asks into the outbox; all else runs on the server's event loop."""

    def __init__(
        self, client: KvManagerClient, settings: WorkerSettings, map_pool: Callable[[pb.PoolInfo], MappedPool]
    ) -> None:
        """Owns the client from now on, and closes it. `map_pool` maps a data file; it may raise OSError or ValueError."""
        self._client = client
        self._settings = settings
        self._map_pool = map_pool
        self._registrar = Registrar(settings)
        self._bound: _Bound | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_wake_due = False
        self._is_closing = False
        self._outbox = Outbox()
        self._session: _Session | None = None
        self._pool: MappedPool | None = None
        self._locks: list[WorkerLock] = []
        self._supervisor: asyncio.Task[None] | None = None

    def bind(self, geometry: KvGeometry, post: Post, busy_ms: Callable[[], int | None]) -> None:
        """See LeasePort."""
        self._bound = _Bound(geometry, post, busy_ms)

    def acquire(self, ask: AcquireAsk) -> None:
        """See LeasePort."""
        self._put(ask)

    def fork(self, ask: ForkAsk) -> None:
        """See LeasePort."""
        self._put(ask)

    def extend(self, ask: ExtendAsk) -> None:
        """See LeasePort."""
        self._put(ask)

    def seal(self, ask: SealAsk) -> None:
        """See LeasePort."""
        self._put(ask)

    def release(self, cache_id: int) -> None:
        """See LeasePort."""
        self._put(ReleaseAsk(cache_id))

    def release_block(self, cache_id: int, block_id: int) -> None:
        """See LeasePort."""
        self._put(ReleaseAsk(cache_id, block_id))

    async def hold_lock(self) -> None:
        """Takes the worker's lock before anything initialises CUDA: then it stays locked until the GPU is done with a killed process.

        Waits for the manager, which says where it is; raises ConfigError when this worker can have no blocks of its pool.
        """
        waits = False
        while True:
            try:
                description = await self._client.describe_pool()
            except CallError as error:
                if not waits:
                    _log.warning("waiting for the KV manager", address=self._client.address, reason=str(error))
                waits = True
                await asyncio.sleep(_MAX_BACKOFF_S)
                continue
            self._require_memory(description)
            await self._hold_lock(Path(description.pool_dir))
            return

    def _require_memory(self, description: pb.DescribePoolResponse) -> None:
        wanted, found = self._settings.pool_memory, description.pool_memory or "host"
        if wanted == found:
            return
        where = {"host": "host memory", "cuda": "GPU memory"}
        backends = {"host": "--backend native or mlx", "cuda": "--backend cuda"}
        raise ConfigError(
            f"--backend: the KV manager at {self._client.address} has its pool in {where[found]}, and this decoder's backend needs it"
            f" in {where[wanted]}; use {backends[found]} here, or start a manager with --pool-memory {wanted} on another --pool-dir"
        )

    async def open(self) -> None:
        """See LeasePort. A manager that is away is no error: the session is opened when it comes."""
        self._loop = asyncio.get_running_loop()
        try:
            self._session = await self._register()
        except SessionBrokenError as error:
            self._say_away(str(error))
        self._supervisor = asyncio.create_task(self._supervise(), name="kv-manager-session")

    async def close(self) -> None:
        """See LeasePort."""
        self._is_closing = True  # the engine has stopped, so it claims nothing any more
        try:
            if self._session is not None:
                self._sort()
                with suppress(TimeoutError):
                    async with asyncio.timeout(CLOSE_WAIT_S):
                        await self._outbox.all_released.wait()
        finally:
            if self._supervisor is not None:
                self._supervisor.cancel()
                await asyncio.wait([self._supervisor])
            await self._client.close()
            # Nothing of this process touches a block any more.
            if self._pool is not None:
                self._pool.close()
                self._pool = None
            for lock in self._locks:
                lock.close()
            self._locks.clear()

    def _put(self, ask: Ask) -> None:
        self._outbox.put(ask)
        if self._loop is None or self._is_wake_due:
            return
        # One wake-up takes in everything up to it; the flag falls before the asks are read, so that none is left behind.
        self._is_wake_due = True
        self._loop.call_soon_threadsafe(self._sort)

    def _sort(self) -> None:
        self._is_wake_due = False
        self._outbox.sort()
        if self._session is not None:
            self._session.calls.wake()

    def _require_bound(self) -> _Bound:
        if self._bound is None:
            raise RuntimeError("the engine must be started before its leases are opened")
        return self._bound

    def _say_away(self, reason: str) -> None:
        _log.warning("kv_manager_away", address=self._client.address, reason=reason)
        self._require_bound().post(ManagerAway(f"the KV manager at {self._client.address} is away: {reason}"))

    async def _supervise(self) -> None:
        backoff_s = 0.0
        while True:
            was_open = self._session is not None
            try:
                if self._session is None:
                    # Jitter: the decoders of a host do not all come back in the same instant.
                    await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
                    backoff_s = min(max(2 * backoff_s, _FIRST_BACKOFF_S), _MAX_BACKOFF_S)
                    self._session = await self._register()
                    backoff_s = _FIRST_BACKOFF_S
                was_open = True
                await self._serve(self._session)
            except SessionBrokenError as error:
                # A refused epoch is mended in a moment; only a manager that does not answer turns requests away.
                if error.is_away or not was_open:
                    self._say_away(str(error))
                else:
                    _log.warning("session_broken", reason=str(error))
                    self._require_bound().post(SessionEnded())
            except ConfigError as error:
                self._say_away(str(error))
            except Exception as error:  # a bug here must not leave the decoder without a session for ever
                _log.exception("session_failed")
                self._say_away(f"{type(error).__name__}: {error}")
            self._session = None

    async def _serve(self, session: _Session) -> None:
        """Runs a session until it breaks; raises SessionBrokenError."""
        broken: list[BaseException] = []
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._keep_alive(session))
                group.create_task(session.calls.run())
        except* SessionBrokenError as errors:
            broken = _leaves(errors)
        # Not in the except* block: an exception raised there comes out wrapped in a group.
        is_away = any(isinstance(error, SessionBrokenError) and error.is_away for error in broken)
        raise SessionBrokenError(str(broken[0]), is_away)

    async def _register(self) -> _Session:
        """Opens a session with everything that the engine holds; raises SessionBrokenError, or ConfigError for good."""
        bound = self._require_bound()
        try:
            description = await self._client.describe_pool()
            self._require_memory(description)
            lock = await self._hold_lock(Path(description.pool_dir))
            mapped_pool_id = self._mapped_pool_id()
            claims = await self._claims(bound) if mapped_pool_id else ()
            request = self._registrar.next_request(bound.geometry, lock, mapped_pool_id, claims)
            reply = await self._client.register_worker(request)
        except CallError as error:
            if error.code in _FINAL:
                raise ConfigError(f"--kv-manager: the KV manager at {self._client.address} refuses: {error}") from error
            raise SessionBrokenError(str(error), is_away=True) from error
        pool = await self._take_over(bound, reply)
        _log.info("session_opened", epoch=reply.epoch, claims=len(claims), claims_accepted=reply.claims_accepted)
        calls = LeaseCalls(self._client, self._settings.worker_id, reply.epoch, self._outbox, bound.post, pool)
        return _Session(reply.epoch, reply.ttl_ms / 1000, reply.keepalive_interval_ms / 1000, calls)

    async def _take_over(self, bound: _Bound, reply: pb.RegisterWorkerResponse) -> MappedPool:
        """Tells the engine what became of its leases, before any answer of the new session; the pool that they are in."""
        self._outbox.sort()
        self._outbox.drop_block_releases()
        if reply.claims_accepted and self._pool is not None:
            for cache_id in reply.lost_cache_ids:
                bound.post(LeaseRevoked(cache_id))
            bound.post(ManagerBack())
            return self._pool
        try:
            # Memory of a GPU has to be waited for; the loop goes on.
            pool = await asyncio.to_thread(self._map_pool, reply.pool)
        except PoolAwayError as error:
            raise SessionBrokenError(str(error), is_away=True) from error
        except (OSError, ValueError) as error:
            raise ConfigError(f"--kv-manager: cannot map the pool {reply.pool.kv_path}: {error}") from error
        old, self._pool = self._pool, pool
        self._outbox.sort()  # the engine went on while the file was being mapped
        self._outbox.drop_seals()
        bound.post(PoolReady(pool, reply.pool.block_size, can_seal=True))
        if old is not None:
            # Answered at a step boundary, when the engine has turned to the new pool: nothing touches the old one then.
            bound.post(ClaimsWanted(lambda held: old.close()))
        return pool

    async def _hold_lock(self, pool_dir: Path) -> WorkerLock:
        for lock in self._locks:
            if lock.path.is_relative_to(pool_dir) and lock.is_in_place():
                return lock
        # Another directory, or a deleted file. Earlier locks stay: they guard blocks that a step may be touching.
        lock = await take_worker_lock(pool_dir, self._settings.worker_id, self._registrar.boot_id)
        self._locks.append(lock)
        return lock

    def _mapped_pool_id(self) -> bytes:
        if self._pool is None:
            return b""
        try:
            return self._pool.pool_id
        except (OSError, ValueError):
            return b""

    async def _claims(self, bound: _Bound) -> Sequence[HeldLease]:
        """What the engine holds at a step boundary. Asked after the session ended, so that no late answer adds to it."""
        if self._is_closing:
            return ()
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[Sequence[HeldLease]] = loop.create_future()

        def settle(held: Sequence[HeldLease]) -> None:
            if not answered.done():
                answered.set_result(held)

        def answer(held: Sequence[HeldLease]) -> None:
            loop.call_soon_threadsafe(settle, held)

        bound.post(ClaimsWanted(answer))
        return await answered

    async def _keep_alive(self, session: _Session) -> None:
        bound = self._require_bound()

        async def requests() -> AsyncIterator[pb.KeepAliveRequest]:
            while True:
                yield pb.KeepAliveRequest(
                    worker_id=self._settings.worker_id, epoch=session.epoch, busy_ms=bound.busy_ms()
                )
                await asyncio.sleep(session.keepalive_interval_s)

        async with aclosing(self._client.keep_alive(requests())) as replies:
            while True:
                try:
                    async with asyncio.timeout(session.ttl_s):
                        reply = await anext(replies)
                except TimeoutError:
                    raise SessionBrokenError(f"no keepalive answered for {session.ttl_s} s", is_away=True) from None
                except StopAsyncIteration:
                    raise SessionBrokenError("the manager ended the keepalive stream", is_away=True) from None
                except CallError as error:
                    raise broken_by(error) from error
                if reply.epoch != session.epoch:
                    raise SessionBrokenError(f"a keepalive of epoch {reply.epoch}, not {session.epoch}")
                if reply.session_revoked:
                    # Its leases are claimed again as they are: nothing has to be computed anew.
                    raise SessionBrokenError("the manager revoked the session, because this worker was silent or hung")
                for cache_id in reply.revoked_cache_ids:
                    bound.post(LeaseRevoked(cache_id))


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    """The exceptions in a group, however deep."""
    leaves: list[BaseException] = []
    for error in group.exceptions:
        leaves += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return leaves
