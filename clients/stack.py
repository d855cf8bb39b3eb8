"""A manager and its decoders on this host: started in order, watched together, stopped in reverse."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clients.processes import (
    DECODER_SERVICE,
    MANAGER_SERVICE,
    OnLine,
    ProcessDiedError,
    ServiceProcess,
    find_port,
)

DEFAULT_MANAGER_PORT = 50050
DEFAULT_DECODER_PORT = 50051

# A decoder lets running requests go on for 10 s after SIGTERM.
STOP_GRACE_S = 15.0


@dataclass(frozen=True)
class StackConfig:
    """What to start. Ports of 0 are chosen; decoder i listens on decoder_port + i."""

    model: Path
    pool_dir: Path
    num_decoders: int = 1
    host: str = "127.0.0.1"
    manager_port: int = DEFAULT_MANAGER_PORT
    decoder_port: int = DEFAULT_DECODER_PORT
    manager_flags: Sequence[str] = ()
    decoder_flags: Sequence[str] = ()


class Stack:
    """The processes of one StackConfig; `stop` may be called at any time, also when `start` failed."""

    def __init__(self, config: StackConfig, on_line: OnLine) -> None:
        self._on_line = on_line
        manager = f"{config.host}:{find_port(config.host, config.manager_port, '--manager-port')}"
        self.manager = ServiceProcess(
            "kv-manager",
            MANAGER_SERVICE,
            manager,
            "services.kv_manager",
            ("--pool-dir", str(config.pool_dir), *config.manager_flags),
        )
        self.decoders: list[ServiceProcess] = []
        for index in range(config.num_decoders):
            wanted = config.decoder_port + index if config.decoder_port else 0
            port = find_port(config.host, wanted, "--decoder-port")
            flags = ("--model", str(config.model), "--kv-manager", manager, *config.decoder_flags)
            name = "decoder" if config.num_decoders == 1 else f"decoder-{index + 1}"
            address = f"{config.host}:{port}"
            self.decoders.append(ServiceProcess(name, DECODER_SERVICE, address, "services.decoder", flags))

    @property
    def processes(self) -> list[ServiceProcess]:
        """The manager, then the decoders."""
        return [self.manager, *self.decoders]

    @property
    def decoder_addresses(self) -> list[str]:
        """Where the decoders listen, as a client takes them."""
        return [decoder.address for decoder in self.decoders]

    async def start(self) -> None:
        """Starts all and returns when all are healthy; raises ProcessDiedError when one ends before."""
        await self.manager.start(self._on_line)
        await self.manager.wait_healthy()
        for decoder in self.decoders:
            await decoder.start(self._on_line)
        waits = [asyncio.create_task(decoder.wait_healthy()) for decoder in self.decoders]
        try:
            await asyncio.gather(*waits)
        finally:
            for wait in waits:
                wait.cancel()

    async def watch(self) -> None:
        """Runs until a process ends by itself, and raises ProcessDiedError for it."""
        waits = {asyncio.create_task(process.wait()): process for process in self.processes}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        ended = done.pop()
        raise ProcessDiedError(waits[ended].name, ended.result())

    async def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """Stops the decoders, which give their leases back, then the manager; SIGKILL follows after grace_s each."""
        await asyncio.gather(*(decoder.stop(grace_s) for decoder in self.decoders))
        await self.manager.stop(grace_s)

    def kill(self) -> None:
        """SIGKILL to all, without waiting."""
        for process in self.processes:
            process.send_signal(9)
