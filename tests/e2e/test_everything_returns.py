"""Whatever became of the requests and of the services: every block is free again, no process and no lock is left."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from protos import decoder_pb2 as pb
from protos import kv_manager_pb2, kv_manager_pb2_grpc
from tests.e2e.pool_files import check_pool_files, held_locks
from tests.e2e.processes import DEADLINE_S, ROOT, Decoder, Manager, Processes, Service, until
from tests.e2e.streams import TIMEOUT_S, chat, long_request, open_stream, receive, receive_rest, stub_of

pytest.importorskip("mlx.core")

ENDINGS = ("finish", "stop string", "cancel", "deadline", "abort", "refuse")


async def _request_that_ends(decoder: Decoder, ending: str, index: int, rng: random.Random) -> None:
    request = long_request(f"{ending}-{index}", max_tokens=1500)
    async with stub_of(decoder.address) as stub:
        if ending == "stop string":
            request = chat("Tell me a story.", stop=pb.StopConditions(strings=["e"]))
        elif ending == "refuse":
            request.stop.max_tokens = 1_000_000
        elif ending == "finish":
            request.stop.max_tokens = rng.randint(1, 60)
        if ending in ("cancel", "abort"):
            call, responses = await open_stream(stub, request, num_responses=rng.randint(1, 6))
            if ending == "cancel":
                call.cancel()
                return
            assert (await stub.Abort(pb.AbortRequest(request_id=request.request_id))).found
            await receive_rest(call, responses)
            return
        await receive(stub, request, timeout_s=rng.uniform(0.001, 0.5) if ending == "deadline" else TIMEOUT_S)


def _kill_a_client_that_streams(decoder: Decoder, output: Path) -> None:
    """A client process that is killed with its stream open: no byte says goodbye."""
    argv = ("--decoder", decoder.address, "--token-ids", "5,6,7", "--max-tokens", "2000", "--ignore-eos")
    with output.open("wb") as out:
        client = subprocess.Popen(
            [sys.executable, "-m", "clients.cli", "generate", *argv],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.DEVNULL,
        )
    try:
        until(lambda: output.stat().st_size > 0, "the client has text")
    finally:
        client.kill()
        client.wait()


def _is_gone(service: Service) -> bool:
    try:
        os.killpg(service.process.pid, 0)  # its whole session, so that no child of it is left either
    except ProcessLookupError:
        return True
    return False


def _flush(manager: Manager) -> None:
    with grpc.insecure_channel(manager.address) as channel:
        kv_manager_pb2_grpc.KVManagerStub(channel).Flush(kv_manager_pb2.FlushRequest(), timeout=DEADLINE_S)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("first", ["decoder", "manager"])
async def test_after_any_mix_of_endings_and_a_signal_to_either_service_everything_is_back(
    processes: Processes, tmp_path: Path, number: int, first: str
) -> None:
    rng = random.Random(number)
    manager = processes.start_manager(num_blocks=512)
    decoder = processes.start_decoder(manager, "--grace", "0.2")
    await asyncio.gather(*(_request_that_ends(decoder, ending, i, rng) for i in range(3) for ending in ENDINGS))
    _kill_a_client_that_streams(decoder, tmp_path / "client.out")
    manager.wait_all_free()

    async with stub_of(decoder.address) as stub:
        streams = await asyncio.gather(
            *(open_stream(stub, long_request(f"last-{i}", max_tokens=2000)) for i in range(3))
        )
        services: tuple[Service, Service] = (decoder, manager) if first == "decoder" else (manager, decoder)
        codes = [await asyncio.to_thread(service.terminate, number) for service in services]
        ended = await asyncio.gather(*(receive_rest(call, responses) for call, responses in streams))
    assert codes == [0, 0]
    assert {received.code for received in ended} == {grpc.StatusCode.UNAVAILABLE}
    assert not decoder.has_traceback()
    assert not manager.has_traceback()
    assert _is_gone(decoder)
    assert _is_gone(manager)
    assert held_locks(manager.pool_dir) == []
    counts = check_pool_files(manager.pool_dir)
    assert counts["free"] + counts["cached"] == 512, counts

    again = processes.start_manager(listen=manager.address, pool_dir=manager.pool_dir, num_blocks=512)
    _flush(again)
    assert again.stats().free == 512
    assert again.terminate(number) == 0
    assert check_pool_files(manager.pool_dir)["free"] == 512
