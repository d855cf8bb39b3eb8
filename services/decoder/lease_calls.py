"""The calls of one session: everything that queued up since the last call of a kind goes into the next one."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

import grpc
import structlog
from google.rpc import status_pb2

from clients.errors import CallCancelledError, CallError, DeadlineError, UnavailableError
from clients.kv_manager import KvManagerClient
from protos import kv_manager_pb2 as pb
from protos.rich_status import error_info, status_code
from services.decoder.errors import DecoderError, EngineFailedError, NeverFitsError, PoolExhaustedError
from services.decoder.kv_view import DeviceBlocks, KvView
from services.decoder.leases import (
    AcquireAsk,
    BlockSealed,
    ExtendAsk,
    ForkAsk,
    LeaseGranted,
    LeaseRefused,
    LeaseRevoked,
    Post,
    SealAsk,
    SealRefused,
)
from services.decoder.outbox import CallNumbers, Outbox, ReleaseAsk

_log = structlog.get_logger()

# How long the manager may put one answer off while others give way.
WAIT_MS = 2_000
# How long a stream that is under way waits for blocks before it fails.
PATIENCE_S = 120.0
# Between two attempts of such a stream: it cannot be told when blocks come back.
_RETRY_S = 0.05
# Blocks of this size in all take half a millisecond to sum up.
_MAX_INLINE_BYTES = 2 << 20

_Head = dict[str, Any]
_Reply = TypeVar("_Reply", pb.AcquireResponse, pb.ForkResponse, pb.ExtendResponse, pb.ReleaseResponse, pb.SealResponse)
_Ask = TypeVar("_Ask", bound=AcquireAsk | ExtendAsk)


class SessionBrokenError(Exception):
    """The session is over and must be opened anew. `is_away` says that the manager did not answer."""

    def __init__(self, message: str, is_away: bool = False) -> None:
        super().__init__(message)
        self.is_away = is_away


def broken_by(error: CallError) -> SessionBrokenError:
    """The end of a session because of a failed call."""
    return SessionBrokenError(str(error), is_away=_is_silence(error))


class LeaseCalls:
    """Sends what is open in the outbox, and posts the answers to the engine. Each kind has one call in flight, and one for each
    lease that waits for others to give way.
    """

    def __init__(
        self, client: KvManagerClient, worker_id: str, epoch: int, outbox: Outbox, post: Post, kv: KvView
    ) -> None:
        self._client = client
        self._worker_id = worker_id
        self._epoch = epoch
        self._outbox = outbox
        self._post = post
        self._kv = kv
        self._numbers = CallNumbers()
        self._wakes: list[asyncio.Event] = []
        # The age that the manager noted when it had no blocks for a new arrival: its next attempt counts from the first.
        self._tickets: dict[int, int] = {}

    def wake(self) -> None:
        """The outbox has more."""
        for wake in self._wakes:
            wake.set()

    async def run(self) -> None:
        """Sends until the session breaks; raises an ExceptionGroup of SessionBrokenError then."""
        async with asyncio.TaskGroup() as group:
            acquires = _Growth(self, group, self._outbox.acquires, self._outbox.next_acquires, self._acquire)
            extends = _Growth(self, group, self._outbox.extends, self._outbox.next_extends, self._extend)
            for send in (acquires.send, extends.send, self._send_forks, self._send_seals, self._send_releases):
                wake = asyncio.Event()
                wake.set()
                self._wakes.append(wake)
                group.create_task(_pump(wake, send))

    async def _acquire(self, asks: Sequence[AcquireAsk], wait_ms: int) -> Sequence[pb.LeaseResult]:
        items = [_acquire_item(ask, self._tickets.get(ask.cache_id, ask.age_ticket)) for ask in asks]
        reply = await self._call(
            lambda head: self._client.acquire(pb.AcquireRequest(**head, items=items, wait_ms=wait_ms))
        )
        return reply.results

    async def _extend(self, asks: Sequence[ExtendAsk], wait_ms: int) -> Sequence[pb.LeaseResult]:
        items = [pb.ExtendItem(cache_id=ask.cache_id, num_blocks=ask.num_blocks) for ask in asks]
        reply = await self._call(
            lambda head: self._client.extend(pb.ExtendRequest(**head, items=items, wait_ms=wait_ms))
        )
        return reply.results

    async def _send_forks(self) -> bool:
        asks = self._outbox.next_forks()
        if not asks:
            return False
        items = [_fork_item(ask) for ask in asks]
        try:
            reply = await self._call(lambda head: self._client.fork(pb.ForkRequest(**head, items=items)))
        except CallError as error:
            for ask in asks:
                if self._outbox.forks.pop(ask.cache_id, None) is not None:
                    self.refuse(ask.cache_id, error)
            return True
        for ask, result in zip(asks, reply.results, strict=True):
            if ask.cache_id not in self._outbox.forks:  # released meanwhile
                continue
            if result.WhichOneof("result") == "table" or status_code(result.error) is grpc.StatusCode.ABORTED:
                self.answer(result)
            else:  # a parent that is gone, too: its sample asks for blocks of its own
                self._post(LeaseRefused(ask.cache_id, refusal(result.error)))
            del self._outbox.forks[ask.cache_id]
        return True

    async def _send_seals(self) -> bool:
        asks = self._outbox.next_seals()
        if not asks:
            return False
        # Of large blocks on another thread, and without the interpreter's lock; for small ones the way there would take longer. A
        # device may be busy with a step.
        if isinstance(self._kv, DeviceBlocks) or len(asks) * self._kv.shape.block_bytes > _MAX_INLINE_BYTES:
            checksums = await asyncio.to_thread(_checksums, self._kv, asks)
        else:
            checksums = _checksums(self._kv, asks)
        items = [_seal_item(ask, checksums[index]) for index, ask in enumerate(asks) if index in checksums]
        results: Mapping[tuple[int, int], pb.SealResult] = {}
        if items:
            with suppress(CallError):  # refused as a whole: then nothing of it is sealed
                reply = await self._call(lambda head: self._client.seal(pb.SealRequest(**head, items=items)))
                results = {(result.cache_id, result.block_index): result for result in reply.results}
        for ask in asks:
            result = results.get((ask.cache_id, ask.block_index))
            if result is not None and result.WhichOneof("result") == "block_id":
                self._post(BlockSealed(ask.cache_id, ask.block_index, ask.block_id, result.block_id))
                continue
            # A lease that is gone, after a revocation or a new session, has nothing to seal.
            is_gone = result is None or result.error.code == grpc.StatusCode.NOT_FOUND.value[0]
            self._post(SealRefused(ask.cache_id, "" if is_gone or result is None else result.error.message))
        self._outbox.end_seals(asks)
        self.wake()  # for what waited for them
        return True

    async def _send_releases(self) -> bool:
        asks = self._outbox.next_releases()
        if not asks:
            return False
        items = [_release_item(ask) for ask in asks]
        try:
            await self._call(lambda head: self._client.release(pb.ReleaseRequest(**head, items=items)))
        except CallError as error:
            # Nobody waits for the answer but the blocks: a new session, which claims only the rest, frees them.
            raise SessionBrokenError(str(error)) from error
        self._outbox.end_releases(asks)
        return True

    async def _call(self, call: Callable[[_Head], Awaitable[_Reply]]) -> _Reply:
        """One numbered call; raises SessionBrokenError when it ends the session, CallError when it failed alone."""
        seq, acked_seq = self._numbers.begin()
        head = {"worker_id": self._worker_id, "epoch": self._epoch, "seq": seq, "acked_seq": acked_seq}
        try:
            reply = await call(head)
        except CallError as error:
            if error.code is grpc.StatusCode.ABORTED or _is_silence(error):
                raise broken_by(error) from error
            _log.error("lease_call_failed", error=str(error))
            raise
        finally:
            self._numbers.end(seq)
        if reply.epoch != self._epoch:
            raise SessionBrokenError(f"a reply of epoch {reply.epoch} in a session of epoch {self._epoch}")
        return reply

    def note_ticket(self, result: pb.LeaseResult) -> None:
        """Keeps the age of an ask that found no blocks, until drop_ticket."""
        ticket = error_info(result.error).metadata.get("age_ticket", "")
        if ticket.isdigit():
            self._tickets[result.cache_id] = int(ticket)

    def drop_ticket(self, cache_id: int) -> None:
        """The ask is answered, or withdrawn."""
        self._tickets.pop(cache_id, None)

    def answer(self, result: pb.LeaseResult) -> None:
        """Passes one result on; raises SessionBrokenError when it says that the session is over."""
        cache_id = result.cache_id
        if result.WhichOneof("result") == "table":
            table = result.table
            self._post(
                LeaseGranted(cache_id, tuple(table.block_ids), table.num_cached_tokens, table.age_ticket or None)
            )
            return
        code = status_code(result.error)
        if code is grpc.StatusCode.NOT_FOUND or error_info(result.error).reason == "LEASE_REVOKED":
            self._post(LeaseRevoked(cache_id))  # its sequence starts over with another
        elif code is grpc.StatusCode.ABORTED:
            raise SessionBrokenError(result.error.message)
        else:
            self._post(LeaseRefused(cache_id, refusal(result.error)))

    def refuse(self, cache_id: int, error: CallError) -> None:
        """Passes on that a call failed as a whole."""
        self._post(LeaseRefused(cache_id, EngineFailedError(f"the KV manager failed: {error}")))


class _Growth(Generic[_Ask]):
    """Sends one of the two kinds of asks that want blocks.

    All go together first, to be answered at once. What the pool has no blocks for goes again, each alone, with leave to put the answer
    off: in one call with others it would hold them up.
    """

    def __init__(
        self,
        calls: LeaseCalls,
        group: asyncio.TaskGroup,
        asks: dict[int, _Ask],
        next_asks: Callable[[set[int]], list[_Ask]],
        call: Callable[[Sequence[_Ask], int], Awaitable[Sequence[pb.LeaseResult]]],
    ) -> None:
        self._calls = calls
        self._group = group
        self._asks = asks
        self._next_asks = next_asks
        self._call = call
        self._waiting: set[int] = set()

    async def send(self) -> bool:
        """One call, if there is something to ask for; says whether there was."""
        asks = self._next_asks(self._waiting)
        if not asks:
            return False
        try:
            results = await self._call(asks, 0)
        except CallError as error:
            for ask in asks:
                self._refuse(ask, error)
            return True
        for ask, result in zip(asks, results, strict=True):
            if _is_exhausted(result) and _may_wait(ask) and ask.cache_id in self._asks:
                self._waiting.add(ask.cache_id)
                self._calls.note_ticket(result)
                self._group.create_task(self._wait(ask))
            else:
                self._answer(ask, result)
        return True

    async def _wait(self, ask: _Ask) -> None:
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + (PATIENCE_S if _is_patient(ask) else 0.0)
        try:
            # Until it is answered, or released meanwhile.
            while ask.cache_id in self._asks:
                [result] = await self._call([ask], WAIT_MS)
                if not _is_exhausted(result) or loop.time() >= give_up_at:
                    self._answer(ask, result)
                    return
                await asyncio.sleep(_RETRY_S)
        except CallError as error:
            self._refuse(ask, error)
        finally:
            self._waiting.discard(ask.cache_id)
            self._calls.drop_ticket(ask.cache_id)

    def _answer(self, ask: _Ask, result: pb.LeaseResult) -> None:
        # One that was released meanwhile concerns nobody. It stays open until it is passed on: a broken session sends it again.
        if ask.cache_id in self._asks:
            self._calls.answer(result)
            del self._asks[ask.cache_id]

    def _refuse(self, ask: _Ask, error: CallError) -> None:
        if self._asks.pop(ask.cache_id, None) is not None:
            self._calls.refuse(ask.cache_id, error)


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


def _is_exhausted(result: pb.LeaseResult) -> bool:
    return status_code(result.error) is grpc.StatusCode.RESOURCE_EXHAUSTED


def _may_wait(ask: AcquireAsk | ExtendAsk) -> bool:
    return isinstance(ask, AcquireAsk) or ask.is_needed


def _is_patient(ask: AcquireAsk | ExtendAsk) -> bool:
    return isinstance(ask, AcquireAsk) and ask.is_patient


def _checksums(kv: KvView, asks: Sequence[SealAsk]) -> dict[int, int]:
    """CRC-32 of the blocks of some asks, by index; without those that this pool does not have, which were asked of another."""
    checksums: dict[int, int] = {}
    if isinstance(kv, DeviceBlocks):
        known = {index: ask.block_id for index, ask in enumerate(asks) if ask.block_id < kv.num_blocks}
        with suppress(IndexError):  # it was closed meanwhile
            checksums = dict(zip(known, kv.checksums(list(known.values())), strict=True))
        return checksums
    for index, ask in enumerate(asks):
        with suppress(IndexError):
            checksums[index] = zlib.crc32(kv.block_bytes(ask.block_id).data)
    return checksums


def _acquire_item(ask: AcquireAsk, age_ticket: int | None) -> pb.AcquireItem:
    return pb.AcquireItem(
        cache_id=ask.cache_id,
        num_blocks=ask.num_blocks,
        priority=ask.priority,
        tenant=ask.tenant,
        age_ticket=age_ticket,
        prefix_hashes=ask.prefix_hashes,
    )


def _fork_item(ask: ForkAsk) -> pb.ForkItem:
    return pb.ForkItem(
        parent_cache_id=ask.parent_cache_id,
        cache_id=ask.cache_id,
        num_blocks=ask.num_blocks,
        max_shared_blocks=ask.max_shared_blocks,
    )


def _seal_item(ask: SealAsk, checksum: int) -> pb.SealItem:
    return pb.SealItem(
        cache_id=ask.cache_id,
        block_index=ask.block_index,
        block_id=ask.block_id,
        content_hash=ask.content_hash,
        parent_hash=ask.parent_hash,
        num_tokens=ask.num_tokens,
        data_checksum=checksum,
    )


def _release_item(ask: ReleaseAsk) -> pb.ReleaseItem:
    return pb.ReleaseItem(cache_id=ask.cache_id, block_ids=[] if ask.block_id is None else [ask.block_id])


def _is_silence(error: CallError) -> bool:
    return isinstance(error, (UnavailableError, DeadlineError, CallCancelledError))
