"""The Decoder service: translates between gRPC and the engine, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import NoReturn, Protocol

import grpc
import structlog
from grpc_status import rpc_status

from protos import decoder_pb2, decoder_pb2_grpc
from services.decoder.errors import DecoderError, DuplicateRequestError, to_status
from services.decoder.event_router import EventRouter
from services.decoder.request import Admitted, DecodeRequest
from services.decoder.request_meter import RequestFigures, RequestMeter
from services.decoder.request_parser import TENANT_METADATA_KEY, ParsedRequest, RequestParser
from services.decoder.request_stream import RequestStream
from services.decoder.tokenizer import Tokenizer

_log = structlog.get_logger(__name__)

_Context = grpc.aio.ServicerContext[decoder_pb2.GenerateRequest, decoder_pb2.GenerateResponse]
_TokenizeContext = grpc.aio.ServicerContext[decoder_pb2.TokenizeRequest, decoder_pb2.TokenizeResponse]


class EngineLike(Protocol):
    """What the servicer needs of the engine."""

    def submit(self, *requests: DecodeRequest) -> None: ...
    def require_room(self) -> None: ...
    def abort(self, request_id: str) -> bool: ...


class DecoderServicer(decoder_pb2_grpc.DecoderServicer):
    """Serves one engine, whose `emit` is the router's."""

    def __init__(
        self,
        engine: EngineLike,
        router: EventRouter,
        parser: RequestParser,
        tokenizer: Tokenizer,
        info: decoder_pb2.GetModelInfoResponse,
        figures: RequestFigures | None = None,
    ) -> None:
        self._engine = engine
        self._router = router
        self._parser = parser
        self._tokenizer = tokenizer
        self._info = info
        self._figures = figures or RequestFigures()
        self._running: dict[str, list[str]] = {}  # by a client's request id, the engine's ids of its samples

    # A coroutine that writes, not a generator: when the client goes away the cancellation is raised in here, wherever it waits.
    async def Generate(self, request: decoder_pb2.GenerateRequest, context: _Context) -> None:  # type: ignore[override]
        """Streams one request; whatever ends it, the engine ends it too."""
        meter = self._figures.request()
        try:
            if not request.HasField("resume"):
                self._engine.require_room()  # a full decoder does not tokenize what it will refuse
            # Long texts take long to tokenize, and other streams must not wait for that.
            parsed = await asyncio.to_thread(self._parser.parse, request, _tenant(context))
            await self._stream(parsed, context, meter)
        except DecoderError as error:
            meter.end("refused", error)
            _log.info("request refused", request_id=request.request_id, reason=error.reason, error=str(error))
            await _abort_call(context, error)

    async def Tokenize(
        self, request: decoder_pb2.TokenizeRequest, context: _TokenizeContext
    ) -> decoder_pb2.TokenizeResponse:
        """The prompt's token ids, as Generate would take them."""
        try:
            ids = await asyncio.to_thread(self._parser.tokenize, request)
        except DecoderError as error:
            await _abort_call(context, error)
        return decoder_pb2.TokenizeResponse(ids=ids)

    async def GetModelInfo(
        self, request: decoder_pb2.GetModelInfoRequest, context: object
    ) -> decoder_pb2.GetModelInfoResponse:
        """What was found out when the decoder started."""
        return self._info

    async def Abort(self, request: decoder_pb2.AbortRequest, context: object) -> decoder_pb2.AbortResponse:
        """Its stream ends with FINISH_REASON_CANCELLED."""
        found = [self._engine.abort(sample_id) for sample_id in self._running.get(request.request_id, ())]
        return decoder_pb2.AbortResponse(found=any(found))

    async def _stream(self, parsed: ParsedRequest, context: _Context, meter: RequestMeter) -> None:
        first = parsed.first
        stream = RequestStream(parsed, self._tokenizer, self._info.numerics_id)
        requests = stream.open_requests
        if not requests:  # it broke off between its last token and `finished`
            for response in stream.start(Admitted(0, first.age_ticket)):
                await context.write(response)
            meter.end("stop")
            return
        sample_ids = [request.request_id for request in requests]
        # A stream is over for its client before the engine has ended it: whoever uses the id again at once is not refused for that.
        await self._router.until_let_go(sample_ids)
        if first.request_id in self._running:  # with other samples than its first, perhaps: the router knows those only
            raise DuplicateRequestError(f"request_id: a request {first.request_id!r} is running; choose another id")
        events = self._router.open(sample_ids)
        try:
            self._engine.submit(*requests)
        except BaseException:
            self._router.forget(sample_ids)
            raise
        meter.submit(len(first.prompt_token_ids) + len(requests[0].output_token_ids))
        self._running[first.request_id] = sample_ids
        try:
            while not stream.ended:
                came = await events.take()
                meter.take(came)
                for response in stream.take(came):
                    await context.write(response)
                self._end_samples(stream.stopped_by_text)
        finally:
            del self._running[first.request_id]
            # The client is gone, its deadline is over, or stop strings ended the texts.
            self._end_samples(sample_ids)
            outcome = _how_it_ended(stream)
            meter.end(outcome, stream.error)
            _log.info(
                "request ended",
                request_id=first.request_id,
                cache_id=meter.cache_id,
                reason=outcome,
                num_prompt_tokens=len(first.prompt_token_ids),
                num_output_tokens=stream.num_output_tokens,
                **({} if stream.error is None else {"error": str(stream.error)}),
                **({} if len(sample_ids) == 1 else {"num_samples": len(sample_ids)}),
            )
        if stream.error is not None:
            await _abort_call(context, stream.error)

    def _end_samples(self, sample_ids: Iterable[str]) -> None:
        """Has the engine end what it still runs of these; nobody hears of them any more."""
        for sample_id in sample_ids:
            if self._router.stop_listening(sample_id):
                self._engine.abort(sample_id)


def _how_it_ended(stream: RequestStream) -> str:
    if stream.finish_reason is not None:
        return stream.finish_reason.value
    return "disconnected" if stream.error is None else "failed"


async def _abort_call(context: _Context | _TokenizeContext, error: DecoderError) -> NoReturn:
    await context.abort_with_status(rpc_status.to_status(to_status(error)))
    raise AssertionError("unreachable: abort_with_status raises")


def _tenant(context: _Context) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == TENANT_METADATA_KEY:
            return value if isinstance(value, str) else value.decode("utf-8", "replace")
    return ""
