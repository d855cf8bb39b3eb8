"""Files that are full, gone, cut short or flipped: a clear error or a clean recovery, and corrupt bytes never served."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import random
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import pytest

pytest.importorskip("mlx.core")

from clients.decoder import DecoderClient
from protos import decoder_pb2 as pb
from protos import kv_manager_pb2, kv_manager_pb2_grpc
from protos.pool_format import DATA_OFFSET_BYTES
from services.kv_manager.meta_format import HEADERS_OFFSET
from tests.decoder.tiny_models import TinyConfig, write_tiny_checkpoint
from tests.e2e.followed import Followed, Pace, follow, token_request
from tests.e2e.pool_files import check_pool_files
from tests.e2e.processes import Decoder, Manager, Processes, until
from tests.e2e.streams import long_request, open_stream, receive, receive_rest, stub_of

NUM_BLOCKS = 256
BLOCK_SIZE = 16
VOCAB_SIZE = 96
PROMPT = 100
FLAGS = ("--kv-dtype", "f32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = TinyConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=2048)
    return write_tiny_checkpoint(tmp_path_factory.mktemp("damage") / "model", config, 3)


def _requests(num: int, num_tokens: int) -> list[pb.GenerateRequest]:
    rng = random.Random(8)
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(PROMPT)] for _ in range(num)]
    return [token_request(p, num_tokens, seed=i if i % 2 else None) for i, p in enumerate(prompts)]


async def _all(client: DecoderClient, requests: Sequence[pb.GenerateRequest], tenant: str = "") -> list[Followed]:
    return await asyncio.gather(*(follow(client, request, tenant=tenant) for request in requests))


def _start_again(processes: Processes, manager: Manager) -> Manager:
    return processes.start_manager(listen=manager.address, pool_dir=manager.pool_dir, num_blocks=NUM_BLOCKS)


def _pool_file(manager: Manager, suffix: str) -> Path:
    (path,) = manager.pool_dir.glob(f"*.{suffix}")
    return path


def _flip_bits(path: Path, start: int, num: int, rng: random.Random) -> None:
    with path.open("r+b") as file:
        size = file.seek(0, 2)
        for _ in range(num):
            offset = rng.randrange(start, size)
            file.seek(offset)
            (byte,) = file.read(1)
            file.seek(offset)
            file.write(bytes([byte ^ 1 << rng.randrange(8)]))


def _scrub(manager: Manager) -> kv_manager_pb2.ScrubProgress:
    with grpc.insecure_channel(manager.address) as channel:
        stub = kv_manager_pb2_grpc.KVManagerStub(channel)
        *_, last = stub.Scrub(kv_manager_pb2.ScrubRequest(), timeout=60.0)
    return last


def _refused(processes: Processes, manager: Manager, *parts: str) -> None:
    again = processes.start_manager(
        listen=manager.address, pool_dir=manager.pool_dir, num_blocks=NUM_BLOCKS, wait=False
    )
    assert again.wait_exit() == 1, again.log()
    assert "Traceback" not in again.log()
    for part in parts:
        assert part in again.log()


async def test_everything_stopped_and_started_again_still_hits_after_a_check(processes: Processes, model: Path) -> None:
    manager = processes.start_manager(num_blocks=NUM_BLOCKS)
    decoder = processes.start_decoder(manager, *FLAGS, model=model)
    requests = _requests(4, 40)
    async with DecoderClient(decoder.address) as client:
        first = await _all(client, requests)
    manager.wait_all_free()  # by then everything is sealed
    assert decoder.terminate() == 0
    assert manager.terminate() == 0
    manager = _start_again(processes, manager)
    assert manager.stats().num_unverified == manager.stats().cached > 0
    decoder = processes.start_decoder(manager, *FLAGS, model=model)
    async with DecoderClient(decoder.address) as client:
        second = await _all(client, requests)
    assert [stream.token_ids for stream in second] == [stream.token_ids for stream in first]
    hits = [stream.finished.num_cached_tokens for stream in second if stream.finished is not None]
    assert hits == [(PROMPT - 1) // BLOCK_SIZE * BLOCK_SIZE] * 4
    assert manager.stats().num_corrupt == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB of one test's own."""
    target = tmp_path / "small"
    target.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", os.fsencode(target), b"tmpfs", 0, b"size=4m") != 0:
        pytest.skip(f"cannot mount a tmpfs here: {os.strerror(ctypes.get_errno())}")
    yield target
    libc.umount2(os.fsencode(target), 2)


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


async def test_a_full_disk_is_told_to_who_needs_more_and_to_nobody_else(
    processes: Processes, model: Path, small_disk: Path
) -> None:
    manager = processes.start_manager(num_blocks=NUM_BLOCKS, pool_dir=small_disk / "pool")
    decoder = processes.start_decoder(manager, *FLAGS, model=model)
    # The manager sets space for 85 blocks aside at once: room for the two that run, and never for this one.
    large = token_request([5] * (90 * BLOCK_SIZE), 4)
    async with stub_of(decoder.address) as stub:
        running = [await open_stream(stub, long_request(f"runs-{i}", max_tokens=500)) for i in range(2)]
        _fill(small_disk / "ballast")
        refused = await receive(stub, large)
        assert (refused.code, refused.responses) == (grpc.StatusCode.RESOURCE_EXHAUSTED, [])
        assert "has no room for" in refused.status.message
        assert str(manager.pool_dir) in refused.status.message
        ended = [await receive_rest(*stream) for stream in running]
        (small_disk / "ballast").unlink()
        served = await receive(stub, large)
    assert [stream.finished.num_output_tokens for stream in ended] == [500, 500]
    assert ended[0].token_ids == ended[1].token_ids
    assert served.finished.num_output_tokens == 4
    manager.wait_all_free()
    assert decoder.terminate() == 0
    assert manager.terminate() == 0


