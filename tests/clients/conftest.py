"""Fake decoders, served for the length of a test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import pytest_asyncio

from protos import decoder_pb2_grpc as pb_grpc
from tests.clients.fake_decoder import serve

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
