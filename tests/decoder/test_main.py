"""The decoder's process: exit codes, one clear line for what keeps it from starting, and health that follows its leases."""

from __future__ import annotations

import asyncio
import inspect
import socket
from pathlib import Path
from unittest.mock import AsyncMock, Mock

import pytest

from services.decoder import __main__ as decoder_main
from services.decoder import service
from services.decoder.errors import CheckpointError, ConfigError, DecoderError
from services.decoder.lease_watch import LeaseWatch
from services.decoder.leases import LeaseMessage, LeasePort, LeaseRevoked, ManagerAway, ManagerBack, PoolReady
from services.serving import AddressError
from tests.decoder.engine_fakes import GEOMETRY, FakeKv


@pytest.fixture(autouse=True)
def _logs_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    # They would go on writing to this test's captured stderr.
    monkeypatch.setattr(decoder_main, "configure_logs", lambda level_name: None)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def _line(capsys: pytest.CaptureFixture[str]) -> str:
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    return line


def test_a_wrong_flag_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert decoder_main.main(["--model", str(tmp_path / "absent")]) == 2
    assert _line(capsys).startswith("python -m services.decoder: error: --model: ")
    assert decoder_main.main(["--model", str(tmp_path), "--max-seqs", "no"]) == 2
    assert "--max-seqs: 'no' is not a number" in _line(capsys)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("--x: wrong"), 2),
        (CheckpointError("model.safetensors: cut"), 1),
        (AddressError("--listen: taken"), 1),
    ],
)
def test_what_keeps_it_from_starting_is_one_line_and_stops_what_had_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_dir: Path, error: Exception, code: int
) -> None:
    stopped: list[bool] = []

    async def start(self: service.DecoderService) -> None:
        raise error

    async def stop(self: service.DecoderService) -> None:
        stopped.append(True)

    monkeypatch.setattr(service.DecoderService, "start", start)
    monkeypatch.setattr(service.DecoderService, "stop", stop)
    assert decoder_main.main(["--model", str(model_dir)]) == code
    assert _line(capsys) == f"python -m services.decoder: error: {error}"
    assert stopped == [True]


async def test_stopping_what_never_started_is_harmless(model_dir: Path) -> None:
    never = service.DecoderService(decoder_main.parse_args(["--model", str(model_dir), "--no-paged"]))
    assert not never.is_loading
    await never.stop()


def test_an_address_in_use_or_of_another_host_is_refused_before_loading(tmp_path: Path) -> None:
    service.refuse_taken("127.0.0.1:0")
    service.refuse_taken(f"unix:{tmp_path}/free.sock")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(AddressError, match=rf"^--listen: cannot listen on {address}: .*choose another port"):
            service.refuse_taken(address)
    with pytest.raises(AddressError, match=r"^--listen: cannot listen on 192\.0\.2\.1:50051: .*address of this host"):
        service.refuse_taken("192.0.2.1:50051")
    with pytest.raises(AddressError, match=r"^--listen: cannot listen on no-such-host\.invalid:1: "):
        service.refuse_taken("no-such-host.invalid:1")
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(f"{tmp_path}/taken.sock")
        taken.listen()
        with pytest.raises(AddressError, match="another process does; choose another"):
            service.refuse_taken(f"unix:{tmp_path}/taken.sock")
    service.refuse_taken(f"unix:{tmp_path}/taken.sock")  # left behind by a process that is gone


async def test_the_watch_passes_every_call_on() -> None:
    """Whatever a LeasePort can be asked, now or later: a method that the watch lacked would break the engine."""
    inner = AsyncMock(spec=LeasePort)
    watch = LeaseWatch(inner)
    for name, method in inspect.getmembers(LeasePort, inspect.isfunction):
        if name.startswith("_") or name == "bind":
            continue
        arguments = [Mock(cache_id=1) for _ in list(inspect.signature(method).parameters)[1:]]
        replaced = AsyncMock() if inspect.iscoroutinefunction(method) else Mock()
        setattr(inner, name, replaced)
        result = getattr(watch, name)(*arguments)
        if inspect.isawaitable(result):
            await result
        replaced.assert_called_once_with(*arguments)


async def test_the_watch_follows_the_manager() -> None:
    inner = AsyncMock(spec=LeasePort)
    inner.bind = Mock()
    watch = LeaseWatch(inner)
    inbox: list[LeaseMessage] = []
    watch.bind(GEOMETRY, inbox.append, lambda: None)
    (geometry, post, _) = inner.bind.call_args.args
    assert geometry is GEOMETRY
    waiting = asyncio.create_task(watch.until_can_serve())
    post(LeaseRevoked(1))
    post(ManagerAway("gone"))
    await asyncio.sleep(0)
    assert not watch.can_serve
    await asyncio.to_thread(post, PoolReady(FakeKv(4, 8), 8))  # from any thread
    async with asyncio.timeout(10):
        await waiting
    assert watch.block_size == 8
    states: list[bool] = []
    for message in (ManagerAway("gone"), ManagerBack()):
        watch.changed.clear()
        post(message)
        async with asyncio.timeout(10):
            await watch.changed.wait()
        states.append(watch.can_serve)
    assert states == [False, True]
    assert [type(message) for message in inbox] == [LeaseRevoked, ManagerAway, PoolReady, ManagerAway, ManagerBack]


async def test_an_error_on_a_thread_comes_back_to_the_loop() -> None:
    def fail() -> None:
        raise DecoderError("from the thread")

    with pytest.raises(DecoderError, match="from the thread"):
        await service._in_thread(fail)
    assert await service._in_thread(lambda: 7) == 7
