"""Many streams at once: every probe has one right answer, so that a wrong one points at blocks of somebody else."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest

from clients.decoder import DecoderClient
from clients.probes import Probe, is_correct, make_probe
from tests.e2e.followed import Followed, Pace, follow, token_request
from tests.e2e.processes import Decoder, Manager, Processes
from tests.e2e.streams import chat

pytest.importorskip("mlx.core")

NUM_AT_ONCE = 32
FEWEST_TOKENS = 4  # that an answer has, and more


def _probes(rng: random.Random, num: int, tasks: Sequence[str] = ("recall", "recite")) -> list[Probe]:
    return [make_probe(rng.choice(tasks), rng) for _ in range(num)]


def _is_right(probe: Probe, stream: Followed) -> bool:
    """The whole answer, or a cancelled stream's front of it."""
    if stream.finished is None:
        return probe.answer.startswith(stream.text)
    return is_correct(probe, stream.text)


async def test_32_streams_that_join_and_leave_at_random_all_answer_right(processes: Processes) -> None:
    rng = random.Random(32)
    manager = processes.start_manager(num_blocks=512)
    decoder = processes.start_decoder(manager)
    probes = _probes(rng, 3 * NUM_AT_ONCE)
    places, pace = asyncio.Semaphore(NUM_AT_ONCE), Pace()
    async with DecoderClient(decoder.address) as client:

        async def ask(index: int) -> Followed:
            cancel_at = rng.randint(FEWEST_TOKENS, 12) if rng.random() < 0.2 else None
            start_at = rng.randint(0, FEWEST_TOKENS * index)  # which those before it reach in any case
            async with places:
                request = chat(probes[index].prompt)
                return await follow(client, request, pace=pace, start_at=start_at, cancel_at=cancel_at)

        streams = await asyncio.gather(*(ask(index) for index in range(len(probes))))
    wrong = [(p, s.text) for p, s in zip(probes, streams, strict=True) if not _is_right(p, s)]
    assert not wrong
    assert any(stream.finished is None for stream in streams)
    manager.wait_all_free()


async def _grow_while_decoding(manager: Manager, decoder: Decoder, num_more: int) -> None:
    rng = random.Random(num_more)
    probes, pace = _probes(rng, num_more, ("recall",)), Pace()
    async with DecoderClient(decoder.address) as client:
        alone = asyncio.create_task(follow(client, token_request([5, 6, 7], 120, seed=1), pace=pace))
        await pace.reach(5)
        crowd = await asyncio.gather(*(follow(client, chat(probe.prompt)) for probe in probes))
        first = await alone
        again = await follow(client, token_request([5, 6, 7], 120, seed=1))
    assert [(p, s.text) for p, s in zip(probes, crowd, strict=True) if not _is_right(p, s)] == []
    assert first.token_ids == again.token_ids
    manager.wait_all_free()


async def test_rows_s4_s9_a_batch_that_grows_past_16_and_past_32_while_one_decodes_goes_on_right(
    processes: Processes,
) -> None:
    manager = processes.start_manager(num_blocks=512)
    decoder = processes.start_decoder(manager)
    async with DecoderClient(decoder.address) as client:
        assert (await client.model_info()).max_seqs == 32, "row S9"
    for num_more in (17, 47):
        await _grow_while_decoding(manager, decoder, num_more)


async def test_row_s9_more_requests_than_max_seqs_wait_for_a_seat(processes: Processes) -> None:
    manager = processes.start_manager(num_blocks=512)
    decoder = processes.start_decoder(manager, "--max-seqs", "3", "--max-num-batched-tokens", "16", hold_at=2)
    probes, pace = _probes(random.Random(3), 12), Pace()
    async with DecoderClient(decoder.address) as client:
        asked = [asyncio.create_task(follow(client, chat(probe.prompt), pace=pace)) for probe in probes]
        await asyncio.to_thread(decoder.wait_held)
        most = manager.stats().num_leases
        assert most >= 1
        decoder.go_on()
        for num_tokens in range(1, 40, 3):
            await pace.reach(num_tokens)
            most = max(most, manager.stats().num_leases)
        streams = await asyncio.gather(*asked)
    assert [(p, s.text) for p, s in zip(probes, streams, strict=True) if not _is_right(p, s)] == []
    assert most <= 3
    manager.wait_all_free()
