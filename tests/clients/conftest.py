"""Fake decoders, served for the length of a test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import pytest_asyncio

from protos import decoder_pb2_grpc as pb_grpc
from tests.clients.fake_decoder import serve

# Of requests that are to end by them once something has come: that is within the first of these but on a starved machine.
DEADLINES_S = (0.5, 2.0, 8.0, 32.0)

Serve = Callable[[pb_grpc.DecoderServicer], Awaitable[str]]


@pytest_asyncio.fixture
async def serve_decoder() -> AsyncIterator[Serve]:
    """A function that serves a fake decoder and returns its address."""
    servers: list[grpc.aio.Server] = []

    async def start(servicer: pb_grpc.DecoderServicer) -> str:
        server, target = await serve(servicer)
        servers.append(server)
        return target

    yield start
    for server in servers:
        await server.stop(None)
