"""Service processes: healthy, dead at once, deaf to SIGTERM, orphaned; none is ever left."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from clients.checkpoints import NoModelError, find_model
from clients.cli.log_lines import readable
from clients.processes import DECODER_SERVICE, PortTakenError, ProcessDiedError, ServiceProcess, find_port

Make = Callable[[str], ServiceProcess]

_STARTER = """
import asyncio, sys
from clients.processes import ServiceProcess

async def main():
    process = ServiceProcess("fake", "leasehold.v1.Decoder", sys.argv[1], "tests.clients.fake_service", ["serves"])
    await process.start(lambda name, line: None)
    await process.wait_healthy()
    print(process.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest_asyncio.fixture
async def make() -> AsyncIterator[Make]:
    made: list[ServiceProcess] = []

    def make_one(mode: str) -> ServiceProcess:
        address = f"127.0.0.1:{find_port('127.0.0.1', 0, '--port')}"
        made.append(ServiceProcess("fake", DECODER_SERVICE, address, "tests.clients.fake_service", [mode]))
        return made[-1]

    yield make_one
    for process in made:
        await process.stop(0)


async def test_a_service_becomes_healthy_and_stops_on_sigterm(make: Make) -> None:
    lines: list[tuple[str, str]] = []
    process = make("serves")
    await process.start(lambda name, line: lines.append((name, line)))
    await process.wait_healthy()
    assert process.running
    await process.stop(60)
    assert await process.wait() == 0
    assert lines == [("fake", "a line of log")]


async def test_a_service_can_be_started_again(make: Make) -> None:
    process = make("serves")
    await process.start(lambda name, line: None)
    await process.wait_healthy()
    first = process.pid
    process.send_signal(signal.SIGKILL)
    assert await process.wait() == -signal.SIGKILL
    await process.start(lambda name, line: None)
    await process.wait_healthy()
    assert process.pid != first


async def test_a_service_that_dies_is_named_with_its_exit_code(make: Make) -> None:
    process = make("dies")
    await process.start(lambda name, line: None)
    with pytest.raises(ProcessDiedError, match="fake ended with exit code 3"):
        await process.wait_healthy()


async def test_a_deaf_service_is_killed(make: Make) -> None:
    process = make("deaf")
    await process.start(lambda name, line: None)
    await process.wait_healthy()
    await process.stop(0.2)
    assert await process.wait() == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells a child of its parent's death on Linux only")
async def test_a_service_does_not_outlive_a_killed_starter() -> None:
    address = f"127.0.0.1:{find_port('127.0.0.1', 0, '--port')}"
    starter = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _STARTER, address, stdout=asyncio.subprocess.PIPE
    )
    assert starter.stdout is not None
    pid = int(await starter.stdout.readline())
    descriptor = os.pidfd_open(pid)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(descriptor, ended.set)  # readable once the process has ended
    try:
        starter.kill()
        await starter.wait()
        await asyncio.wait_for(ended.wait(), 60)
    finally:
        asyncio.get_running_loop().remove_reader(descriptor)
        os.close(descriptor)


def test_a_taken_port_is_refused_with_its_flag() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(PortTakenError, match="--decoder-port"):
            find_port("127.0.0.1", taken.getsockname()[1], "--decoder-port")


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NoModelError, match=r"config\.json"):
        find_model(str(tmp_path))
    with pytest.raises(NoModelError, match="is no folder"):
        find_model(str(tmp_path / "absent"))
    (tmp_path / "config.json").write_text("{}")
    assert find_model(str(tmp_path)) == tmp_path.resolve()


def test_log_lines_become_readable() -> None:
    line = '{"event": "worker registered", "level": "info", "timestamp": "2025-01-02T03:04:05.6Z", "epoch": 7, "who": "a b"}'
    assert readable("kv-manager", line) == 'kv-manager | 03:04:05 info    worker registered epoch=7 who="a b"'
    assert readable("decoder", "plain") == "decoder    | plain"
    failed = readable("decoder", '{"event": "failed", "level": "error", "exception": "one\\ntwo"}')
    assert failed.splitlines()[1:] == ["decoder    |   one", "decoder    |   two"]
