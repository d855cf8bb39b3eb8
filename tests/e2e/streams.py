"""Requests over a real channel, and what came back."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from protos import decoder_pb2 as pb
from protos import decoder_pb2_grpc
from protos.rich_status import error_info

TIMEOUT_S = 60.0
# For a request that its deadline is to end after its first tokens: they come within the first of these but on a starved machine.
DEADLINES_S = (0.5, 2.0, 5.0)


@dataclass
class Received:
    """All responses of one stream, and the error that ended it, if one did."""

    responses: list[pb.GenerateResponse] = field(default_factory=list)
    error: grpc.aio.AioRpcError | None = None

    @property
    def started(self) -> pb.Started:
        """The first response."""
        return self.responses[0].started

    @property
    def finished(self) -> pb.Finished:
        """The last response; the stream must have ended well."""
        assert self.error is None, self.error
        assert self.responses[-1].WhichOneof("event") == "finished"
        return self.responses[-1].finished

    @property
    def token_ids(self) -> list[int]:
        """Every generated token."""
        return [token_id for response in self.responses for token_id in response.delta.token_ids]

    @property
    def text(self) -> str:
        """The delivered text."""
        return "".join(response.delta.text for response in self.responses)

    @property
    def code(self) -> grpc.StatusCode:
        """The gRPC code that ended it."""
        return grpc.StatusCode.OK if self.error is None else self.error.code()

    @property
    def status(self) -> status_pb2.Status:
        """The rich status; the stream must have failed with one."""
        assert self.error is not None
        status = rpc_status.from_call(self.error)
        assert status is not None, self.error
        return status

    @property
    def reason(self) -> str:
        """The machine-readable reason of the failure."""
        return error_info(self.status).reason

    @property
    def field(self) -> str:
        """The request's field that the failure names."""
        bad = error_details_pb2.BadRequest()
        found = [detail for detail in self.status.details if detail.Unpack(bad)]
        return str(bad.field_violations[0].field) if found else ""


@contextlib.asynccontextmanager
async def stub_of(address: str) -> AsyncIterator[Any]:
    """The Decoder service at an address."""
    async with grpc.aio.insecure_channel(address) as channel:
        yield decoder_pb2_grpc.DecoderStub(channel)


def long_request(request_id: str = "", max_tokens: int = 400) -> pb.GenerateRequest:
    """Runs for max_tokens, whatever the model says."""
    return pb.GenerateRequest(
        request_id=request_id,
        token_ids=pb.TokenIds(ids=[5, 6, 7]),
        stop=pb.StopConditions(max_tokens=max_tokens, ignore_eos=True),
        sampling=pb.SamplingParams(temperature=1.0, seed=1),
    )


def chat(text: str, **fields: Any) -> pb.GenerateRequest:
    """A greedy request with one message of a user."""
    return pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content=text)]), **fields)


async def receive(stub: Any, request: pb.GenerateRequest, timeout_s: float = TIMEOUT_S) -> Received:
    """The whole stream of one request, an error included."""
    return await receive_rest(stub.Generate(request, timeout=timeout_s), [])


async def receive_rest(call: Any, responses: Sequence[pb.GenerateResponse]) -> Received:
    """The rest of a stream of which some responses were read."""
    received = Received(list(responses))
    try:
        while (response := await call.read()) is not grpc.aio.EOF:
            received.responses.append(response)
    except grpc.aio.AioRpcError as error:
        received.error = error
    return received


async def open_stream(
    stub: Any, request: pb.GenerateRequest, num_responses: int = 3
) -> tuple[Any, list[pb.GenerateResponse]]:
    """A stream of which the first responses, `started` among them, have come."""
    call = stub.Generate(request, timeout=TIMEOUT_S)
    responses: list[pb.GenerateResponse] = []
    while len(responses) < num_responses:
        response = await call.read()
        assert response is not grpc.aio.EOF
        responses.append(response)
    return call, responses
