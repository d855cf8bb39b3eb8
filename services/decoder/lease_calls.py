"""The calls of one session: everything that queued up since the last call of a kind goes into the next one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import grpc
import structlog
from google.rpc import status_pb2

from clients.errors import CallCancelledError, CallError, DeadlineError, UnavailableError
from clients.kv_manager import KvManagerClient
from protos import kv_manager_pb2 as pb
from protos.rich_status import status_code
from services.decoder.errors import DecoderError, EngineFailedError, NeverFitsError, PoolExhaustedError
from services.decoder.leases import AcquireAsk, LeaseGranted, LeaseRefused, LeaseRevoked, Post
from services.decoder.outbox import CallNumbers, Outbox

_log = structlog.get_logger()

_Reply = TypeVar("_Reply", pb.AcquireResponse, pb.ExtendResponse, pb.ReleaseResponse)


class SessionBrokenError(Exception):
    """The session is over and must be opened anew. `is_away` says that the manager did not answer."""

    def __init__(self, message: str, is_away: bool = False) -> None:
        super().__init__(message)
        self.is_away = is_away


def broken_by(error: CallError) -> SessionBrokenError:
    """The end of a session because of a failed call."""
    return SessionBrokenError(str(error), is_away=_is_silence(error))


class LeaseCalls:
    """Sends what is open in the outbox, and posts the answers to the engine. A kind has one call in flight."""

    def __init__(self, client: KvManagerClient, worker_id: str, epoch: int, outbox: Outbox, post: Post) -> None:
        self._client = client
        self._worker_id = worker_id
        self._epoch = epoch
        self._outbox = outbox
        self._post = post
        self._numbers = CallNumbers()
        self._wakes: list[asyncio.Event] = []

    def wake(self) -> None:
        """The outbox has more."""
        for wake in self._wakes:
            wake.set()

    async def run(self) -> None:
        """Sends until the session breaks; raises an ExceptionGroup of SessionBrokenError then."""
        async with asyncio.TaskGroup() as group:
            for send in (self._send_acquires, self._send_extends, self._send_releases):
                wake = asyncio.Event()
                wake.set()
                self._wakes.append(wake)
                group.create_task(_pump(wake, send))

    async def _send_acquires(self) -> bool:
        asks = self._outbox.next_acquires()
        if not asks:
            return False
        items = [_acquire_item(ask) for ask in asks]
        try:
            reply = await self._call(lambda head: self._client.acquire(pb.AcquireRequest(**head, items=items)))
        except CallError as error:
            self._refuse([ask.cache_id for ask in asks], error, self._outbox.acquires)
        else:
            self._answer(reply.results, self._outbox.acquires)
        return True

    async def _send_extends(self) -> bool:
        asks = self._outbox.next_extends()
        if not asks:
            return False
        items = [pb.ExtendItem(cache_id=cache_id, num_blocks=num_blocks) for cache_id, num_blocks in asks]
        try:
            reply = await self._call(lambda head: self._client.extend(pb.ExtendRequest(**head, items=items)))
        except CallError as error:
            self._refuse([cache_id for cache_id, _ in asks], error, self._outbox.extends)
        else:
            self._answer(reply.results, self._outbox.extends)
        return True

    async def _send_releases(self) -> bool:
        cache_ids = self._outbox.next_releases()
        if not cache_ids:
            return False
        items = [pb.ReleaseItem(cache_id=cache_id) for cache_id in cache_ids]
        try:
            await self._call(lambda head: self._client.release(pb.ReleaseRequest(**head, items=items)))
        except CallError as error:
            # Nobody waits for the answer but the blocks: a new session, which claims only the rest, frees them.
            raise SessionBrokenError(str(error)) from error
        self._outbox.released(cache_ids)
        return True

    async def _call(self, call: Callable[[dict[str, Any]], Awaitable[_Reply]]) -> _Reply:
        """One numbered call; raises SessionBrokenError when it ends the session, CallError when it failed alone."""
        seq, acked_seq = self._numbers.begin()
        head = {"worker_id": self._worker_id, "epoch": self._epoch, "seq": seq, "acked_seq": acked_seq}
        try:
            reply = await call(head)
        except CallError as error:
            if error.code is grpc.StatusCode.ABORTED or _is_silence(error):
                raise broken_by(error) from error
            raise
        finally:
            self._numbers.end(seq)
        if reply.epoch != self._epoch:
            raise SessionBrokenError(f"a reply of epoch {reply.epoch} in a session of epoch {self._epoch}")
        return reply

    def _answer(self, results: Sequence[pb.LeaseResult], asks: dict[int, Any]) -> None:
        """Passes results on; one whose lease was released meanwhile concerns nobody."""
        for result in results:
            cache_id = result.cache_id
            if cache_id not in asks:
                continue
            if result.WhichOneof("result") == "table":
                table = result.table
                answer: LeaseGranted | LeaseRefused | LeaseRevoked = LeaseGranted(
                    cache_id, tuple(table.block_ids), table.num_cached_tokens, table.age_ticket or None
                )
            elif result.error.code == grpc.StatusCode.ABORTED.value[0]:
                raise SessionBrokenError(result.error.message)
            elif result.error.code == grpc.StatusCode.NOT_FOUND.value[0]:
                answer = LeaseRevoked(cache_id)  # the manager knows it no more: the sequence starts over with another
            else:
                answer = LeaseRefused(cache_id, refusal(result.error))
            del asks[cache_id]
            self._post(answer)

    def _refuse(self, cache_ids: Sequence[int], error: CallError, asks: dict[int, Any]) -> None:
        _log.error("lease_call_failed", error=str(error))
        for cache_id in cache_ids:
            if asks.pop(cache_id, None) is not None:
                self._post(LeaseRefused(cache_id, EngineFailedError(f"the KV manager failed: {error}")))


async def _pump(wake: asyncio.Event, send: Callable[[], Awaitable[bool]]) -> None:
    while True:
        await wake.wait()
        wake.clear()
        while await send():
            pass


def refusal(status: status_pb2.Status) -> DecoderError:
    """What a request fails with when the manager refuses its blocks with this status."""
    code = status_code(status)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return PoolExhaustedError(status)
    if code is grpc.StatusCode.OUT_OF_RANGE:
        return NeverFitsError(status.message)
    return EngineFailedError(f"the KV manager refused a lease: {status.message}")


def _acquire_item(ask: AcquireAsk) -> pb.AcquireItem:
    return pb.AcquireItem(
        cache_id=ask.cache_id,
        num_blocks=ask.num_blocks,
        priority=ask.priority,
        tenant=ask.tenant,
        age_ticket=ask.age_ticket,
    )


def _is_silence(error: CallError) -> bool:
    return isinstance(error, (UnavailableError, DeadlineError, CallCancelledError))
