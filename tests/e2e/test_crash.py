"""Processes that die or hang under load: streams go on token-exact, and blocks come back when it is proved that they can."""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

pytest.importorskip("mlx.core")

from clients.decoder import DecoderClient
from protos import decoder_pb2 as pb
from protos import kv_manager_pb2, kv_manager_pb2_grpc
from tests.decoder.tiny_models import TinyConfig, write_tiny_checkpoint
from tests.e2e.followed import Followed, Pace, follow, token_request
from tests.e2e.pool_files import check_pool_files
from tests.e2e.processes import DEADLINE_S, Decoder, Manager, Processes, until

NUM_STREAMS = 16
NUM_TOKENS = 100
NUM_BLOCKS = 1024
BLOCK_SIZE = 16
CHUNK = 64  # --max-num-batched-tokens
VOCAB_SIZE = 96
UNDISTURBED = "undisturbed"  # a tenant of its own, so that the disturbed streams find nothing of it
FLAGS = ("--kv-dtype", "bf16", "--max-num-batched-tokens", str(CHUNK))
SHORT_TTL = ("--ttl", "1", "--hang-limit", "30")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = TinyConfig(vocab_size=VOCAB_SIZE)
    return write_tiny_checkpoint(tmp_path_factory.mktemp("crash") / "model", config, 3)


def _requests(rng: random.Random, num: int = NUM_STREAMS, num_tokens: int = NUM_TOKENS) -> list[pb.GenerateRequest]:
    """Half of them greedy, half sampled with a seed; every fourth prompt is longer than a chunk."""
    lengths = [rng.randint(CHUNK + 1, 3 * CHUNK) if index % 4 == 3 else rng.randint(1, 40) for index in range(num)]
    return [
        token_request(
            [rng.randrange(VOCAB_SIZE) for _ in range(length)], num_tokens, seed=rng.randrange(2**50) if i % 2 else None
        )
        for i, length in enumerate(lengths)
    ]


async def _undisturbed(decoder: Decoder, requests: Sequence[pb.GenerateRequest]) -> list[list[int]]:
    async with DecoderClient(decoder.address) as client:
        streams = await asyncio.gather(*(follow(client, request, tenant=UNDISTURBED) for request in requests))
    return [stream.token_ids for stream in streams]


async def _start_decoder_again(
    processes: Processes, manager: Manager, model: Path, last: Decoder, hold_at: int | None = None
) -> Decoder:
    """The same worker at the same address, while the streams of the test go on."""
    where: dict[str, Any] = {"model": model, "worker_id": last.worker_id, "listen": last.address, "hold_at": hold_at}
    return await asyncio.to_thread(lambda: processes.start_decoder(manager, *FLAGS, **where))


async def _start_manager_again(processes: Processes, last: Manager) -> Manager:
    where: dict[str, Any] = {"listen": last.address, "pool_dir": last.pool_dir, "num_blocks": NUM_BLOCKS}
    return await asyncio.to_thread(lambda: processes.start_manager(**where))


def _scrub(manager: Manager) -> kv_manager_pb2.ScrubProgress:
    with grpc.insecure_channel(manager.address) as channel:
        stub = kv_manager_pb2_grpc.KVManagerStub(channel)
        *_, last = stub.Scrub(kv_manager_pb2.ScrubRequest(), timeout=60.0)
    assert last.done
    assert last.num_corrupt == 0
    assert last.num_checked == manager.stats().cached
    return last


def _leases(manager: Manager, worker_id: str) -> kv_manager_pb2.ListLeasesResponse:
    with grpc.insecure_channel(manager.address) as channel:
        stub = kv_manager_pb2_grpc.KVManagerStub(channel)
        return stub.ListLeases(kv_manager_pb2.ListLeasesRequest(worker_id=worker_id), timeout=DEADLINE_S)


def _blocks_of(manager: Manager, worker_id: str) -> set[int]:
    return {block for lease in _leases(manager, worker_id).leases for block in lease.block_ids}


