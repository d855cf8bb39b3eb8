"""Samples that fork their leader's lease at a real manager: shared blocks, copied tails, a full pool, recovery, duplicates."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services.decoder.engine import EngineSettings
from services.decoder.request import DecodeRequest, sample_id
from tests.decoder.engine_fakes import expected_tokens, make_request, poll
from tests.decoder.leasing import Decoder, StartManager, assert_all_free, managers_in, stats

BLOCK = 16
NUM_BLOCKS = 128


@pytest.fixture
def start_manager(tmp_path: Path) -> Iterator[StartManager]:
    with managers_in(tmp_path / "pool") as start:
        yield start


def samples_of(name: str, num: int, num_prompt: int, max_tokens: int, **changes: Any) -> list[DecodeRequest]:
    """All samples of one request."""
    first = make_request(name, num_prompt, max_tokens, **changes)
    return [replace(first, request_id=sample_id(name, index), sample_index=index) for index in range(num)]


async def check(decoder: Decoder, requests: list[DecodeRequest]) -> None:
    """Every sample that was submitted is exact."""
    for request in requests:
        outcome = await decoder.outcome(request.request_id)
        assert outcome.tokens == expected_tokens(request), outcome.last


async def test_samples_share_the_prompts_blocks(start_manager: StartManager) -> None:
    manager = start_manager("--num-blocks", str(NUM_BLOCKS))
    requests = samples_of("many", 8, 5 * BLOCK + 7, 40)
    async with Decoder(manager.address) as decoder:
        decoder.harness.engine.submit(*requests)
        await check(decoder, requests)
        computed = sum(tokens for _, tokens in decoder.model.batches)
        assert computed == 5 * BLOCK + 7 + 7 + 8 * 39
        for request in requests[1:]:
            assert decoder.harness.outcomes[request.request_id].finished.num_cached_tokens == 5 * BLOCK + 6
        await assert_all_free(manager)
        counts = await stats(manager)
        assert counts.free + counts.cached == NUM_BLOCKS
        # The prompt's blocks once, and two of each sample's own.
        assert counts.cached == 5 + 8 * 2
        assert counts.num_deduplicated == 0


async def test_samples_that_draw_the_same_tokens_end_up_in_the_same_blocks(start_manager: StartManager) -> None:
    manager = start_manager("--num-blocks", str(NUM_BLOCKS))
    requests = [replace(request, sample_index=0) for request in samples_of("greedy", 4, 3 * BLOCK + 1, 60)]
    async with Decoder(manager.address) as decoder:
        decoder.harness.engine.submit(*requests)
        await check(decoder, requests)
        await assert_all_free(manager)
        assert (await stats(manager)).cached == (3 * BLOCK + 60) // BLOCK


@pytest.mark.parametrize("num_blocks", [10, 14, 20])
async def test_a_full_pool_makes_samples_wait_and_changes_none(start_manager: StartManager, num_blocks: int) -> None:
    manager = start_manager("--num-blocks", str(num_blocks))
    requests = samples_of("crowded", 6, 3 * BLOCK + 5, 70)  # 3 blocks in common, and 5 of each sample's own
    async with Decoder(manager.address) as decoder:
        decoder.harness.engine.submit(*requests)
        await check(decoder, requests)
        await assert_all_free(manager)
        counts = await stats(manager)
        assert counts.free + counts.cached == num_blocks
        assert counts.num_exhausted > 0


async def test_two_crowds_in_a_full_pool(start_manager: StartManager) -> None:
    manager = start_manager("--num-blocks", "24")
    crowds = [samples_of(f"crowd {i}", 4, 2 * BLOCK + i, 90) for i in range(3)]
    settings = EngineSettings(max_seqs=6, kv_capacity=256, max_num_batched_tokens=64)
    async with Decoder(manager.address, settings=settings) as decoder:
        for crowd in crowds:
            decoder.harness.engine.submit(*crowd)
        for crowd in crowds:
            await check(decoder, crowd)
        await assert_all_free(manager)


@pytest.mark.parametrize("step", [1, 3, 4])
async def test_a_manager_that_dies_while_samples_fork_breaks_none(start_manager: StartManager, step: int) -> None:
    manager = start_manager("--num-blocks", str(NUM_BLOCKS))
    settings = EngineSettings(max_seqs=8, kv_capacity=512, max_num_batched_tokens=32)
    requests = samples_of("orphans", 5, 5 * BLOCK + 7, 60)
    async with Decoder(manager.address, settings=settings) as decoder:
        decoder.model.hold_at = step
        decoder.harness.engine.submit(*requests)
        await asyncio.to_thread(decoder.model.until_held)
        manager.kill()
        decoder.model.gate.set()
        await asyncio.to_thread(poll, lambda: decoder.harness.engine._away)
        await asyncio.to_thread(manager.start)
        await check(decoder, requests)
        await assert_all_free(manager)
        counts = await stats(manager)
        assert counts.free + counts.cached == NUM_BLOCKS


async def test_aborting_them_all_at_any_time_gives_everything_back(start_manager: StartManager) -> None:
    manager = start_manager("--num-blocks", str(NUM_BLOCKS))
    settings = EngineSettings(max_seqs=8, kv_capacity=512, max_num_batched_tokens=32)
    async with Decoder(manager.address, settings=settings) as decoder:
        for step in range(8):
            requests = samples_of(f"aborted {step}", 5, 3 * BLOCK + 7, 300)
            decoder.model.hold_at = len(decoder.model.batches) + step
            decoder.harness.engine.submit(*requests)
            await asyncio.to_thread(decoder.model.until_held)
            for request in requests:
                assert decoder.harness.engine.abort(request.request_id)
            decoder.model.gate.set()
            for request in requests:
                await decoder.outcome(request.request_id)
        await assert_all_free(manager)
        counts = await stats(manager)
        assert counts.free + counts.cached == NUM_BLOCKS


async def test_reserved_in_full_samples_run_one_after_another_where_only_one_fits(start_manager: StartManager) -> None:
    manager = start_manager("--num-blocks", "9")
    settings = EngineSettings(max_seqs=4, kv_capacity=8 * BLOCK, max_num_batched_tokens=64, reserve_full=True)
    requests = samples_of("reserved", 3, 2 * BLOCK + 5, 20)
    async with Decoder(manager.address, settings=settings) as decoder:
        decoder.harness.engine.submit(*requests)
        await check(decoder, requests)
        await assert_all_free(manager)
