"""What both services' gRPC servers are set to, as their clients feel it."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from clients.channel import CHANNEL_OPTIONS
from protos import decoder_pb2 as pb
from protos import decoder_pb2_grpc as pb_grpc
from services.serving import SERVER_OPTIONS
from tests.clients.fake_decoder import Answer, FakeDecoder

PINGS = 5
HASTE = 10  # so many times faster than in service; gRPC pings once a second at most


def _hastened(options: tuple[tuple[str, int], ...]) -> list[tuple[str, int]]:
    return [(name, value // HASTE if name.endswith("_ms") else value) for name, value in options]


async def test_a_stream_that_waits_for_long_is_not_broken_by_its_clients_pings() -> None:
    server = grpc.aio.server(options=_hastened(SERVER_OPTIONS))
    decoder = FakeDecoder(Answer(["a"]))
    decoder.hangs_after = 1
    pb_grpc.add_DecoderServicer_to_server(decoder, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    options = _hastened(CHANNEL_OPTIONS)
    ping_s = dict(options)["grpc.keepalive_time_ms"] / 1000
    # A ping in this haste may be late; unanswered ones are not what is tested.
    options = [(name, 10_000 if name == "grpc.keepalive_timeout_ms" else value) for name, value in options]
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            stub: Any = pb_grpc.DecoderStub(channel)
            call = stub.Generate(pb.GenerateRequest(text="wait"))
            assert (await call.read()).WhichOneof("event") == "started"
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(PINGS * ping_s):
                    await call.read()  # it raises UNAVAILABLE when the server says "too many pings"
            call.cancel()
    finally:
        await server.stop(0)
