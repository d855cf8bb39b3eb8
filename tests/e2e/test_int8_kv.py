"""The demo model with `--kv-dtype int8`, through real processes: crashes, prefixes, damage, and who may join the pool."""

from __future__ import annotations

import asyncio
import random

import grpc
import pytest

pytest.importorskip("mlx.core")

from clients.decoder import DecoderClient
from clients.events import Finished, Tokens
from protos import decoder_pb2 as pb
from protos import kv_manager_pb2, kv_manager_pb2_grpc
from services.decoder.kv_view import PagedKv
from services.decoder.ops.native import why_unavailable
from tests.e2e.followed import Followed, follow, token_request
from tests.e2e.pool_files import check_pool_files
from tests.e2e.processes import DEADLINE_S, Decoder, Manager, Processes

NUM_STREAMS = 8
NUM_TOKENS = 90
NUM_BLOCKS = 512
INT8 = ("--kv-dtype", "int8", "--max-num-batched-tokens", "64")
CACHED = 3  # of a block's states
NATIVE = pytest.param("native", "nhd", marks=pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable()))
BACKENDS = [NATIVE, pytest.param("mlx", "hnd", marks=pytest.mark.slow)]


def _requests() -> list[pb.GenerateRequest]:
    """Half of them greedy, half sampled with a seed; some prompts are longer than a chunk."""
    rng = random.Random(20)
    prompts = [[rng.randrange(3, 200) for _ in range(rng.choice([5, 30, 150]))] for _ in range(NUM_STREAMS)]
    return [
        token_request(prompt, NUM_TOKENS, seed=index if index % 2 else None) for index, prompt in enumerate(prompts)
    ]


async def _follow_all(client: DecoderClient, tenant: str = "") -> list[Followed]:
    return await asyncio.gather(*(follow(client, request, tenant=tenant) for request in _requests()))


def _scrub(manager: Manager) -> kv_manager_pb2.ScrubProgress:
    with grpc.insecure_channel(manager.address) as channel:
        *_, last = kv_manager_pb2_grpc.KVManagerStub(channel).Scrub(kv_manager_pb2.ScrubRequest(), timeout=60.0)
    assert last.done
    return last


@pytest.mark.parametrize(("backend", "layout"), BACKENDS)
async def test_s20_int8_streams_go_on_token_exact_after_a_kill_and_find_their_prefixes(
    processes: Processes, backend: str, layout: str
) -> None:
    flags = (*INT8, "--kv-layout", layout)
    manager = processes.start_manager(num_blocks=NUM_BLOCKS)
    hold_at = NUM_STREAMS * NUM_TOKENS * 3 // 2  # the undisturbed ones, and half of the others
    decoder = processes.start_decoder(manager, *flags, backend=backend, worker_id="one", hold_at=hold_at)

    def start_again(last: Decoder) -> Decoder:
        return processes.start_decoder(manager, *flags, backend=backend, worker_id="one", listen=last.address)

    async with DecoderClient(decoder.address) as client:
        expected = [stream.token_ids for stream in await _follow_all(client, tenant="undisturbed")]
        running = asyncio.create_task(_follow_all(client))
        await asyncio.to_thread(decoder.wait_held)
        await asyncio.to_thread(decoder.kill)
        decoder = await asyncio.to_thread(start_again, decoder)
        streams = await running
        assert [stream.token_ids for stream in streams] == expected
        resumed = [stream for stream in streams if stream.resumed]
        assert resumed
        assert all(event.exact for stream in resumed for event in stream.resumed)
        again = await _follow_all(client)
    assert [stream.token_ids for stream in again] == expected
    for stream, request in zip(again, _requests(), strict=True):
        assert stream.finished is not None
        assert stream.finished.num_cached_tokens == (len(request.token_ids.ids) - 1) // 16 * 16
    manager.wait_all_free()
    assert _scrub(manager).num_corrupt == 0
    assert decoder.terminate() == 0
    assert manager.terminate() == 0
    assert check_pool_files(manager.pool_dir)["cached"] > 0


@pytest.mark.parametrize(("backend", "layout"), BACKENDS)
async def test_samples_copy_the_tail_of_their_prompt_with_its_scales(
    processes: Processes, backend: str, layout: str
) -> None:
    """Greedy ones, so that all of them are what the request is alone."""
    manager = processes.start_manager(num_blocks=NUM_BLOCKS)
    decoder = processes.start_decoder(manager, *INT8, "--kv-layout", layout, backend=backend)
    request = token_request(list(range(3, 40)), NUM_TOKENS)
    samples: dict[int, list[int]] = {}
    async with DecoderClient(decoder.address) as client:
        alone = await follow(client, request, tenant="alone")
        request.n = 3
        async for event in client.generate(request):
            match event:
                case Tokens():
                    samples.setdefault(event.sample_index, []).extend(event.token_ids)
                case Finished() if event.sample_index:
                    assert event.num_cached_tokens == len(request.token_ids.ids) - 1, "forked, not computed again"
    assert samples == dict.fromkeys(range(3), alone.token_ids)
    manager.wait_all_free()


async def test_a_scale_that_changed_in_the_file_is_found_by_the_checksum(processes: Processes) -> None:
    manager = processes.start_manager(num_blocks=NUM_BLOCKS)
    decoder = processes.start_decoder(manager, *INT8)
    async with DecoderClient(decoder.address) as client:
        await follow(client, token_request(list(range(3, 60)), 20))
    manager.wait_all_free()
    assert _scrub(manager).num_corrupt == 0
    with grpc.insecure_channel(manager.address) as channel:
        ask = kv_manager_pb2.ListLeasesRequest(with_block_states=True)
        states = kv_manager_pb2_grpc.KVManagerStub(channel).ListLeases(ask, timeout=DEADLINE_S).block_states
    kv = PagedKv(next(manager.pool_dir.glob("*.kv")), "int8")
    kv.scales(states.index(CACHED))[-1, 1, -1, -1] *= 1.5
    kv.close()
    assert _scrub(manager).num_corrupt == 1


async def test_a_decoder_with_another_dtype_or_layout_is_refused_by_name(processes: Processes) -> None:
    manager = processes.start_manager(num_blocks=NUM_BLOCKS)
    processes.start_decoder(manager, *INT8, "--kv-layout", "nhd", worker_id="one")
    for flags, named in (
        (("--kv-dtype", "f32", "--kv-layout", "nhd"), "kv_dtype: pool int8, worker f32"),
        (("--kv-dtype", "int8"), "layout: pool nhd, worker hnd"),
    ):
        refused = processes.start_decoder(manager, *flags, worker_id="other", wait=False)
        assert refused.wait_exit() == 2
        assert named in refused.log()
        assert "start the decoder with --kv-dtype int8 --kv-layout nhd as the pool has it" in refused.log()
        assert not refused.has_traceback()
