"""Services as child processes: started with exec, watched, stopped in order, and never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from clients.channel import open_channel
from clients.errors import ClientError

MANAGER_SERVICE = "leasehold.v1.KVManager"
DECODER_SERVICE = "leasehold.v1.Decoder"

_CHILD = Path(__file__).with_name("child.py")
_HEALTH_INTERVAL_S = 0.1
_HEALTH_TIMEOUT_S = 2.0
_MAX_LINE_BYTES = 4 << 20

OnLine = Callable[[str, str], None]  # (process name, line)


class ProcessDiedError(ClientError):
    """A service ended although nobody had asked it to."""

    def __init__(self, name: str, returncode: int) -> None:
        how = f"was killed by {_signal_name(-returncode)}" if returncode < 0 else f"ended with exit code {returncode}"
        super().__init__(f"{name} {how}; its last log lines say why")
        self.name = name
        self.returncode = returncode


class PortTakenError(ClientError):
    """A port that a service was to listen on is in use or not of this host."""


class ServiceProcess:
    """One service in a session of its own, so that a terminal's Ctrl-C reaches it only through us."""

    def __init__(self, name: str, service: str, address: str, module: str, flags: Sequence[str]) -> None:
        self.name = name
        self.address = address
        self._service = service
        self._argv = (sys.executable, "-m", module, "--listen", address, *flags)
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        """The process id; the process must have been started."""
        return self._started().pid

    @property
    def running(self) -> bool:
        """Whether the process was started and has not ended."""
        return self._process is not None and self._process.returncode is None

    async def start(self, on_line: OnLine) -> None:
        """Starts the process, or starts it again after it ended; every line that it writes goes to on_line."""
        if self.running:
            raise RuntimeError(f"{self.name} is running")
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-S",
            str(_CHILD),
            str(os.getpid()),
            *self._argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            limit=_MAX_LINE_BYTES,
        )
        self._reader = asyncio.create_task(self._read_lines(self._process, on_line))

    async def wait(self) -> int:
        """The exit code, once the process has ended and its last line was read; negative for a signal."""
        returncode = await self._started().wait()
        if self._reader is not None:
            await asyncio.wait({self._reader})  # a bare await would pass the caller's cancellation on to the reader
        return returncode

    async def wait_healthy(self) -> None:
        """Returns when the service says SERVING; raises ProcessDiedError when the process ends before."""
        ended = asyncio.create_task(self.wait())
        try:
            async with open_channel(self.address) as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                while True:
                    healthy = asyncio.create_task(self._is_healthy(stub))
                    await asyncio.wait({ended, healthy}, return_when=asyncio.FIRST_COMPLETED)
                    if ended.done():
                        healthy.cancel()
                        raise ProcessDiedError(self.name, ended.result())
                    if healthy.result():
                        return
                    await asyncio.sleep(_HEALTH_INTERVAL_S)
        finally:
            ended.cancel()

    def send_signal(self, number: int) -> None:
        """Sends a signal to the service, if it still runs."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                self._started().send_signal(number)

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, and SIGKILL after grace_s seconds; returns when the process has ended."""
        if self._process is None:
            return
        self.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace_s):
                await self.wait()
        except TimeoutError:
            self.send_signal(signal.SIGKILL)
            await self.wait()

    def _started(self) -> asyncio.subprocess.Process:
        if self._process is None:
            raise RuntimeError(f"{self.name} was not started")
        return self._process

    async def _is_healthy(self, stub: health_pb2_grpc.HealthStub) -> bool:
        request = health_pb2.HealthCheckRequest(service=self._service)
        try:
            reply = await stub.Check(request, timeout=_HEALTH_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return False
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    async def _read_lines(self, process: asyncio.subprocess.Process, on_line: OnLine) -> None:
        assert process.stdout is not None
        while True:
            try:
                raw = await process.stdout.readline()
            except ValueError:  # a line longer than the limit; the reader has dropped it
                continue
            if not raw:
                return
            on_line(self.name, raw.decode(errors="replace").rstrip("\n"))


def find_port(host: str, port: int, flag: str) -> int:
    """The port itself if it can be bound now, a free one for 0; raises PortTakenError naming the flag otherwise."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), port))
        except OSError as error:
            raise PortTakenError(
                f"{flag}: cannot listen on {host}:{port} ({error.strerror}); stop what runs there, or give another port"
            ) from error
        free: int = probe.getsockname()[1]
        return free


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
