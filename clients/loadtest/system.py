"""What is put under load: services that run already, or ones that the load test starts and stops itself."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from clients.checkpoints import find_model
from clients.cli.log_lines import readable
from clients.cli.up import check_decoder_extra, pool_folder, stack_config
from clients.kv_manager import KvManagerClient
from clients.processes import ServiceProcess
from clients.stack import Stack

_RELEASE_WAIT_S = 10.0


@dataclass
class System:
    """Addresses, and the processes where they are ours."""

    decoders: Sequence[str]
    manager: str | None
    processes: Sequence[ServiceProcess] = field(default_factory=tuple)

    async def leases_left(self) -> int:
        """Leases that stay although our own system has nothing to do any more; 0 for one that is not ours."""
        if self.manager is None or not self.processes or not all(process.running for process in self.processes):
            return 0
        left = 0
        async with KvManagerClient(self.manager) as client:
            for _ in range(round(_RELEASE_WAIT_S / 0.1)):
                left = (await client.stats()).num_leases
                if not left:
                    break
                await asyncio.sleep(0.1)
        return left


def print_service_line(name: str, line: str) -> None:
    """Passes a line of a service's log on."""
    print(readable(name, line), file=sys.stderr, flush=True)


@asynccontextmanager
async def open_system(args: argparse.Namespace, default_decoder: str) -> AsyncIterator[System]:
    """The system that the flags name; with --up it is started, and stopped at the end."""
    if not args.up:
        yield System(args.decoder or [default_decoder], args.kv_manager)
        return
    check_decoder_extra()
    model = find_model(args.model)
    if args.log_level == "info":
        args.log_level = "warning"  # a line a request would hide the display
    with pool_folder(args.pool_dir) as pool_dir:
        stack = Stack(stack_config(args, model, pool_dir), print_service_line)
        try:
            await stack.start()
            yield System(stack.decoder_addresses, stack.manager.address, stack.processes)
        finally:
            await stack.stop()
