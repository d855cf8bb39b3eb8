"""A typed client of the Decoder service whose streams survive broken connections and dead decoders."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

import grpc

from clients.channel import connected_anew, open_channel
from clients.errors import CallError, DeadlineError, DecoderUnavailable, ErrorDetails, ProtocolError, call_error
from clients.events import Event, StreamBroken, Tokens
from clients.progress import StreamProgress
from protos import decoder_pb2 as pb
from protos import decoder_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from protos.decoder_pb2_grpc import DecoderAsyncStub

DEFAULT_RETRY_FOR_S = 60.0
DEFAULT_CALL_TIMEOUT_S = 10.0

_BASE_DELAY_S = 0.05
_MAX_DELAY_S = 2.0
_SPREAD_S = 0.1  # over which the streams return that waited for one decoder
_ABORT_TIMEOUT_S = 1.0
_TENANT_KEY = "leasehold-tenant"
_QUEUE_FULL = "QUEUE_FULL"  # the reason of a refusal that concerns one decoder only, as a full pool does not

# CANCELLED is what a gRPC server that stops makes of calls that arrive at that moment: no service of it was asked.
_OUTAGES = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED})

_Reply = TypeVar("_Reply")


@dataclass(frozen=True, slots=True)
class Waiting:
    """How the client tells time and waits; tests put their own in."""

    clock: Callable[[], float] = time.monotonic  # seconds
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    uniform: Callable[[float, float], float] = random.uniform  # jitter, so that many streams do not return in one burst


class _Outage:
    """Counts failed attempts and the seconds without a stream since the last progress, up to a limit."""

    def __init__(self, retry_for_s: float, num_targets: int, waiting: Waiting) -> None:
        self._retry_for_s = retry_for_s
        self._num_targets = num_targets
        self._waiting = waiting
        self._began: float | None = None
        self._spent_s = 0.0
        self._num_failed = 0

    def saw(self, event: Event) -> None:
        """A token makes the limit start anew. Waiting in a decoder's queue is no outage, but no progress either."""
        if isinstance(event, Tokens):
            self._began, self._spent_s, self._num_failed = None, 0.0, 0
        elif self._began is not None:
            self._spent_s += self._waiting.clock() - self._began
            self._began = None

    def failed(self, error: CallError) -> float:
        """Seconds to wait before the next attempt, the last of which is at the limit; raises DecoderUnavailable then."""
        now = self._waiting.clock()
        if self._began is None:
            self._began = now
        outage_s = self._spent_s + now - self._began
        # Every other target is tried before the waits grow.
        limit_s = min(_MAX_DELAY_S, _BASE_DELAY_S * 2 ** min(self._num_failed // self._num_targets, 16))
        self._num_failed += 1
        delay_s = self._waiting.uniform(0, limit_s)
        if self._num_targets == 1 and error.details.retry_delay_s is not None:
            delay_s = max(delay_s, error.details.retry_delay_s)
        if outage_s >= self._retry_for_s:
            raise DecoderUnavailable(error.details, self._num_failed, outage_s) from error
        return min(delay_s, self._retry_for_s - outage_s)


class DecoderClient:
    """One channel for each of several equal decoders; the targets take new requests in turn.

    Unary calls end after `call_timeout_s` seconds; `on_unary_retry` is told why one is tried again (streams tell it as
    an event). Use as an async context manager, or call `close`.
    """

    def __init__(
        self,
        targets: str | Sequence[str],
        *,
        call_timeout_s: float = DEFAULT_CALL_TIMEOUT_S,
        waiting: Waiting | None = None,
        on_unary_retry: Callable[[StreamBroken], None] | None = None,
    ) -> None:
        self.targets: tuple[str, ...] = (targets,) if isinstance(targets, str) else tuple(targets)
        if not self.targets:
            raise ValueError("targets: at least one address is needed")
        self._call_timeout_s = call_timeout_s
        self._waiting = waiting or Waiting()
        self._on_unary_retry = on_unary_retry
        self._channels = [open_channel(target) for target in self.targets]
        self._stubs = [pb_grpc.DecoderStub(channel) for channel in self._channels]
        self._turn = itertools.count()

    async def __aenter__(self) -> DecoderClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes every channel and cancels what runs on them."""
        for channel in self._channels:
            await channel.close()

    async def model_info(self, retry_for_s: float = 0.0) -> pb.GetModelInfoResponse:
        """Describes the model, as the first target that answers within retry_for_s seconds knows it."""
        request = pb.GetModelInfoRequest()
        return await self._unary(lambda stub, timeout_s: stub.GetModelInfo(request, timeout=timeout_s), retry_for_s)

    async def tokenize(self, request: pb.TokenizeRequest, retry_for_s: float = 0.0) -> list[int]:
        """The token ids of a text or a conversation, as `generate` would see them."""
        reply = await self._unary(lambda stub, timeout_s: stub.Tokenize(request, timeout=timeout_s), retry_for_s)
        return list(reply.ids)

    async def abort(self, request_id: str) -> bool:
        """Cancels a request at every target; False when none of those that answered knew it.

        Raises CallError when a target failed and no other one had the request.
        """
        request = pb.AbortRequest(request_id=request_id)
        failure: CallError | None = None
        for target, stub in zip(self.targets, self._stubs, strict=True):
            try:
                if (await stub.Abort(request, timeout=self._call_timeout_s)).found:
                    return True
            except grpc.aio.AioRpcError as rpc_error:
                failure = call_error(rpc_error, target)
        if failure is not None:
            raise failure
        return False

    async def generate(
        self,
        request: pb.GenerateRequest,
        *,
        retry_for_s: float = DEFAULT_RETRY_FOR_S,
        timeout_s: float | None = None,
        tenant: str = "",
    ) -> AsyncGenerator[Event, None]:
        """Streams one request, and goes on with the tokens it has whenever a decoder is unavailable.

        A new request that finds a decoder's queue full is offered to each of the others once; that all refuse is an ExhaustedError.
        retry_for_s bounds the seconds without a stream since the last token (then DecoderUnavailable), timeout_s the
        whole stream (then DeadlineError); the blocks are leased for `tenant`. Closing or cancelling the iterator cancels
        the request at the decoder.
        """
        progress = StreamProgress(request)
        outage = _Outage(retry_for_s, len(self.targets), self._waiting)
        deadline = None if timeout_s is None else self._waiting.clock() + timeout_s
        metadata = ((_TENANT_KEY, tenant),) if tenant else ()
        first = next(self._turn)
        for attempt in itertools.count():
            index = (first + attempt) % len(self.targets)
            target = self.targets[index]
            left_s = self._left_s(deadline, target)
            call = self._stubs[index].Generate(progress.next_request(), timeout=left_s, metadata=metadata)
            try:
                async for response in call:
                    for event in progress.take(response, target):
                        outage.saw(event)
                        yield event
            except grpc.aio.AioRpcError as rpc_error:
                if progress.done:  # all of it came; the rest of the stream tells nothing more
                    return
                error = call_error(rpc_error, target)
                others_left = retry_for_s > 0 and attempt + 1 < len(self.targets)
                if not await self._may_retry(error, attempt, index, progress.request_id, others_left):
                    raise error from rpc_error
            else:
                if progress.done:
                    return
                raise ProtocolError(f"{target} ended the stream before it had finished it")
            finally:
                call.cancel()
            delay_s = outage.failed(error)
            yield StreamBroken(error, delay_s, self.targets[(index + 1) % len(self.targets)])
            left_s = self._left_s(deadline, target)
            await self._wait(delay_s if left_s is None else min(delay_s, left_s), index + 1)

    async def _may_retry(self, error: CallError, attempt: int, index: int, request_id: str, others_left: bool) -> bool:
        if error.code in _OUTAGES:
            return True
        if error.reason == _QUEUE_FULL:
            return others_left
        if error.code is grpc.StatusCode.ALREADY_EXISTS and attempt > 0:
            # Our own broken stream is still running there: the decoder has not seen yet that its client is gone.
            with contextlib.suppress(grpc.aio.AioRpcError):
                await self._stubs[index].Abort(pb.AbortRequest(request_id=request_id), timeout=_ABORT_TIMEOUT_S)
            return True
        return False

    async def _unary(self, call: Callable[[DecoderAsyncStub, float], Awaitable[_Reply]], retry_for_s: float) -> _Reply:
        outage = _Outage(retry_for_s, len(self.targets), self._waiting)
        for attempt in itertools.count():
            index = attempt % len(self.targets)
            try:
                return await call(self._stubs[index], self._call_timeout_s)
            except grpc.aio.AioRpcError as rpc_error:
                error = call_error(rpc_error, self.targets[index])
                if error.code not in _OUTAGES:
                    raise error from rpc_error
            delay_s = outage.failed(error)
            if self._on_unary_retry is not None:
                self._on_unary_retry(StreamBroken(error, delay_s, self.targets[(index + 1) % len(self.targets)]))
            await self._wait(delay_s, index + 1)
        raise AssertionError("unreachable: count() is endless")

    def _left_s(self, deadline: float | None, target: str) -> float | None:
        if deadline is None:
            return None
        left_s = deadline - self._waiting.clock()
        if left_s <= 0:
            raise _own_deadline(target)
        return left_s

    async def _wait(self, most_s: float, index: int) -> None:
        """Returns after most_s seconds, or soon after the target of that number came back: a restart is not slept through."""
        sleeping = asyncio.ensure_future(self._waiting.sleep(most_s))
        back = asyncio.ensure_future(connected_anew(self._channels[index % len(self.targets)]))
        try:
            await asyncio.wait({sleeping, back}, return_when=asyncio.FIRST_COMPLETED)
            if not sleeping.done():
                back.result()
                await self._waiting.sleep(min(most_s, self._waiting.uniform(0, _SPREAD_S)))
        finally:
            sleeping.cancel()
            back.cancel()


def _own_deadline(target: str) -> DeadlineError:
    message = "the deadline passed while no decoder could be reached"
    return DeadlineError(ErrorDetails(grpc.StatusCode.DEADLINE_EXCEEDED, message, target))