def _check_little_is_computed_again(request: pb.GenerateRequest, stream: Followed) -> None:
    """After its last crash, at most two blocks less one token of a stream are computed again; in prefill, a chunk more."""
    assert stream.finished is not None
    kept = [resumed.num_output_tokens for resumed in stream.resumed]
    if not kept[-1]:
        return  # nobody knows how much of its prompt had been computed: test_seal_bound.py does
    computed_again = len(request.token_ids.ids) + kept[-1] - stream.finished.num_cached_tokens
    # The first token of each decoder comes out of a prefill: of the prompt, or of what the one before it has lost.
    before = max((num for num in kept if num < kept[-1]), default=0)
    is_decoding = kept[-1] - before > 1
    assert computed_again <= 2 * BLOCK_SIZE - 1 + (0 if is_decoding else CHUNK)


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
async def test_a_decoder_killed_again_and_again_changes_no_stream_and_little_is_computed_twice(
    processes: Processes, model: Path, seed: int
) -> None:
    rng = random.Random(seed)
    manager = processes.start_manager(num_blocks=NUM_BLOCKS)
    requests = _requests(rng)
    first, *later = sorted(rng.sample(range(1, NUM_STREAMS * NUM_TOKENS * 3 // 4), 3))
    decoder = processes.start_decoder(
        manager, *FLAGS, model=model, worker_id="one", hold_at=NUM_STREAMS * NUM_TOKENS + first
    )
    expected = await _undisturbed(decoder, requests)
    async with DecoderClient(decoder.address) as client:
        running = [asyncio.create_task(follow(client, request)) for request in requests]
        for since_last in (*(b - a for a, b in itertools.pairwise((first, *later))), None):
            await asyncio.to_thread(decoder.wait_held)
            await asyncio.to_thread(decoder.kill)
            decoder = await _start_decoder_again(processes, manager, model, decoder, since_last)
        streams = await asyncio.gather(*running)
    assert [stream.token_ids for stream in streams] == expected
    resumed = [(request, stream) for request, stream in zip(requests, streams, strict=True) if stream.resumed]
    assert resumed
    assert all(event.exact for stream in streams for event in stream.resumed)
    for request, stream in resumed:
        _check_little_is_computed_again(request, stream)
    manager.wait_all_free()
    _scrub(manager)


async def test_a_manager_killed_under_load_breaks_no_stream_and_its_sealed_blocks_still_hit(
    processes: Processes, model: Path
) -> None:
    rng = random.Random(5)
    manager = processes.start_manager(num_blocks=NUM_BLOCKS)
    requests = _requests(rng)
    late = _requests(rng, 4)
    undisturbed, moment = (NUM_STREAMS + len(late)) * NUM_TOKENS, NUM_STREAMS * NUM_TOKENS // 3
    # With all blocks that they may ever want from the start: without their manager none of them can get more.
    decoder = processes.start_decoder(
        manager, *FLAGS, "--kv-capacity", "320", "--reserve", "full", model=model, hold_at=undisturbed + moment
    )
    expected = await _undisturbed(decoder, [*requests, *late])
    pace = Pace()
    async with DecoderClient(decoder.address) as client:
        running = [asyncio.create_task(follow(client, request, pace=pace)) for request in requests]
        await asyncio.to_thread(decoder.wait_held)
        await pace.reach(moment)
        assert not any(task.done() for task in running)
        manager.kill()
        decoder.go_on()
        await pace.reach(moment + 4 * NUM_STREAMS)  # in the blocks that the streams hold
        running += [asyncio.create_task(follow(client, request)) for request in late]
        again = await _start_manager_again(processes, manager)
        streams = await asyncio.gather(*running)
        assert [stream.token_ids for stream in streams] == expected
        assert [stream.broken for stream in streams[:NUM_STREAMS]] == [[]] * NUM_STREAMS, "no stream failed"
        again.wait_all_free()
        repeated = await follow(client, requests[3])
    assert repeated.finished is not None
    num_prompt = len(requests[3].token_ids.ids)
    assert repeated.finished.num_cached_tokens == (num_prompt - 1) // BLOCK_SIZE * BLOCK_SIZE > 0
    assert repeated.token_ids == expected[3]
    again.wait_all_free()
    _scrub(again)


async def test_both_killed_at_once_change_no_stream_and_lose_no_block(processes: Processes, model: Path) -> None:
    rng = random.Random(6)
    manager = processes.start_manager(num_blocks=NUM_BLOCKS)
    requests = _requests(rng)
    hold_at = NUM_STREAMS * NUM_TOKENS * 3 // 2  # the undisturbed ones, and half of the others
    decoder = processes.start_decoder(manager, *FLAGS, model=model, worker_id="one", hold_at=hold_at)
    expected = await _undisturbed(decoder, requests)
    async with DecoderClient(decoder.address) as client:
        running = [asyncio.create_task(follow(client, request)) for request in requests]
        await asyncio.to_thread(decoder.wait_held)
        manager.process.kill()
        decoder.process.kill()
        manager.kill()
        decoder.kill()
        again = await _start_manager_again(processes, manager)
        second = await _start_decoder_again(processes, again, model, decoder)
        streams = await asyncio.gather(*running)
    assert [stream.token_ids for stream in streams] == expected
    assert any(stream.resumed for stream in streams)
    again.wait_all_free()
    _scrub(again)
    assert second.terminate() == 0
    assert again.terminate() == 0
    counts = check_pool_files(manager.pool_dir)
    assert counts["free"] + counts["cached"] == NUM_BLOCKS


@pytest.mark.parametrize("ending", [signal.SIGCONT, signal.SIGKILL])
async def test_a_hung_decoders_blocks_are_set_aside_until_it_speaks_or_is_dead(
    processes: Processes, model: Path, ending: signal.Signals
) -> None:
    manager = processes.start_manager(*SHORT_TTL, num_blocks=80)
    hung = processes.start_decoder(manager, *FLAGS, model=model, worker_id="hung", hold_at=150)
    other = processes.start_decoder(manager, *FLAGS, model=model, worker_id="other")
    requests = [token_request([7, index], 100, seed=index) for index in range(6)]
    crowd = [token_request([8, index], 60) for index in range(12)]
    expected = await _undisturbed(other, [*requests, *crowd])
    pace = Pace()
    async with DecoderClient([hung.address]) as client, DecoderClient([other.address]) as other_client:
        running = [asyncio.create_task(follow(client, request)) for request in requests]
        await asyncio.to_thread(hung.wait_held)
        hung.process.send_signal(signal.SIGSTOP)
        hung.go_on()  # as soon as it can
        until(lambda: _state(manager, "hung") == "revoked", "the hung decoder's session is revoked")
        held = _blocks_of(manager, "hung")
        assert manager.stats().quarantined == len(held) > 0

        # More than the rest of the pool holds at once: whatever gives way, it is not what the hung one holds.
        asked = [asyncio.create_task(follow(other_client, request, pace=pace)) for request in crowd]
        for num_tokens in range(0, 300, 30):
            await pace.reach(num_tokens)
            assert not held & _blocks_of(manager, "other")
            assert held == _blocks_of(manager, "hung")
            # And the other one's, where a busy machine kept it silent for too long.
            assert manager.stats().quarantined >= len(held)
        crowded = await asyncio.gather(*asked)

        hung.process.send_signal(ending)
        if ending == signal.SIGKILL:
            until(lambda: _state(manager, "hung") == "", "the blocks of the dead are back")
            hung.kill()
            again = await _start_decoder_again(processes, manager, model, hung)
        streams = await asyncio.gather(*running)
    assert [stream.token_ids for stream in (*streams, *crowded)] == expected
    if ending == signal.SIGCONT:
        until(lambda: _state(manager, "hung") == "live", "the decoder is back in a session")
    else:
        assert again.terminate() == 0
    manager.wait_all_free()
    _scrub(manager)


def _state(manager: Manager, worker_id: str) -> str:
    return next((session.state for session in _leases(manager, worker_id).sessions), "")
