"""Trouble on a schedule, for processes that the load test started itself."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from clients.loadtest.lengths import SpecError
from clients.loadtest.records import Mark
from clients.processes import OnLine, ServiceProcess
from clients.stack import STOP_GRACE_S

ACTIONS = ("kill", "stop", "start", "restart", "freeze", "thaw")


@dataclass(frozen=True)
class Trouble:
    """One action on one process, `at_s` seconds after the start of the load."""

    at_s: float
    action: str
    name: str


def parse_troubles(text: str) -> list[Trouble]:
    """AT:ACTION:NAME with commas between them, by time; raises SpecError otherwise."""
    troubles = []
    for part in text.split(","):
        at, _, rest = part.strip().partition(":")
        action, _, name = rest.partition(":")
        try:
            at_s = float(at)
        except ValueError:
            at_s = -1.0
        if at_s < 0 or action not in ACTIONS or not name:
            raise SpecError(
                f"{part.strip()!r} is no trouble; write AT:ACTION:NAME, as in 10:kill:decoder-1,15:start:decoder-1; "
                f"actions: {', '.join(ACTIONS)}; names: kv-manager, decoder (or decoder-1, decoder-2 of several)"
            )
        troubles.append(Trouble(at_s, action, name))
    return sorted(troubles, key=lambda trouble: trouble.at_s)


def check_names(troubles: Sequence[Trouble], processes: Sequence[ServiceProcess]) -> None:
    """Raises SpecError for a name that no process has."""
    names = [process.name for process in processes]
    for trouble in troubles:
        if trouble.name not in names:
            raise SpecError(f"--chaos: there is no {trouble.name}; the processes are {', '.join(names)}")


async def make_trouble(
    troubles: Sequence[Trouble],
    processes: Sequence[ServiceProcess],
    now_s: Callable[[], float],
    marks: list[Mark],
    on_line: OnLine,
) -> None:
    """Carries the schedule out, each action in its own task, and marks what happened when."""
    by_name = {process.name: process for process in processes}
    async with asyncio.TaskGroup() as group:
        for trouble in troubles:
            await asyncio.sleep(max(0.0, trouble.at_s - now_s()))
            group.create_task(_act(trouble, by_name[trouble.name], now_s, marks, on_line))


async def _act(
    trouble: Trouble, process: ServiceProcess, now_s: Callable[[], float], marks: list[Mark], on_line: OnLine
) -> None:
    marks.append(Mark(now_s(), f"{trouble.action} {trouble.name}"))
    if trouble.action == "freeze":
        process.send_signal(signal.SIGSTOP)
    elif trouble.action == "thaw":
        process.send_signal(signal.SIGCONT)
    elif trouble.action == "stop":
        await process.stop(STOP_GRACE_S)
    if trouble.action in ("kill", "restart") and process.running:
        process.send_signal(signal.SIGKILL)
        await process.wait()
    if trouble.action in ("start", "restart") and not process.running:
        await process.start(on_line)
        await process.wait_healthy()
        marks.append(Mark(now_s(), f"{trouble.name} is healthy"))
