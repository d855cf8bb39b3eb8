"""Blocks that outlive their request, their decoder and their manager: sealing, hits, duplicates, giving way, recovery."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from protos import kv_manager_pb2 as pb
from services.decoder.engine import EngineSettings
from services.decoder.errors import PoolExhaustedError
from services.decoder.request import DecodeRequest
from tests.decoder.engine_fakes import DEADLINE_S, expected_tokens, make_request, poll
from tests.decoder.leasing import Decoder, StartManager, assert_all_free, managers_in, stats

BLOCK = 16


@pytest.fixture
def start_manager(tmp_path: Path) -> Iterator[StartManager]:
    with managers_in(tmp_path / "pool") as start:
        yield start


def again(request: DecodeRequest, name: str) -> DecodeRequest:
    """The same request under another id."""
    return replace(request, request_id=name)


def damage(pool: pb.PoolInfo) -> None:
    """Overwrites every block."""
    with open(pool.kv_path, "r+b") as file:
        os.pwrite(file.fileno(), bytes([66]) * pool.block_stride_bytes * pool.num_blocks, pool.data_offset_bytes)


async def crash(decoder: Decoder) -> None:
    """What is left of a decoder after kill -9: no release, no word, and a lock that the kernel drops."""
    decoder.model.gate.set()
    decoder.leases._put = lambda ask: None  # type: ignore[method-assign]
    await asyncio.to_thread(decoder.harness.engine.stop, 0.0)
    await decoder.leases.close()


@pytest.mark.parametrize("max_inline_bytes", [0, 2 << 20])
async def test_a_repeated_prompt_hits_every_full_block_before_its_last_token(
    start_manager: StartManager, monkeypatch: pytest.MonkeyPatch, max_inline_bytes: int
) -> None:
    # Whether checksums are computed on the event loop or on another thread is all the same.
    monkeypatch.setattr("services.decoder.lease_calls._MAX_INLINE_BYTES", max_inline_bytes)
    manager = start_manager("--num-blocks", "128")
    request = make_request("first", 20 * BLOCK, 5)
    async with Decoder(manager.address) as decoder:
        [first] = await decoder.run(request)
        assert first.admitted[0].num_cached_tokens == 0
        [second] = await decoder.run(again(request, "second"))
        assert second.admitted[0].num_cached_tokens == 19 * BLOCK  # the last token's block is computed
        assert second.finished.num_cached_tokens == 19 * BLOCK
        assert first.tokens == second.tokens == expected_tokens(request)
        await assert_all_free(manager)
        counts = await stats(manager)
        assert counts.free + counts.cached == 128
        assert counts.num_hits == 19


async def test_a_second_decoder_hits_the_first_ones_prefixes(start_manager: StartManager) -> None:
    manager = start_manager("--num-blocks", "128")
    request = make_request("shared", 10 * BLOCK + 3, 20)
    async with Decoder(manager.address, "w1") as one, Decoder(manager.address, "w2") as two:
        [first] = await one.run(request)
        [second] = await two.run(request)
        assert second.admitted[0].num_cached_tokens == 10 * BLOCK
        assert first.tokens == second.tokens == expected_tokens(request)
        await assert_all_free(manager)


async def test_a_conversation_hits_its_own_answers(start_manager: StartManager) -> None:
    manager = start_manager("--num-blocks", "128")
    request = make_request("turn 1", 30, 50)
    async with Decoder(manager.address) as decoder:
        [first] = await decoder.run(request)
        prompt = [*request.prompt_token_ids, *first.tokens, 1, 2, 3]
        turn = replace(request, request_id="turn 2", prompt_token_ids=prompt, max_tokens=10)
        [second] = await decoder.run(turn)
        # 79 of the 80 tokens of the first turn have K/V: the last one was only sampled.
        assert second.admitted[0].num_cached_tokens == 4 * BLOCK
        assert second.tokens == expected_tokens(turn)


async def test_tenants_do_not_share_blocks(start_manager: StartManager) -> None:
    manager = start_manager("--num-blocks", "128")
    request = make_request("secret", 5 * BLOCK, 3)
    async with Decoder(manager.address) as decoder:
        await decoder.run(replace(request, tenant="alice"))
        [other] = await decoder.run(replace(request, request_id="bob", tenant="bob"))
        assert other.admitted[0].num_cached_tokens == 0
        [own] = await decoder.run(replace(request, request_id="alice again", tenant="alice"))
        assert own.admitted[0].num_cached_tokens == 4 * BLOCK


async def test_twins_that_run_together_end_up_in_the_same_blocks(start_manager: StartManager) -> None:
    manager = start_manager("--num-blocks", "128")
    request = make_request("twin", 6 * BLOCK, 60)
    twins = [again(request, f"twin {i}") for i in range(4)]
    async with Decoder(manager.address) as decoder:
        decoder.model.gate.clear()
        decoder.submit(make_request("holds the step", 3, 3))
        await asyncio.to_thread(decoder.model.is_stepping.wait, DEADLINE_S)
        decoder.submit(*twins)
        decoder.model.gate.set()
        for twin in twins:
            assert (await decoder.outcome(twin.request_id)).tokens == expected_tokens(request)
        await assert_all_free(manager)
        counts = await stats(manager)
        assert counts.num_deduplicated > 0
        assert counts.free + counts.cached == 128
        assert counts.cached == 9  # 155 tokens of one content


async def test_sealed_blocks_still_hit_after_a_manager_crash(start_manager: StartManager) -> None:
    manager = start_manager("--num-blocks", "128")
    request = make_request("before", 10 * BLOCK + 1, 10)
    async with Decoder(manager.address) as decoder:
        await decoder.run(request)
        await assert_all_free(manager)
        manager.kill()
        await asyncio.to_thread(poll, lambda: decoder.harness.engine._away)
        await asyncio.to_thread(manager.start)
        await asyncio.to_thread(poll, lambda: not decoder.harness.engine._away)
        [after] = await decoder.run(again(request, "after"))
        assert after.admitted[0].num_cached_tokens == 10 * BLOCK
        assert after.tokens == expected_tokens(request)


async def test_a_crashed_decoders_streams_go_on_and_recompute_less_than_two_blocks(
    start_manager: StartManager,
) -> None:
    manager = start_manager("--num-blocks", "256")
    requests = [make_request(f"r{i}", 20 + 5 * i, 200) for i in range(6)]
    first = Decoder(manager.address)
    async with first:
        first.model.hold_at = 70
        first.submit(*requests)
        await asyncio.to_thread(first.model.until_held)
        await crash(first)
    had = {request.request_id: first.harness.outcomes[request.request_id] for request in requests}
    async with Decoder(manager.address) as second:
        for request in requests:
            before = had[request.request_id]
            resumed = replace(request, output_token_ids=tuple(before.tokens), age_ticket=before.admitted[0].age_ticket)
            [after] = await second.run(resumed)
            assert before.tokens + after.tokens == expected_tokens(request)
            num_known = len(request.prompt_token_ids) + len(before.tokens)
            assert num_known - after.admitted[0].num_cached_tokens <= 2 * BLOCK - 1
        await assert_all_free(manager)


async def test_the_youngest_gives_way_and_every_stream_is_exact(start_manager: StartManager) -> None:
    manager = start_manager("--num-blocks", "24")  # four streams of 200 tokens want 52
    requests = [make_request(f"r{i}", 40 + i, 160) for i in range(4)]
    async with Decoder(manager.address) as decoder:
        for outcome, request in zip(await decoder.run(*requests), requests, strict=True):
            assert outcome.tokens == expected_tokens(request)
            assert len(outcome.admitted) == 1
        await assert_all_free(manager)
        counts = await stats(manager)
        assert counts.num_acquired > 4  # somebody gave way, and came back


async def test_a_better_priority_makes_others_give_way(start_manager: StartManager) -> None:
    manager = start_manager("--num-blocks", "16")
    slow = [make_request(f"slow {i}", 90, 150) for i in range(2)]
    async with Decoder(manager.address) as decoder:
        decoder.model.hold_at = 6
        decoder.submit(*slow)
        await asyncio.to_thread(decoder.model.until_held)
        urgent = make_request("urgent", 60, 5, priority=5)
        decoder.submit(urgent)
        decoder.model.gate.set()
        outcome = await decoder.outcome("urgent")
        assert outcome.tokens == expected_tokens(urgent)
        for request in slow:
            assert (await decoder.outcome(request.request_id)).tokens == expected_tokens(request)
        assert (await stats(manager)).num_preempted >= 1


async def test_a_new_arrival_does_not_displace_anybody(start_manager: StartManager) -> None:
    manager = start_manager("--num-blocks", "4")
    running = make_request("running", 60, 3)
    async with Decoder(manager.address, "w1") as holder, Decoder(manager.address, "w2") as decoder:
        holder.model.gate.clear()
        holder.submit(running)
        await asyncio.to_thread(holder.model.is_stepping.wait, DEADLINE_S)
        [outcome] = await decoder.run(make_request("new", 20, 3))
        assert isinstance(outcome.error, PoolExhaustedError)
        holder.model.gate.set()
        assert (await holder.outcome("running")).tokens == expected_tokens(running)


async def test_damaged_bytes_are_never_served(start_manager: StartManager) -> None:
    manager = start_manager("--num-blocks", "64")
    request = make_request("precious", 6 * BLOCK + 1, 10)
    async with Decoder(manager.address) as decoder:
        await decoder.run(request)
        await assert_all_free(manager)
        pool = (await decoder.client.describe_pool()).pool
        manager.kill()
        damage(pool)
        await asyncio.to_thread(poll, lambda: decoder.harness.engine._away)
        await asyncio.to_thread(manager.start)
        await asyncio.to_thread(poll, lambda: not decoder.harness.engine._away)
        [after] = await decoder.run(again(request, "after"))
        assert after.admitted[0].num_cached_tokens == 0
        assert after.tokens == expected_tokens(request)


async def test_a_stream_within_its_bound_waits_for_no_seal_and_its_release_does(
    start_manager: StartManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.decoder.session.CLOSE_WAIT_S", 0.05)  # it would wait for the seal in vain
    manager = start_manager("--num-blocks", "64")
    request = make_request("unsealed", 20, 2 * BLOCK - 1 - 20)
    settings = EngineSettings(max_seqs=2, kv_capacity=512, max_num_batched_tokens=64, reserve_full=True)
    async with Decoder(manager.address, settings=settings) as decoder:
        never = asyncio.Event()

        async def hang(request: object) -> object:
            await never.wait()
            raise AssertionError("never")

        decoder.client.seal = hang  # type: ignore[method-assign,assignment]
        [outcome] = await decoder.run(request)
        assert outcome.tokens == expected_tokens(request)
        # Its release waits for the seals: they were asked for first.
        assert (await stats(manager)).num_leases == 1
