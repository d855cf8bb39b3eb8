"""What both services do around their servicers: addresses, server options, health, reflection, shutdown signals."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Coroutine, Sequence
from typing import Any

import grpc
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    # Without it a second server shares the port silently.
    ("grpc.so_reuseport", 0),
    # Clients send keepalive pings every 10 s, also while a stream waits; the default of 5 min answers the third with GOAWAY.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
)

_HOST_PORT = re.compile(r"^(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(?P<port>\d{1,5})$")


class AddressError(ValueError):
    """An address that cannot be served, or that is taken."""


def check_address(flag: str, address: str) -> str:
    """The address unchanged, if it is HOST:PORT or unix:PATH; raises AddressError naming the flag otherwise."""
    if address.startswith("unix:"):
        path = address.removeprefix("unix:").removeprefix("//")
        if not path or "\0" in path:
            raise AddressError(f"{flag}: {address!r} names no socket path; write unix:/run/leasehold.sock")
        return address
    match = _HOST_PORT.match(address)
    if match is None or int(match["port"]) > 65535:
        raise AddressError(
            f"{flag}: {address!r} is not an address; write HOST:PORT with a port of 0 to 65535, or unix:PATH"
        )
    return address


def bind(server: grpc.aio.Server, flag: str, address: str) -> str:
    """Binds the port and returns the address as bound (port 0 resolved); raises AddressError when it is taken.

    gRPC accepts connections from here on, so a service calls it last, when it can serve.
    """
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise AddressError(
            f"{flag}: cannot listen on {address}: it is in use or not an address of this host"
        ) from error
    if address.startswith("unix:"):
        return address
    return f"{address.rsplit(':', 1)[0]}:{port}"


async def add_health_and_reflection(server: grpc.aio.Server, service_names: Sequence[str]) -> health_aio.HealthServicer:
    """Adds the standard services; every name, and the empty one for the whole server, is SERVING."""
    health = health_aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    for name in ("", *service_names):
        await health.set(name, health_pb2.HealthCheckResponse.SERVING)
    names = (*service_names, "grpc.health.v1.Health", reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    return health


def run(main: Coroutine[Any, Any, None]) -> None:
    """Runs a service to its end, on uvloop: it takes a seventh off the CPU time of every gRPC call."""
    uvloop.run(main)


def stop_event_on_signals() -> asyncio.Event:
    """An event of the running loop that SIGTERM and SIGINT set; a second signal ends the process at once."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_signal(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return stop
