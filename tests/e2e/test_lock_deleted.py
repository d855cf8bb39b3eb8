"""A worker's lock file is deleted: its process goes on with another; where a second one took the name, everybody is told."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

pytest.importorskip("mlx.core")

from clients.decoder import DecoderClient
from protos import kv_manager_pb2, kv_manager_pb2_grpc
from tests.decoder.tiny_models import TinyConfig, write_tiny_checkpoint
from tests.e2e.followed import follow, token_request
from tests.e2e.pool_files import check_pool_files
from tests.e2e.processes import ROOT, Manager, Processes, until
from tests.e2e.streams import TIMEOUT_S, receive, stub_of

NUM_BLOCKS = 128
NUM_TOKENS = 400
PROMPT = [index % 90 for index in range(40)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("locks") / "model", TinyConfig(vocab_size=96), 3)


def _states(manager: Manager) -> dict[str, str]:
    with grpc.insecure_channel(manager.address) as channel:
        stub = kv_manager_pb2_grpc.KVManagerStub(channel)
        listing = stub.ListLeases(kv_manager_pb2.ListLeasesRequest(), timeout=10.0)
    return {session.worker_id: session.state for session in listing.sessions}


def _status(manager: Manager) -> str:
    command = [sys.executable, "-m", "clients.cli", "status", "--kv-manager", manager.address]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=True).stdout


def _restart(processes: Processes, manager: Manager) -> Manager:
    return processes.start_manager(listen=manager.address, pool_dir=manager.pool_dir, num_blocks=NUM_BLOCKS)


async def test_the_decoder_takes_another_lock_and_no_stream_notices(processes: Processes, model: Path) -> None:
    manager = processes.start_manager(num_blocks=NUM_BLOCKS)
    decoder = processes.start_decoder(manager, model=model, worker_id="one", hold_at=NUM_TOKENS + 20)
    request = token_request(PROMPT, NUM_TOKENS, seed=5)
    async with DecoderClient(decoder.address) as client:
        undisturbed = await follow(client, request, tenant="undisturbed")
        running = asyncio.create_task(follow(client, request))
        await asyncio.to_thread(decoder.wait_held)
        (manager.pool_dir / "workers" / "one.lock").unlink()
        await asyncio.to_thread(manager.kill)
        manager = await asyncio.to_thread(_restart, processes, manager)
        decoder.go_on()
        stream = await running
    assert stream.token_ids == undisturbed.token_ids
    assert not stream.broken
    until(lambda: _states(manager) == {"one": "live"}, "it has a session again")
    manager.wait_all_free()
    # The new lock is the proof of its death.
    await asyncio.to_thread(decoder.kill)
    until(lambda: _states(manager) == {}, "its end is seen")


async def test_a_process_that_has_its_name_meanwhile_keeps_it_and_the_error_names_the_file_and_the_fix(
    processes: Processes, model: Path
) -> None:
    manager = processes.start_manager(num_blocks=NUM_BLOCKS)
    decoder = processes.start_decoder(manager, "--grace", "0", model=model, worker_id="one", hold_at=NUM_TOKENS + 20)
    lock_path = manager.pool_dir / "workers" / "one.lock"
    request = token_request(PROMPT, NUM_TOKENS, seed=5)
    async with DecoderClient(decoder.address) as client:
        undisturbed = await follow(client, request, tenant="undisturbed")
        running = asyncio.create_task(follow(client, request))
        await asyncio.to_thread(decoder.wait_held)
        decoder.process.send_signal(signal.SIGSTOP)
        lock_path.unlink()
        await asyncio.to_thread(manager.kill)
        manager = await asyncio.to_thread(_restart, processes, manager)
        held = manager.stats().quarantined
        assert held > 0
        second = await asyncio.to_thread(
            lambda: processes.start_decoder(manager, "--grace", "0", model=model, worker_id="one")
        )
        assert _states(manager) == {"one?0": "orphaned", "one": "live"}
        decoder.process.send_signal(signal.SIGCONT)
        decoder.go_on()

        # The decoder's log says it, and so does the status of every new request.
        def is_told() -> bool:
            return any(str(lock_path) in entry["reason"] for entry in decoder.events("kv_manager_away"))

        await asyncio.to_thread(until, is_told, "the decoder is told why it has no session")
        async with stub_of(decoder.address) as stub:
            refused = await receive(stub, token_request(PROMPT, 3))
        assert refused.code is grpc.StatusCode.UNAVAILABLE
        assert f"another process holds {lock_path}" in refused.status.message
        assert "choose another --worker-id" in refused.status.message

        # Under its old name and address, as a supervisor restarts it.
        listen = decoder.address
        await asyncio.to_thread(second.terminate)
        await asyncio.to_thread(decoder.terminate)
        decoder = await asyncio.to_thread(
            lambda: processes.start_decoder(manager, model=model, worker_id="one", listen=listen)
        )
        stream = await running
        assert stream.token_ids == undisturbed.token_ids
        assert all(event.exact for event in stream.resumed)

    # What the old process held stays set aside, though it has ended: no descriptor leads to the lock that would show it.
    assert _states(manager) == {"one?0": "orphaned", "one": "live"}
    until(lambda: manager.stats().num_leases == 0, "the stream's lease is given back")
    stats = manager.stats()
    assert 0 < stats.quarantined <= held
    status = _status(manager)
    assert "one?0: the worker's lock file was deleted" in status
    assert f"its {stats.quarantined} blocks stay quarantined until the host reboots" in status
    await asyncio.to_thread(decoder.terminate)
    await asyncio.to_thread(manager.terminate)
    counts = check_pool_files(manager.pool_dir)
    assert counts["quarantined"] == stats.quarantined
    assert counts["leased"] == 0
