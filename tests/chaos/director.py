"""Does a plan's faults, each when its moment has come."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import grpc

from tests.chaos.host import TTL_S, Host, ManagerView
from tests.chaos.plan import MANAGER, Fault, Kind
from tests.e2e.followed import Pace

_POLL_S = 0.05
_LONGEST_HANG_S = 6 * TTL_S


@dataclass
class Director:
    """Each target's faults come one after the other; those of several targets overlap."""

    host: Host
    manager: ManagerView
    pace: Pace
    done: list[Fault] = field(default_factory=list)
    stopped: set[str] = field(default_factory=set)

    async def run(self, streams: asyncio.Future[Any]) -> None:
        """Does faults until `streams` is done; whatever is stopped or down then is brought back."""
        targets: dict[str, list[Fault]] = {}
        for fault in sorted(self.host.plan.faults, key=lambda fault: fault.at_tokens):
            targets.setdefault(fault.target, []).append(fault)
        async with asyncio.TaskGroup() as group:
            for faults in targets.values():
                group.create_task(self._run_one_after_the_other(faults, streams))

    async def _run_one_after_the_other(self, faults: list[Fault], streams: asyncio.Future[Any]) -> None:
        for fault in faults:
            if not await _before(self.pace.reach(fault.at_tokens), streams):
                return
            await self._do(fault)
            self.done.append(fault)

    async def _do(self, fault: Fault) -> None:
        name, host = fault.target, self.host
        if fault.kind in (Kind.FLUSH, Kind.SCRUB):
            with suppress(grpc.aio.AioRpcError):  # it may be down
                await (self.manager.flush() if fault.kind is Kind.FLUSH else self.manager.scrub())
            return
        if fault.kind in (Kind.PAUSE, Kind.HANG, Kind.HANG_KILL):
            self._stop(name)
            await (self._while_it_lasts(fault) if fault.kind is Kind.PAUSE else self._past_the_ttl(name))
        if fault.kind in (Kind.PAUSE, Kind.HANG):
            self._go_on(name)
            return
        self.stopped.discard(name)
        if fault.kind is Kind.TERMINATE:
            await host.terminate(name)
        else:
            await host.kill(name)
        await self._while_it_lasts(fault)
        await host.start(name)

    def _stop(self, name: str) -> None:
        self.host.send(name, signal.SIGSTOP)
        self.stopped.add(name)

    def _go_on(self, name: str) -> None:
        self.stopped.discard(name)
        self.host.send(name, signal.SIGCONT)

    async def _while_it_lasts(self, fault: Fault) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self.pace.reach(self.pace.num_tokens + fault.for_tokens), fault.for_s)

    async def _past_the_ttl(self, name: str) -> None:
        """Until the manager has noticed that a decoder is silent; decoders are given as long to notice a silent manager."""
        loop = asyncio.get_running_loop()
        end = loop.time() + (2 * TTL_S if name == MANAGER else _LONGEST_HANG_S)
        while loop.time() < end and (name == MANAGER or not await self.manager.is_revoked(name)):  # noqa: ASYNC110  # another process tells no Event
            await asyncio.sleep(_POLL_S)


async def _before(reached: Awaitable[None], streams: asyncio.Future[Any]) -> bool:
    """Waits for a moment; False when the streams end first."""
    waiting: asyncio.Future[Any] = asyncio.ensure_future(reached)
    await asyncio.wait({waiting, streams}, return_when=asyncio.FIRST_COMPLETED)
    if waiting.done():
        return True
    waiting.cancel()
    return False
