"""A typed client of the KVManager service: one channel, a deadline on every unary call, errors with their details."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from types import TracebackType
from typing import Any, TypeVar

import grpc

from clients.channel import open_channel
from clients.errors import call_error
from protos import kv_manager_pb2 as pb
from protos import kv_manager_pb2_grpc

DEFAULT_DEADLINE_S = 5.0

_Reply = TypeVar("_Reply")


class KvManagerClient:
    """Calls one manager. Every method raises a CallError of clients.errors; DeadlineError after `deadline_s` included."""

    def __init__(self, address: str, deadline_s: float = DEFAULT_DEADLINE_S) -> None:
        """Does not connect yet; raises BadTargetError for an address of another form."""
        self.address = address
        self._deadline_s = deadline_s
        self._channel = open_channel(address)
        self._stub: Any = kv_manager_pb2_grpc.KVManagerStub(self._channel)

    async def __aenter__(self) -> KvManagerClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the channel; calls in flight are cancelled."""
        await self._channel.close()

    async def register_worker(self, request: pb.RegisterWorkerRequest) -> pb.RegisterWorkerResponse:
        """Opens a session, or opens one anew with its claims."""
        return await self._call(self._stub.RegisterWorker(request, timeout=self._deadline_s))

    async def acquire(self, request: pb.AcquireRequest) -> pb.AcquireResponse:
        """Creates leases; each item succeeds or fails alone. The time that the manager may wait is added to the deadline."""
        return await self._call(self._stub.Acquire(request, timeout=self._deadline_s + request.wait_ms / 1000))

    async def extend(self, request: pb.ExtendRequest) -> pb.ExtendResponse:
        """Grows leases; each item succeeds or fails alone. The time that the manager may wait is added to the deadline."""
        return await self._call(self._stub.Extend(request, timeout=self._deadline_s + request.wait_ms / 1000))

    async def fork(self, request: pb.ForkRequest) -> pb.ForkResponse:
        """Creates leases that share another's sealed blocks; each item succeeds or fails alone, and at once."""
        return await self._call(self._stub.Fork(request, timeout=self._deadline_s))

    async def release(self, request: pb.ReleaseRequest) -> pb.ReleaseResponse:
        """Gives leases back."""
        return await self._call(self._stub.Release(request, timeout=self._deadline_s))

    async def seal(self, request: pb.SealRequest) -> pb.SealResponse:
        """Makes full blocks immutable and findable; each item succeeds or fails alone."""
        return await self._call(self._stub.Seal(request, timeout=self._deadline_s))

    async def flush(self, tenant: str | None = None) -> pb.FlushResponse:
        """Drops cached blocks that nobody holds: all, or one tenant's."""
        return await self._call(self._stub.Flush(pb.FlushRequest(tenant=tenant), timeout=self._deadline_s))

    async def scrub(self, max_bytes_per_second: int = 0) -> AsyncGenerator[pb.ScrubProgress, None]:
        """Verifies the checksums of all sealed blocks, and yields the progress until it is done. 0: the manager's own limit."""
        call = self._stub.Scrub(pb.ScrubRequest(max_bytes_per_second=max_bytes_per_second))
        try:
            async for progress in call:
                yield progress
        except grpc.aio.AioRpcError as error:
            raise call_error(error, self.address) from error
        finally:
            call.cancel()

    async def describe_pool(self) -> pb.DescribePoolResponse:
        """The pool's place and shape."""
        return await self._call(self._stub.DescribePool(pb.DescribePoolRequest(), timeout=self._deadline_s))

    async def list_leases(self, worker_id: str = "", with_block_states: bool = False) -> pb.ListLeasesResponse:
        """Sessions and leases of one worker, or of all; and the state of every block when asked for."""
        request = pb.ListLeasesRequest(worker_id=worker_id, with_block_states=with_block_states)
        return await self._call(self._stub.ListLeases(request, timeout=self._deadline_s))

    async def stats(self) -> pb.StatsResponse:
        """Blocks by state, and counters."""
        return await self._call(self._stub.Stats(pb.StatsRequest(), timeout=self._deadline_s))

    async def keep_alive(
        self, requests: AsyncIterator[pb.KeepAliveRequest]
    ) -> AsyncGenerator[pb.KeepAliveResponse, None]:
        """Sends what `requests` yields and yields the replies until either side ends; the caller bounds the silence."""
        call = self._stub.KeepAlive(requests)
        try:
            async for reply in call:
                yield reply
        except grpc.aio.AioRpcError as error:
            raise call_error(error, self.address) from error
        finally:
            call.cancel()

    async def _call(self, call: Awaitable[_Reply]) -> _Reply:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise call_error(error, self.address) from error
