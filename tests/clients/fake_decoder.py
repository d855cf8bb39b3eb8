"""A Decoder service without a model: it streams one known answer and breaks off where a script says."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc

from clients.decoder import Waiting
from protos import decoder_pb2 as pb
from protos import decoder_pb2_grpc as pb_grpc
from protos.rich_status import make_status
from services.serving import SERVER_OPTIONS

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

PROMPT_IDS = (5, 6, 7)
AGE_TICKET = 41


@dataclass
class FakeTime:
    """A clock that only sleeping moves, and that remembers every wait."""

    now: float = 0.0
    waits: list[float] = field(default_factory=list)

    async def sleep(self, delay_s: float) -> None:
        self.waits.append(delay_s)
        self.now += delay_s
        await asyncio.sleep(0)

    def waiting(self) -> Waiting:
        return Waiting(clock=lambda: self.now, sleep=self.sleep, uniform=lambda low, high: high)


@dataclass(frozen=True)
class Answer:
    """What the fake generates: a text piece for each token, sent `group` tokens at a time, the text `lag` tokens late."""

    pieces: Sequence[str]
    group: int = 1
    lag: int = 0

    @property
    def token_ids(self) -> list[int]:
        return [100 + index for index in range(len(self.pieces))]

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def deltas(self, sample_index: int, num_had: int, delivered: str) -> Iterable[pb.Delta]:
        """The deltas after `num_had` tokens and the text `delivered`."""
        assert self.text.startswith(delivered)
        ids, position = self.token_ids, num_had
        while position < len(ids):
            end = min(position + self.group, len(ids))
            known = len("".join(self.pieces[: max(end - self.lag, 0)]))
            text = self.text[len(delivered) : max(known, len(delivered))]
            delivered += text
            yield pb.Delta(sample_index=sample_index, position=position, token_ids=ids[position:end], text=text)
            position = end
        if delivered != self.text:
            yield pb.Delta(sample_index=sample_index, position=position, text=self.text[len(delivered) :])


class FakeDecoder(pb_grpc.DecoderServicer):
    """Serves `answer`; connection i sends cuts[i] events and then fails with UNAVAILABLE, later ones are whole."""

    def __init__(self, answer: Answer, cuts: Sequence[int] = (), numerics_id: str = "fake-1") -> None:
        self.answer = answer
        self.cuts = list(cuts)
        self.numerics_id = numerics_id
        self.requests: list[pb.GenerateRequest] = []
        self.aborted: list[str] = []
        self.cancelled = asyncio.Event()
        self.hanging = asyncio.Event()
        self.refusal: tuple[grpc.StatusCode, str, str] | None = None  # code, reason, field
        self.num_refusals: int | None = None  # how often to refuse; None: always
        self.hangs_after: int | None = None  # events, then silence
        self.has_chat_template = True

    def _events(self, request: pb.GenerateRequest) -> Iterable[pb.GenerateResponse]:
        resume = request.resume if request.HasField("resume") else None
        num_samples = request.n or 1
        had = [list(s.output_token_ids) for s in resume.samples] if resume else [[] for _ in range(num_samples)]
        delivered = [s.delivered_text for s in resume.samples] if resume else [""] * num_samples
        started = pb.Started(
            request_id=request.request_id,
            prompt_token_ids=resume.prompt_token_ids if resume else PROMPT_IDS,
            seed=resume.seed if resume else request.sampling.seed,
            max_tokens=request.stop.max_tokens or 64,
            numerics_id=self.numerics_id,
            age_ticket=AGE_TICKET,
            num_cached_tokens=2,
            exact_resume=bool(resume and resume.numerics_id == self.numerics_id),
        )
        yield pb.GenerateResponse(started=started)
        for index in range(num_samples):
            assert had[index] == self.answer.token_ids[: len(had[index])]
            for delta in self.answer.deltas(index, len(had[index]), delivered[index]):
                if request.HasField("logprobs"):
                    for token_id in delta.token_ids:
                        sampled = pb.TokenLogprob(token_id=token_id, logprob=-0.5)
                        delta.logprobs.append(pb.Logprobs(sampled=sampled, top=[sampled]))
                yield pb.GenerateResponse(delta=delta)
            yield pb.GenerateResponse(finished=self._finished(index))

    def _finished(self, index: int) -> pb.Finished:
        return pb.Finished(
            sample_index=index,
            reason=pb.FINISH_REASON_STOP,
            num_prompt_tokens=len(PROMPT_IDS),
            num_output_tokens=len(self.answer.pieces),
            num_cached_tokens=2,
            stop_token_id=0,
        )

    # A coroutine that writes: of a generator that stands at its yield, a cancellation is raised elsewhere.
    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:  # type: ignore[override]
        self.requests.append(request)
        await self._maybe_refuse(context)
        cut = self.cuts.pop(0) if self.cuts else None
        try:
            for number, event in enumerate(self._events(request)):
                if number == cut:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "cut by the script")
                if number == self.hangs_after:
                    self.hanging.set()
                    await asyncio.get_running_loop().create_future()
                await context.write(event)
            if cut is not None:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "cut by the script")
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def _maybe_refuse(self, context: Context) -> None:
        if self.refusal is None or self.num_refusals == 0:
            return
        if self.num_refusals is not None:
            self.num_refusals -= 1
        code, reason, field_name = self.refusal
        status = make_status(
            code,
            f"{field_name}: refused by the script",
            reason=reason,
            field=field_name,
            metadata={"limit": "7"},
            retry_delay_s=1.5,
        )
        metadata = (("grpc-status-details-bin", status.SerializeToString()),)
        await context.abort(code, status.message, trailing_metadata=metadata)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        return pb.TokenizeResponse(ids=PROMPT_IDS)

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.GetModelInfoResponse:
        return pb.GetModelInfoResponse(
            name="fake", has_chat_template=self.has_chat_template, numerics_id=self.numerics_id
        )

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        self.aborted.append(request.request_id)
        return pb.AbortResponse(found=any(seen.request_id == request.request_id for seen in self.requests))


async def serve(servicer: pb_grpc.DecoderServicer) -> tuple[grpc.aio.Server, str]:
    """Starts a server for `servicer` on a free loopback port; the caller stops it."""
    server = grpc.aio.server(options=SERVER_OPTIONS)  # or the pings of a client end a stream that waits for long
    pb_grpc.add_DecoderServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"
