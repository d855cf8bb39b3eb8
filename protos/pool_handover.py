"""How a pool in GPU memory changes hands: the contract between the manager and its workers on one host.

The data file of such a pool is its header page alone. The manager listens on the Unix socket `SOCKET_NAME` in the pool directory.
A worker that has registered connects, and sends one message with a pidfd of itself and, where it has the memory already, the
memory's descriptor. The answer is one message: `OK`, with the memory's descriptor unless the worker brought it; `WAIT`, when the
memory is still with another worker that has not come back, or this worker has not registered yet; or `REFUSED` with the reason.
The connection then stays open: its end tells the worker that the manager is gone.
"""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass

SOCKET_NAME = "gpu.sock"
OK, WAIT, REFUSED = "ok", "wait", "refused"
_MAX_BYTES = 4096


@dataclass(frozen=True)
class Ask:
    """What a worker says; pool_id in hex digits."""

    worker_id: str
    pool_id: str
    has_memory: bool = False  # the second descriptor is the memory's


@dataclass(frozen=True)
class Answer:
    """What the manager says."""

    status: str
    reason: str = ""
    device_uuid: str = ""  # of the GPU that has the memory


def send_ask(connection: socket.socket, ask: Ask, fds: list[int]) -> None:
    """Sends a worker's message."""
    socket.send_fds(connection, [json.dumps({"worker_id": ask.worker_id, "pool_id": ask.pool_id}).encode()], fds)


def receive_ask(connection: socket.socket) -> tuple[Ask, list[int]]:
    """Raises ValueError for anything else than an ask, and closes what came with it."""
    data, fds, _, _ = socket.recv_fds(connection, _MAX_BYTES, 2)
    try:
        values = json.loads(data)
        return Ask(str(values["worker_id"]), str(values["pool_id"]), len(fds) > 1), fds
    except (ValueError, KeyError, TypeError) as error:
        for fd in fds:
            socket.close(fd)
        raise ValueError(f"not a hand-over message: {error}") from error


def send_answer(connection: socket.socket, answer: Answer, fds: list[int]) -> None:
    """Sends the manager's message."""
    socket.send_fds(connection, [json.dumps(answer.__dict__).encode()], fds)


def receive_answer(connection: socket.socket) -> tuple[Answer, list[int]]:
    """Raises OSError when the manager hung up."""
    data, fds, _, _ = socket.recv_fds(connection, _MAX_BYTES, 1)
    if not data:
        raise ConnectionResetError("the manager closed the connection")
    values = json.loads(data)
    return Answer(str(values["status"]), str(values["reason"]), str(values["device_uuid"])), fds
