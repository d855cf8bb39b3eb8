"""Fixtures of the manager's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kv_manager.helpers import FakeClock, Manager, ManagerProcess


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def make_manager(tmp_path: Path, clock: FakeClock) -> Iterator[Callable[..., Manager]]:
    """Makes managers on one pool directory; each is checked at the end of the test."""
    managers: list[Manager] = []

    def make(**flags: object) -> Manager:
        manager = Manager(tmp_path / "pool", clock, **flags)
        managers.append(manager)
        return manager

    yield make
    for manager in managers:
        manager.close()


@pytest.fixture
def manager_process(tmp_path: Path) -> Iterator[Callable[..., ManagerProcess]]:
    """Starts managers as processes; whatever still runs at the end of the test is killed."""
    processes: list[ManagerProcess] = []

    def start(*flags: str, pool_dir: Path | None = None) -> ManagerProcess:
        process = ManagerProcess(pool_dir or tmp_path / "pool", *flags)
        processes.append(process)
        return process.start()

    yield start
    for process in processes:
        process.close()
