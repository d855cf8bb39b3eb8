"""The KVManager service: messages in, the lessor's answers out. Only translates."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from functools import wraps
from typing import Any, TypeVar

import structlog
from grpc.aio import ServicerContext
from grpc_status import rpc_status

from protos import kv_manager_pb2 as pb
from protos import kv_manager_pb2_grpc as pb_grpc
from services.kv_manager import translate
from services.kv_manager.block_pool import BlockState
from services.kv_manager.errors import InternalError, ManagerError, to_status
from services.kv_manager.lessor import Lessor
from services.kv_manager.sessions import Lease, Session

_log = structlog.get_logger("kv_manager.servicer")
_Context = ServicerContext[Any, Any]
_Request = TypeVar("_Request")
_Reply = TypeVar("_Reply")
_Handler = Callable[[Any, _Request, _Context], Awaitable[_Reply]]


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


class KVManagerServicer(pb_grpc.KVManagerServicer):
    """The handlers; one lessor, one event loop."""

    def __init__(self, lessor: Lessor, stream_ended: Callable[[], None]) -> None:
        """stream_ended is called after a keepalive stream has ended, so that its worker's lock is looked at soon."""
        self._lessor = lessor
        self._stream_ended = stream_ended

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

    async def KeepAlive(
        self, request_iterator: AsyncIterator[pb.KeepAliveRequest], context: _Context
    ) -> AsyncIterator[pb.KeepAliveResponse]:
        worker_id, epoch = "", 0
        try:
            async for request in request_iterator:
                worker_id, epoch = request.worker_id, request.epoch
                busy_ms = request.busy_ms if request.HasField("busy_ms") else None
                revoked = self._lessor.keepalive(worker_id, epoch, busy_ms)
                yield pb.KeepAliveResponse(epoch=epoch, revoked_cache_ids=revoked)
        except ManagerError as error:
            await _abort(context, error)
        finally:
            self._lessor.stream_ended(worker_id, epoch)
            self._stream_ended()

    @_unary
    async def Acquire(self, request: pb.AcquireRequest, context: _Context) -> pb.AcquireResponse:
        translate.check_call(request.seq, request.acked_seq)
        translate.check_acquire_items(request.items)
        session = self._lessor.enter(request.worker_id, request.epoch, request.seq, request.acked_seq)
        self._lessor.require_live(session)
        results = []
        for item in request.items:
            try:
                lease = self._lessor.acquire(
                    session,
                    item.cache_id,
                    item.num_blocks,
                    priority=item.priority,
                    tenant=item.tenant,
                    age_ticket=item.age_ticket if item.HasField("age_ticket") else None,
                )
                results.append(_table_result(lease))
            except ManagerError as error:
                results.append(pb.LeaseResult(cache_id=item.cache_id, error=to_status(error)))
        return pb.AcquireResponse(epoch=request.epoch, results=results)

    @_unary
    async def Extend(self, request: pb.ExtendRequest, context: _Context) -> pb.ExtendResponse:
        translate.check_call(request.seq, request.acked_seq)
        translate.check_extend_items(request.items)
        session = self._lessor.enter(request.worker_id, request.epoch, request.seq, request.acked_seq)
        self._lessor.require_live(session)
        results = []
        for item in request.items:
            try:
                results.append(_table_result(self._lessor.extend(session, item.cache_id, item.num_blocks)))
            except ManagerError as error:
                results.append(pb.LeaseResult(cache_id=item.cache_id, error=to_status(error)))
        return pb.ExtendResponse(epoch=request.epoch, results=results)

    @_unary
    async def Release(self, request: pb.ReleaseRequest, context: _Context) -> pb.ReleaseResponse:
        translate.check_call(request.seq, request.acked_seq)
        session = self._lessor.enter(request.worker_id, request.epoch, request.seq, request.acked_seq)
        num_freed = 0
        for item in request.items:
            num_freed += self._lessor.release(session, item.cache_id, request.seq)
        return pb.ReleaseResponse(epoch=request.epoch, num_freed_blocks=num_freed)

    @_unary
    async def DescribePool(self, request: pb.DescribePoolRequest, context: _Context) -> pb.DescribePoolResponse:
        lessor = self._lessor
        return pb.DescribePoolResponse(
            pool_dir=str(lessor.pool_dir),
            pool=translate.pool_info(lessor.pool.files) if lessor.pool is not None else None,
            block_size=lessor.config.block_size,
            manager_epoch=lessor.manager_epoch,
        )

    @_unary
    async def ListLeases(self, request: pb.ListLeasesRequest, context: _Context) -> pb.ListLeasesResponse:
        lessor = self._lessor
        sessions = [
            self._session(session)
            for session in lessor.sessions()
            if not request.worker_id or session.worker.worker_id == request.worker_id
        ]
        leases = [_lease(session, lease) for session, lease in lessor.leases(request.worker_id)]
        return pb.ListLeasesResponse(sessions=sessions, leases=leases)

    def _session(self, session: Session) -> pb.Session:
        return pb.Session(
            worker_id=session.worker.worker_id,
            epoch=session.epoch,
            state=session.state,
            num_leases=len(session.leases),
            num_blocks=len(set(session.references())),
            silent_ms=round((self._lessor.now() - session.last_seen) * 1000),
            busy_ms=session.busy_ms,
            pid=session.worker.pid,
        )

    @_unary
    async def Stats(self, request: pb.StatsRequest, context: _Context) -> pb.StatsResponse:
        lessor = self._lessor
        counts, counters = lessor.counts(), lessor.counters
        return pb.StatsResponse(
            num_blocks=sum(counts.values()),
            free=counts[BlockState.FREE],
            leased=counts[BlockState.LEASED],
            sealed=counts[BlockState.SEALED],
            cached=counts[BlockState.CACHED],
            quarantined=counts[BlockState.QUARANTINED],
            num_leases=sum(len(session.leases) for session in lessor.sessions()),
            num_sessions=len(lessor.sessions()),
            num_acquired=counters.num_acquired,
            num_extended=counters.num_extended,
            num_released=counters.num_released,
            num_exhausted=counters.num_exhausted,
            num_revoked=counters.num_revoked,
            uptime_ms=round((lessor.now() - lessor.started_at) * 1000),
        )


def _table_result(lease: Lease) -> pb.LeaseResult:
    table = pb.BlockTable(
        block_ids=lease.blocks, num_cached_tokens=lease.num_cached_tokens, age_ticket=lease.age_ticket
    )
    return pb.LeaseResult(cache_id=lease.cache_id, table=table)


def _lease(session: Session, lease: Lease) -> pb.Lease:
    return pb.Lease(
        worker_id=session.worker.worker_id,
        cache_id=lease.cache_id,
        block_ids=lease.blocks,
        priority=lease.priority,
        tenant=lease.tenant,
        age_ticket=lease.age_ticket,
        revoked=lease.revoked or session.state == "revoked",
    )