async def test_a_pool_dir_that_is_gone_is_made_anew_and_no_stream_changes(processes: Processes, model: Path) -> None:
    manager = processes.start_manager(num_blocks=NUM_BLOCKS)
    decoder = processes.start_decoder(manager, *FLAGS, model=model)
    requests, pace = _requests(4, 150), Pace()
    async with DecoderClient(decoder.address) as client:
        expected = [stream.token_ids for stream in await _all(client, requests, "undisturbed")]
        running = [asyncio.create_task(follow(client, request, pace=pace)) for request in requests]
        await pace.reach(100)
        shutil.rmtree(manager.pool_dir)
        manager.kill()
        manager = await asyncio.to_thread(_start_again, processes, manager)
        streams = await asyncio.gather(*running)
        assert [stream.token_ids for stream in streams] == expected
        assert [s.token_ids for s in await _all(client, requests)] == expected
    manager.wait_all_free()
    assert decoder.terminate() == 0
    assert manager.terminate() == 0
    check_pool_files(manager.pool_dir)


async def test_a_deleted_lock_file_frees_nothing_and_no_stream_changes(processes: Processes, model: Path) -> None:
    manager = processes.start_manager("--ttl", "1", num_blocks=NUM_BLOCKS)
    requests = _requests(4, 200)
    decoder = processes.start_decoder(manager, *FLAGS, model=model, worker_id="same", hold_at=800 + 80)
    async with DecoderClient(decoder.address) as client:
        expected = [stream.token_ids for stream in await _all(client, requests, "undisturbed")]
        running = [asyncio.create_task(follow(client, request)) for request in requests]
        await asyncio.to_thread(decoder.wait_held)
        (manager.pool_dir / "workers" / "same.lock").unlink()
        # With the file gone nothing keeps a second process from locking another one of that name, but the manager.
        second = processes.start_decoder(manager, *FLAGS, model=model, worker_id="same", wait=False)
        until(lambda: second.process.poll() is not None or bool(second.events("kv_manager_away")), "it is refused")
        assert second.events("serving") == []
        second.kill()
        # Silent for longer than the TTL it loses its session, and has to register with a lock that is not the old one.
        decoder.process.send_signal(signal.SIGSTOP)
        until(lambda: bool(manager.events("revoked")), "the silent one is revoked")
        decoder.process.send_signal(signal.SIGCONT)
        decoder.go_on()
        await asyncio.to_thread(until, lambda: len(decoder.events("session_opened")) > 1, "it has a session again")
        manager.kill()
        manager = await asyncio.to_thread(_start_again, processes, manager)
        streams = await asyncio.gather(*running)
    assert [stream.token_ids for stream in streams] == expected
    manager.wait_all_free()
    assert decoder.terminate() == 0


async def _damaged(processes: Processes, model: Path, suffix: str, start: int, num_flips: int, seed: int) -> Manager:
    """Everything sealed, stopped, flipped and started again; the same prompts give the same tokens whatever is left."""
    manager = processes.start_manager(num_blocks=NUM_BLOCKS)
    decoder: Decoder = processes.start_decoder(manager, *FLAGS, model=model)
    requests = _requests(8, 40)
    async with DecoderClient(decoder.address) as client:
        expected = [stream.token_ids for stream in await _all(client, requests)]
    assert decoder.terminate() == 0
    assert manager.terminate() == 0
    _flip_bits(_pool_file(manager, suffix), start, num_flips, random.Random(seed))
    manager = _start_again(processes, manager)
    decoder = processes.start_decoder(manager, *FLAGS, model=model)
    async with DecoderClient(decoder.address) as client:
        assert [stream.token_ids for stream in await _all(client, requests)] == expected
    assert decoder.terminate() == 0
    manager.wait_all_free()
    return manager


async def test_flipped_bits_in_the_blocks_are_found_and_never_served(processes: Processes, model: Path) -> None:
    manager = await _damaged(processes, model, "kv", DATA_OFFSET_BYTES, 100, seed=1)
    found = manager.stats().num_corrupt
    last = _scrub(manager)
    assert last.done
    assert found + last.num_corrupt > 0
    assert _scrub(manager).num_corrupt == 0


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
async def test_flipped_bits_in_the_headers_cost_their_blocks_only(processes: Processes, model: Path, seed: int) -> None:
    manager = await _damaged(processes, model, "meta", HEADERS_OFFSET, 40, seed)
    assert manager.events("recovered")[-1]["damaged_headers"] > 0
    assert _scrub(manager).num_corrupt == 0
    assert manager.terminate() == 0
    counts = check_pool_files(manager.pool_dir)
    assert counts["free"] + counts["cached"] == NUM_BLOCKS


def test_truncated_files_and_a_damaged_superblock_are_refused_by_name(processes: Processes, model: Path) -> None:
    manager = processes.start_manager(num_blocks=NUM_BLOCKS)
    decoder = processes.start_decoder(manager, *FLAGS, model=model)
    assert decoder.terminate() == 0
    assert manager.terminate() == 0
    for suffix in ("kv", "meta"):
        path = _pool_file(manager, suffix)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        _refused(processes, manager, path.name, "truncated")
        path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        _refused(processes, manager, path.name, "delete")
        path.write_bytes(whole)
    again = _start_again(processes, manager)
    assert again.stats().free == NUM_BLOCKS
