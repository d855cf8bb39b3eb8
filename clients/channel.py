"""One gRPC channel to one peer, with the options that every client here uses."""

from __future__ import annotations

import re

import grpc

from clients.errors import BadTargetError

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    # A peer that is stopped or cut off is noticed within 15 s; the services permit pings of this rate.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # The client retries by itself, with the tokens it has; gRPC's own back-off (up to two minutes) would only hold it up.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 250),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # despite its name: how long one connection attempt may take
    ("grpc.enable_retries", 0),
    # A peer is dialled as it is named: no proxy from the environment, no connection shared with another channel.
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
)

_HOST_PORT = re.compile(r"^(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(?P<port>\d{1,5})$")


def check_target(target: str) -> str:
    """The address unchanged, if it is HOST:PORT or unix:PATH that can be dialled; raises BadTargetError otherwise."""
    if target.startswith("unix:"):
        if not target.removeprefix("unix:").strip("/") or "\0" in target:
            raise BadTargetError(f"{target!r} names no socket path; write unix:/run/leasehold.sock")
        return target
    match = _HOST_PORT.match(target)
    if match is None or not 0 < int(match["port"]) <= 65535:
        raise BadTargetError(
            f"{target!r} is not an address; write HOST:PORT with a port of 1 to 65535, as in 127.0.0.1:50051, or unix:PATH"
        )
    return target


async def connected_anew(channel: grpc.aio.Channel) -> None:
    """Returns when a channel that is not connected now, or that loses its connection, is connected; it dials all the while."""
    was_away = False
    while True:
        state = channel.get_state(try_to_connect=True)
        if state is not grpc.ChannelConnectivity.READY:
            was_away = True
        elif was_away:
            return
        await channel.wait_for_state_change(state)


def open_channel(target: str) -> grpc.aio.Channel:
    """A channel to `target`, which connects on its first call; raises BadTargetError for an address of another form."""
    return grpc.aio.insecure_channel(check_target(target), options=CHANNEL_OPTIONS)
