"""Wall clocks that jump: leases, sessions and streams know monotonic time only."""

from __future__ import annotations

import ast
import asyncio
import mmap
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from clients.decoder import DecoderClient
from protos import kv_manager_pb2, kv_manager_pb2_grpc
from tests.decoder.tiny_models import TinyConfig, write_tiny_checkpoint
from tests.e2e.followed import Followed, Pace, follow, token_request
from tests.e2e.processes import DEADLINE_S, ROOT, Manager, Processes, silent_s, until

DAY_S = 86_400
# What a chat template calls today.
MAY_TELL_THE_DATE = {"services/decoder/chat_template.py"}
WALL_CLOCKS = {
    ("time", "time"),
    ("time", "time_ns"),
    ("time", "localtime"),
    ("time", "gmtime"),
    ("time", "CLOCK_REALTIME"),
    ("datetime", "now"),
    ("datetime", "utcnow"),
    ("datetime", "today"),
    ("date", "today"),
}


def _wall_clocks_in(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            if (owner, node.attr) in WALL_CLOCKS:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {owner}.{node.attr}")
        elif isinstance(node, ast.ImportFrom) and node.module == "time":
            wall = [alias.name for alias in node.names if ("time", alias.name) in WALL_CLOCKS]
            found += [f"{path.relative_to(ROOT)}:{node.lineno}: from time import {name}" for name in wall]
    return found


def test_no_service_reads_the_wall_clock() -> None:
    paths = [
        path
        for part in ("kv_manager", "decoder")
        for path in sorted((ROOT / "services" / part).rglob("*.py"))
        if "demo_model" not in path.parts and str(path.relative_to(ROOT)) not in MAY_TELL_THE_DATE
    ]
    assert len(paths) > 50
    assert [found for path in paths for found in _wall_clocks_in(path)] == []
    assert _wall_clocks_in(ROOT / "services/decoder/chat_template.py"), "the search finds what there is to find"


@pytest.fixture
def jump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Puts the wall clock of all processes that are started from now on so many seconds off."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    library, offset = tmp_path / "jumping_clock.so", tmp_path / "offset"
    source = Path(__file__).with_name("jumping_clock.c")
    subprocess.run((compiler, "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"), check=True)
    offset.write_bytes(bytes(8))
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("JUMPING_CLOCK", str(offset))
    with offset.open("r+b") as file, mmap.mmap(file.fileno(), 8) as shared:

        def set_offset(seconds: int) -> None:
            shared[:] = struct.pack("=q", seconds)

        yield set_offset


def test_the_wall_clock_of_a_process_does_jump(jump: Callable[[int], None]) -> None:
    jump(-3 * DAY_S)
    told = subprocess.run(("python3", "-c", "import time; print(time.time())"), capture_output=True, check=True)
    assert abs(float(told.stdout) + 3 * DAY_S - time.time()) < DAY_S


async def test_a_wall_clock_that_jumps_revokes_nobody_else_than_the_silent_and_changes_no_stream(
    processes: Processes, tmp_path: Path, jump: Callable[[int], None]
) -> None:
    pytest.importorskip("mlx.core")
    model = write_tiny_checkpoint(tmp_path / "model", TinyConfig(vocab_size=96), 3)
    manager = processes.start_manager("--ttl", "2", num_blocks=256)
    decoder = processes.start_decoder(manager, "--kv-dtype", "bf16", model=model)
    requests = [token_request([5, index], 120, seed=index) for index in range(6)]
    async with DecoderClient(decoder.address) as client:
        expected = await _all(client, requests)
        pace = Pace()
        running = asyncio.create_task(_all(client, [*requests], pace))
        for at, offset_s in enumerate((DAY_S, -DAY_S, 400 * DAY_S, -2 * DAY_S, 0), start=1):
            await pace.reach(at * 100)
            jump(offset_s)
        streams = await running
    assert [stream.token_ids for stream in streams] == [stream.token_ids for stream in expected]
    assert not any(stream.broken for stream in streams)
    manager.wait_all_free()
    # A busy machine may keep it silent for longer than the TTL, but nothing keeps it silent for a day.
    assert all(silent_s(event) < DAY_S / 2 for event in manager.events("revoked"))
    until(lambda: _states(manager) == ["live"], "the decoder has a session")
    # Nor does a clock that is put back keep a decoder that is silent alive.
    decoder.process.send_signal(signal.SIGSTOP)
    jump(-5 * DAY_S)
    until(lambda: _states(manager) == ["revoked"], "the stopped decoder is revoked")
    decoder.process.send_signal(signal.SIGCONT)
    until(lambda: _states(manager) == ["live"], "the decoder has its session back")


async def _all(client: DecoderClient, requests: list[object], pace: Pace | None = None) -> list[Followed]:
    return await asyncio.gather(*(follow(client, request, pace=pace) for request in requests))  # type: ignore[arg-type]


def _states(manager: Manager) -> list[str]:
    with grpc.insecure_channel(manager.address) as channel:
        stub = kv_manager_pb2_grpc.KVManagerStub(channel)
        listed = stub.ListLeases(kv_manager_pb2.ListLeasesRequest(), timeout=DEADLINE_S)
    return [session.state for session in listed.sessions]
