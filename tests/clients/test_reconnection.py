"""How soon a client notices that a decoder is back: its own waits grow, and it does not sleep through a restart."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import grpc
import pytest

from clients.channel import connected_anew, open_channel
from clients.decoder import DecoderClient, Waiting
from clients.events import Event, StreamBroken
from protos import decoder_pb2 as pb
from protos import decoder_pb2_grpc
from tests.clients.conftest import Serve
from tests.clients.fake_decoder import Answer, FakeDecoder
from tests.clients.test_decoder_client import collect, free_port, ids_of

ANSWER = Answer(["a"] * 4)
REQUEST = pb.GenerateRequest(text="say hello", stop=pb.StopConditions(max_tokens=9))
TIMEOUT_S = 30.0


@dataclass
class EndlessWaits:
    """Sleeping for as long as a broken stream waits never ends; only the spread of those that return does."""

    waits: list[float] = field(default_factory=list)

    async def sleep(self, delay_s: float) -> None:
        self.waits.append(delay_s)
        if delay_s == 1.0:
            await asyncio.get_running_loop().create_future()

    def waiting(self) -> Waiting:
        return Waiting(sleep=self.sleep, uniform=lambda low, high: 0.5 if high <= 0.1 else 1.0)


async def serve_at(target: str, servicer: FakeDecoder) -> grpc.aio.Server:
    """A server at an address that a client knows already."""
    server = grpc.aio.server()
    decoder_pb2_grpc.add_DecoderServicer_to_server(servicer, server)
    server.add_insecure_port(target)
    await server.start()
    return server


async def test_a_stream_goes_on_as_soon_as_its_decoder_is_back() -> None:
    target, waits = f"127.0.0.1:{free_port()}", EndlessWaits()
    async with DecoderClient(target, waiting=waits.waiting()) as client:
        events: list[Event] = []
        stream = client.generate(REQUEST)
        async with asyncio.timeout(TIMEOUT_S):
            while not isinstance(event := await anext(stream), StreamBroken) or event.retry_in_s != 1.0:
                pass
            collecting = asyncio.create_task(collect(stream))
            await asyncio.sleep(0)
            server = await serve_at(target, FakeDecoder(ANSWER))
            events = await collecting
    await server.stop(None)
    assert ids_of(events) == ANSWER.token_ids
    assert waits.waits[-2:] == [1.0, 0.5], "it waited, and was spread when the decoder came back"


async def test_a_decoder_that_is_there_and_refuses_is_given_its_time(serve_decoder: Serve) -> None:
    """Its connection stands, so that nothing is new."""
    channel = open_channel(await serve_decoder(FakeDecoder(ANSWER)))
    await channel.channel_ready()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(connected_anew(channel), 0.3)
    await channel.close()


async def test_a_decoder_that_stops_and_comes_back_is_noticed() -> None:
    target = f"127.0.0.1:{free_port()}"
    server = await serve_at(target, FakeDecoder(ANSWER))
    channel = open_channel(target)
    await channel.channel_ready()
    noticing = asyncio.create_task(connected_anew(channel))
    await asyncio.sleep(0)
    await server.stop(None)
    server = await serve_at(target, FakeDecoder(ANSWER))
    await asyncio.wait_for(noticing, TIMEOUT_S)
    await channel.close()
    await server.stop(None)
