"""Starting and stopping a decoder: what it refuses to start with, what it waits for, and what it leaves behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from clients.decoder import DecoderClient
from services.healthcheck import is_serving
from tests.e2e.followed import follow
from tests.e2e.processes import DEADLINE_S, DECODER_SERVICE, DEMO_MODEL, ROOT, Decoder, Processes, until
from tests.e2e.streams import long_request, open_stream, receive, receive_rest, stub_of

pytest.importorskip("mlx.core")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_running_streams_and_leaves_nothing(processes: Processes, number: int) -> None:
    manager = processes.start_manager()
    decoder = processes.start_decoder(manager, "--grace", "0.2")
    async with stub_of(decoder.address) as stub:
        opening = (open_stream(stub, long_request(f"r{index}", max_tokens=2000)) for index in range(4))
        streams = await asyncio.gather(*opening)
        assert manager.stats().leased > 0
        decoder.process.send_signal(number)
        ended = await asyncio.gather(*(receive_rest(call, responses) for call, responses in streams))
    assert {received.code for received in ended} == {grpc.StatusCode.UNAVAILABLE}
    assert {received.reason for received in ended} == {"SHUTTING_DOWN"}
    assert decoder.wait_exit() == 0
    assert "Traceback" not in decoder.log()
    manager.wait_all_free()
    assert manager.worker_lock_is_free(decoder.worker_id)
    with pytest.raises(ProcessLookupError):
        os.killpg(decoder.process.pid, 0)  # its whole session: no child of it is left either
    assert manager.terminate(number) == 0


async def test_running_requests_may_end_within_the_grace_time_but_no_new_one_starts(processes: Processes) -> None:
    decoder = processes.start_decoder(None, "--grace", "60")
    async with stub_of(decoder.address) as stub:
        call, responses = await open_stream(stub, long_request(max_tokens=200))
        # It keeps the decoder up until a new one was refused, however long that takes.
        longer, _ = await open_stream(stub, long_request(max_tokens=2000))
        decoder.process.send_signal(signal.SIGTERM)
        until(lambda: bool(decoder.events("stopping")), "it is stopping")
        refused = await receive(stub, long_request(max_tokens=2))
        while refused.error is None:  # it said so a moment before it did
            refused = await receive(stub, long_request(max_tokens=2))
        longer.cancel()
        received = await receive_rest(call, responses)
    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
    assert received.finished.num_output_tokens == 200
    assert decoder.wait_exit() == 0


async def test_a_second_signal_ends_it_at_once(processes: Processes) -> None:
    decoder = processes.start_decoder(None, "--grace", "600", hold_at=2)
    async with stub_of(decoder.address) as stub:
        call, _ = await open_stream(stub, long_request(max_tokens=2000), num_responses=2)
        decoder.wait_held()
        decoder.process.send_signal(signal.SIGTERM)
        until(lambda: bool(decoder.events("stopping")), "it is stopping")
        assert decoder.terminate() == 128 + signal.SIGTERM
        call.cancel()


async def test_a_decoder_waits_for_its_manager_before_it_binds_its_port(processes: Processes) -> None:
    first = processes.start_manager()
    address = first.address
    assert first.terminate() == 0
    decoder = processes.start_decoder(address, wait=False)
    until(lambda: bool(decoder.events("waiting for the KV manager")), "it says what it waits for")
    assert decoder.events("serving") == []
    manager = processes.start_manager(listen=address, pool_dir=first.pool_dir)
    decoder.wait_serving()
    async with stub_of(decoder.address) as stub:
        assert (await receive(stub, long_request(max_tokens=4))).finished.num_output_tokens == 4
    manager.wait_all_free()


def test_a_signal_while_it_waits_for_its_manager_ends_it(processes: Processes) -> None:
    decoder = processes.start_decoder("127.0.0.1:1", wait=False)
    until(lambda: bool(decoder.events("waiting for the KV manager")), "it waits")
    assert decoder.terminate() == 0
    assert "Traceback" not in decoder.log()


def test_a_taken_port_is_refused(processes: Processes) -> None:
    first = processes.start_decoder(None)
    second = processes.start_decoder(None, listen=first.address, wait=False)
    _refused(second, 1, "--listen: cannot listen on", first.address, "choose another port")
    assert first.process.poll() is None


def test_a_taken_unix_socket_is_refused(processes: Processes, tmp_path: Path) -> None:
    listen = f"unix:{tmp_path}/decoder.sock"
    first = processes.start_decoder(None, listen=listen)
    _refused(
        processes.start_decoder(None, listen=listen, wait=False), 1, "--listen: cannot listen on", "choose another"
    )
    assert first.terminate() == 0
    assert processes.start_decoder(None, listen=listen).terminate() == 0, "a socket file left behind is no obstacle"


def test_a_worker_id_in_use_is_refused(processes: Processes) -> None:
    manager = processes.start_manager()
    first = processes.start_decoder(manager, worker_id="same")
    second = processes.start_decoder(manager, worker_id="same", wait=False)
    _refused(second, 2, "--worker-id", "'same'", "choose another")
    assert first.process.poll() is None
    assert manager.stats().num_sessions == 1


@pytest.mark.parametrize("value", ["0", "-5", "lots", "1000000"])
def test_row_s6_a_bad_capacity_is_refused_at_start(processes: Processes, value: str) -> None:
    decoder = processes.start_decoder(None, f"--kv-capacity={value}", wait=False)
    _refused(decoder, 2, "--kv-capacity", "maximum of" if value == "1000000" else "give a whole number")


def _refused(decoder: Decoder, code: int, *parts: str) -> None:
    assert decoder.wait_exit() == code, decoder.log()
    (line,) = [line for line in decoder.log().splitlines() if line.startswith("python -m services.decoder: error:")]
    for part in parts:
        assert part in line
    assert "Traceback" not in decoder.log()


def _model(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    for source in DEMO_MODEL.iterdir():
        (model / source.name).write_bytes(source.read_bytes())
    return model


def test_a_bad_checkpoint_is_refused_with_its_file(processes: Processes, tmp_path: Path) -> None:
    model = _model(tmp_path)
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    _refused(processes.start_decoder(None, model=model, wait=False), 1, "model.safetensors")
    weights.write_bytes(whole)
    (model / "tokenizer.json").write_text("{")
    _refused(processes.start_decoder(None, model=model, wait=False), 1, "tokenizer.json")
    (model / "config.json").write_text('{"model_type": "gpt2"}')
    _refused(processes.start_decoder(None, model=model, wait=False), 1, "config.json", "model_type", "gpt2")
    _refused(processes.start_decoder(None, model=tmp_path / "absent", wait=False), 2, "--model", "does not exist")


async def test_a_killed_decoder_gives_way_and_its_stream_goes_on_elsewhere(processes: Processes) -> None:
    manager = processes.start_manager()
    first, second = processes.start_decoder(manager, hold_at=10), processes.start_decoder(manager)
    request = long_request(max_tokens=120)
    async with stub_of(second.address) as stub:
        expected = await receive(stub, request)
    async with DecoderClient([first.address, second.address]) as client:
        running = asyncio.create_task(follow(client, request))
        await asyncio.to_thread(first.wait_held)
        await asyncio.to_thread(first.kill)
        stream = await running
    assert [event.exact for event in stream.resumed] == [True]
    assert (stream.token_ids, stream.text) == (expected.token_ids, expected.text)
    manager.wait_all_free()
    assert manager.worker_lock_is_free(first.worker_id)


def test_health_and_reflection_are_served(processes: Processes) -> None:
    decoder = processes.start_decoder(None)
    assert is_serving(decoder.address, DECODER_SERVICE, 5.0)
    assert is_serving(decoder.address, "", 5.0)
    with grpc.insecure_channel(decoder.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {DECODER_SERVICE, "grpc.health.v1.Health"} <= set(database.get_services())
        assert database.FindFileContainingSymbol(DECODER_SERVICE).package == "leasehold.v1"


LOADS_FOR_EVER = """
import sys, threading
from services.decoder import __main__, service

def load(*arguments):
    print("loading", flush=True)
    threading.Event().wait()

service.load = load
sys.exit(__main__.main(sys.argv[1:]))
"""


def test_a_signal_in_the_midst_of_loading_ends_it() -> None:
    argv = ("--model", str(DEMO_MODEL), "--listen", "127.0.0.1:0", "--no-paged", "--backend", "mlx")
    with subprocess.Popen([sys.executable, "-c", LOADS_FOR_EVER, *argv], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"loading\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
