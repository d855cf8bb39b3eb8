"""The KVManager service: messages in, the lessor's answers out. Only translates, and waits where the lessor says so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, TypeVar

import structlog
from grpc.aio import ServicerContext
from grpc_status import rpc_status

from protos import kv_manager_pb2 as pb
from protos import kv_manager_pb2_grpc as pb_grpc
from services.kv_manager import translate
from services.kv_manager.errors import InternalError, ManagerError, PoolExhaustedError, to_status
from services.kv_manager.leasebook import tenant_digest
from services.kv_manager.lessor import Lessor
from services.kv_manager.scrub import Verifier
from services.kv_manager.sessions import Lease, Session
from services.kv_manager.streams import KeepAliveStreams, watch
from services.kv_manager.waiting import Outcome, Waiter

if TYPE_CHECKING:
    from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

_log = structlog.get_logger("kv_manager.servicer")
_MAX_WAIT_S = 60.0
_Context = ServicerContext[Any, Any]
_Request = TypeVar("_Request")
_Reply = TypeVar("_Reply")
_Handler = Callable[[Any, _Request, _Context], Awaitable[_Reply]]
_StreamHandler = Callable[[Any, _Request, _Context], AsyncGenerator[_Reply, None]]
_Future = asyncio.Future[Outcome]


async def _abort(context: _Context, error: ManagerError) -> None:
    await context.abort_with_status(rpc_status.to_status(to_status(error)))


def _unexpected(call: str, error: Exception) -> InternalError:
    _log.exception("unexpected error", call=call)
    return InternalError(
        f"{call}: {type(error).__name__}: {error}; this is a bug in the manager, and its log has the details"
    )


def _unary(handler: _Handler[_Request, _Reply]) -> _Handler[_Request, _Reply]:
    """Turns what the handler raises into a rich status; whatever it is, the manager goes on serving."""

    @wraps(handler)
    async def guarded(self: Any, request: _Request, context: _Context) -> _Reply:
        try:
            return await handler(self, request, context)
        except ManagerError as error:
            await _abort(context, error)
        except Exception as error:
            await _abort(context, _unexpected(handler.__name__, error))
        raise AssertionError("abort does not return")

    return guarded


def _stream(handler: _StreamHandler[_Request, _Reply]) -> _StreamHandler[_Request, _Reply]:
    """The same for a handler that streams its reply."""

    @wraps(handler)
    async def guarded(self: Any, request: _Request, context: _Context) -> AsyncGenerator[_Reply, None]:
        try:
            # Closed at once when the client goes away, not when the garbage collector finds it.
            async with aclosing(handler(self, request, context)) as replies:
                async for reply in replies:
                    yield reply
        except ManagerError as error:
            await _abort(context, error)
        except Exception as error:
            await _abort(context, _unexpected(handler.__name__, error))

    return guarded


class KVManagerServicer(pb_grpc.KVManagerServicer):
    """The handlers; one lessor, one event loop."""

    def __init__(self, lessor: Lessor, verifier: Verifier, wake_ticker: Callable[[], None]) -> None:
        """wake_ticker has the lessor's tick called soon, because its interval has become shorter."""
        self._lessor = lessor
        self._verifier = verifier
        self._wake_ticker = wake_ticker
        # Ends the streams that would go on for ever.
        self.stopping = asyncio.Event()
        self._keepalives = KeepAliveStreams(lessor, self.stopping, wake_ticker)

    @_unary
    async def RegisterWorker(self, request: pb.RegisterWorkerRequest, context: _Context) -> pb.RegisterWorkerResponse:
        answer = self._lessor.register(translate.registration(request))
        config, pool = self._lessor.config, self._lessor.pool
        assert pool is not None
        return pb.RegisterWorkerResponse(
            epoch=answer.session.epoch,
            ttl_ms=round(config.ttl_s * 1000),
            keepalive_interval_ms=round(config.keepalive_interval_s * 1000),
            hang_limit_ms=round(config.hang_limit_s * 1000),
            pool=translate.pool_info(pool.files),
            claims_accepted=answer.claims_accepted,
            lost_cache_ids=answer.lost_cache_ids,
        )

    @_stream
    def KeepAlive(
        self, request_iterator: AsyncIterator[pb.KeepAliveRequest], context: _Context
    ) -> AsyncGenerator[pb.KeepAliveResponse, None]:
        return self._keepalives.serve(request_iterator)

    @_unary
    async def Acquire(self, request: pb.AcquireRequest, context: _Context) -> pb.AcquireResponse:
        translate.check_call(request.seq, request.acked_seq)
        items = translate.acquire_items(request.items)
        await self._verifier.verify_for_hits(item.prefix_hashes for item in request.items)
        session, book = self._enter(request), self._lessor.book
        self._lessor.require_live(session)
        reply = pb.AcquireResponse(epoch=request.epoch)
        leases = book.acquire_at_once(session, items)
        for lease in leases:
            translate.fill_table(reply.results.add(), lease)
        if not leases:
            await self._lease_each(session, book.acquire, items, request.wait_ms, reply.results)
        return reply

    @_unary
    async def Extend(self, request: pb.ExtendRequest, context: _Context) -> pb.ExtendResponse:
        translate.check_call(request.seq, request.acked_seq)
        items = translate.extend_items(request.items)
        session = self._enter(request)
        self._lessor.require_live(session)
        reply = pb.ExtendResponse(epoch=request.epoch)
        await self._lease_each(session, self._lessor.book.extend, items, request.wait_ms, reply.results)
        return reply

    async def _lease_each(
        self,
        session: Session,
        lease: Callable[..., Lease],
        items: Sequence[tuple[Any, ...]],
        wait_ms: int,
        results: RepeatedCompositeFieldContainer[pb.LeaseResult],
    ) -> None:
        """One result for each item, in order; those that find too few blocks wait as long as they may.

        Each item is the arguments of lease, the cache id first.
        """
        waits: list[tuple[pb.LeaseResult, Waiter, _Future]] = []
        for item in items:
            result = results.add()
            try:
                translate.fill_table(result, lease(session, *item))
            except PoolExhaustedError as error:
                if wait_ms:
                    waits.append((result, *self._wait(session, partial(lease, session, *item), error, wait_ms)))
                else:
                    self._fill_error(result, item[0], error)
            except ManagerError as error:
                self._fill_error(result, item[0], error)
        if waits:
            self._wake_ticker()
            await self._settle_all(waits)

    def _wait(
        self,
        session: Session,
        attempt: Callable[..., Lease],
        error: PoolExhaustedError,
        wait_ms: int,
    ) -> tuple[Waiter, _Future]:
        future: _Future = asyncio.get_running_loop().create_future()

        def settle(outcome: Outcome) -> None:
            if not future.done():
                future.set_result(outcome)

        waiter = self._lessor.waiting.wait(
            session,
            error,
            partial(attempt, is_first_waiter=True),
            settle,
            min(wait_ms / 1000, _MAX_WAIT_S),
        )
        return waiter, future

    async def _settle_all(self, waits: list[tuple[pb.LeaseResult, Waiter, _Future]]) -> None:
        try:
            await asyncio.gather(*(future for _, _, future in waits))
        finally:
            for _, waiter, _ in waits:
                self._lessor.waiting.cancel(waiter)
        for result, waiter, future in waits:
            outcome = future.result()
            if isinstance(outcome, ManagerError):
                self._fill_error(result, waiter.cache_id, outcome)
            else:
                translate.fill_table(result, outcome)

    def _fill_error(self, result: pb.LeaseResult, cache_id: int, error: ManagerError) -> None:
        self._lessor.counters.num_exhausted += isinstance(error, PoolExhaustedError)
        result.cache_id = cache_id
        result.error.CopyFrom(to_status(error))

    @_unary
    async def Fork(self, request: pb.ForkRequest, context: _Context) -> pb.ForkResponse:
        translate.check_call(request.seq, request.acked_seq)
        translate.check_fork_items(request.items)
        session = self._enter(request)
        self._lessor.require_live(session)
        reply = pb.ForkResponse(epoch=request.epoch)
        for item in request.items:
            result = reply.results.add()
            try:
                lease = self._lessor.book.fork(
                    session, item.parent_cache_id, item.cache_id, item.num_blocks, item.max_shared_blocks
                )
                translate.fill_table(result, lease)
            except ManagerError as error:
                self._fill_error(result, item.cache_id, error)
        return reply

    @_unary
    async def Seal(self, request: pb.SealRequest, context: _Context) -> pb.SealResponse:
        translate.check_call(request.seq, request.acked_seq)
        translate.check_seal_items(request.items, self._lessor.config.block_size)
        await self._verifier.verify_for_hits([item.content_hash] for item in request.items)
        session = self._enter(request)
        self._lessor.require_live(session)
        results = []
        for item in request.items:
            result = pb.SealResult(cache_id=item.cache_id, block_index=item.block_index)
            try:
                result.block_id = self._lessor.book.seal(session, translate.seal_order(item))
            except ManagerError as error:
                result.error.CopyFrom(to_status(error))
            results.append(result)
        return pb.SealResponse(epoch=request.epoch, results=results)

    @_unary
    async def Release(self, request: pb.ReleaseRequest, context: _Context) -> pb.ReleaseResponse:
        translate.check_call(request.seq, request.acked_seq)
        session, book = self._enter(request), self._lessor.book
        num_freed = 0
        whole = [item.cache_id for item in request.items if not item.block_ids]
        if len(whole) < len(request.items) and session.is_first_copy(request.seq):
            for item in request.items:
                if item.block_ids:
                    num_freed += book.release_duplicates(session, item.cache_id, item.block_ids)
        num_freed += book.release(session, whole, request.seq)
        self._lessor.waiting.pump()
        return pb.ReleaseResponse(epoch=request.epoch, num_freed_blocks=num_freed)

    def _enter(
        self, request: pb.AcquireRequest | pb.ExtendRequest | pb.ForkRequest | pb.SealRequest | pb.ReleaseRequest
    ) -> Session:
        return self._lessor.enter(request.worker_id, request.epoch, request.seq, request.acked_seq)

    @_unary
    async def DescribePool(self, request: pb.DescribePoolRequest, context: _Context) -> pb.DescribePoolResponse:
        lessor = self._lessor
        return pb.DescribePoolResponse(
            pool_dir=str(lessor.pool_dir),
            pool=translate.pool_info(lessor.pool.files) if lessor.pool is not None else None,
            block_size=lessor.config.block_size,
            manager_epoch=lessor.manager_epoch,
            pool_memory=lessor.pool_memory,
            memory_is_absent=lessor.data is not None and lessor.data.is_absent,
            num_lost_pools=lessor.num_pools_lost,
        )

    @_unary
    async def ListLeases(self, request: pb.ListLeasesRequest, context: _Context) -> pb.ListLeasesResponse:
        lessor = self._lessor
        sessions = [
            translate.session_view(session, lessor.now())
            for session in lessor.sessions()
            if not request.worker_id or session.worker.worker_id == request.worker_id
        ]
        leases = [translate.lease_view(session, lease) for session, lease in lessor.leases(request.worker_id)]
        states = lessor.pool.states() if request.with_block_states and lessor.pool is not None else b""
        return pb.ListLeasesResponse(sessions=sessions, leases=leases, block_states=states)

    @_unary
    async def Stats(self, request: pb.StatsRequest, context: _Context) -> pb.StatsResponse:
        return translate.stats(self._lessor)

    @_stream
    def WatchEvents(
        self, request: pb.WatchEventsRequest, context: _Context
    ) -> AsyncGenerator[pb.WatchEventsResponse, None]:
        return watch(self._lessor, self.stopping, request.incarnation, request.cursor)

    @_stream
    async def Scrub(self, request: pb.ScrubRequest, context: _Context) -> AsyncGenerator[pb.ScrubProgress, None]:
        rate = request.max_bytes_per_second or self._lessor.config.scrub_bytes_per_s
        async for progress in self._verifier.scrub(rate):
            yield pb.ScrubProgress(
                num_blocks=progress.num_blocks,
                num_checked=progress.num_checked,
                num_corrupt=progress.num_corrupt,
                num_bytes=progress.num_bytes,
                done=progress.done,
            )

    @_unary
    async def Flush(self, request: pb.FlushRequest, context: _Context) -> pb.FlushResponse:
        digest = tenant_digest(request.tenant) if request.HasField("tenant") else None
        return pb.FlushResponse(num_flushed_blocks=await self._verifier.flush(digest))
