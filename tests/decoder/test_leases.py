"""The decoder's session with a real manager in a process of its own: leases, restarts, revocations and refusals."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from protos import kv_manager_pb2 as pb
from protos.rich_status import error_info
from services.decoder.errors import ConfigError, ManagerUnavailableError, NeverFitsError, PoolExhaustedError
from services.decoder.leases import AcquireAsk, KvGeometry
from tests.decoder.engine_fakes import DEADLINE_S, expected_tokens, make_request, poll
from tests.decoder.leasing import Decoder, StartManager, assert_all_free, managers_in, served, stats, until


@pytest.fixture
def start_manager(tmp_path: Path) -> Iterator[StartManager]:
    with managers_in(tmp_path / "pool") as start:
        yield start


def open_files() -> list[str]:
    """Where the descriptors and the mappings of this process lead."""
    paths = Path("/proc/self/maps").read_text().splitlines()
    for entry in os.scandir("/proc/self/fd"):
        with suppress(OSError):  # closed meanwhile
            paths.append(os.readlink(entry.path))
    return paths


async def test_requests_run_in_leased_blocks_and_all_come_back(start_manager: StartManager) -> None:
    manager = start_manager("--num-blocks", "128")
    requests = [make_request(f"r{i}", 7 * i + 1, 40) for i in range(12)]
    async with Decoder(manager.address) as decoder:
        for outcome, request in zip(await decoder.run(*requests), requests, strict=True):
            assert outcome.tokens == expected_tokens(request)
            assert outcome.admitted[0].age_ticket is not None
        await assert_all_free(manager)
        counts = await stats(manager)
        assert counts.num_acquired == counts.num_released == 12
        assert counts.num_extended > 0


async def test_asks_of_many_sequences_travel_in_one_call(start_manager: StartManager) -> None:
    manager = start_manager("--num-blocks", "256")
    async with Decoder(manager.address) as decoder:
        calls: list[int] = []
        acquire = decoder.client.acquire

        async def counted(request: pb.AcquireRequest) -> pb.AcquireResponse:
            calls.append(len(request.items))
            return await acquire(request)

        decoder.client.acquire = counted  # type: ignore[method-assign]
        decoder.model.gate.clear()
        decoder.submit(make_request("first", 3, 30))
        await asyncio.to_thread(decoder.model.is_stepping.wait, DEADLINE_S)
        decoder.submit(*(make_request(f"r{i}", 3, 3) for i in range(7)))
        decoder.model.gate.set()
        poll(lambda: num_acquires_that_wait(decoder) == 7)  # this thread is the loop's, which is held up so long
        for i in range(7):
            await decoder.outcome(f"r{i}")
        assert calls == [1, 7]


def num_acquires_that_wait(decoder: Decoder) -> int:
    """What the engine has asked for and the loop has not seen yet."""
    return sum(isinstance(ask, AcquireAsk) for ask in list(decoder.leases._outbox._arrived))


async def test_stop_gives_every_lease_back_before_it_returns(start_manager: StartManager) -> None:
    manager = start_manager("--num-blocks", "128")
    async with Decoder(manager.address) as decoder:
        decoder.submit(*(make_request(f"r{i}", 20, 400) for i in range(4)))
        for i in range(4):
            await decoder.until_tokens(f"r{i}", 5)
        await decoder.stop()
        counts = await stats(manager)
        assert (counts.free + counts.cached, counts.num_leases) == (128, 0)


async def test_a_full_pool_is_resource_exhausted_with_the_managers_details(start_manager: StartManager) -> None:
    manager = start_manager("--num-blocks", "4")
    long = make_request("long", 60, 3)
    async with Decoder(manager.address, "w1") as holder, Decoder(manager.address, "w2") as decoder:
        holder.model.gate.clear()
        holder.submit(long)
        await asyncio.to_thread(holder.model.is_stepping.wait, DEADLINE_S)
        [outcome] = await decoder.run(make_request("blocked", 20, 3))
        assert isinstance(outcome.error, PoolExhaustedError)
        info = error_info(outcome.error.status)
        assert info.reason == "POOL_EXHAUSTED"
        assert info.metadata["needed_blocks"] == "2"
        [outcome] = await decoder.run(make_request("never", 100, 3))
        assert isinstance(outcome.error, NeverFitsError)
        holder.model.gate.set()
        assert (await holder.outcome("long")).tokens == expected_tokens(long)
        await assert_all_free(manager)


async def test_growth_that_the_pool_cannot_give_fails_the_request_only(start_manager: StartManager) -> None:
    manager = start_manager("--num-blocks", "4")
    request = make_request("grows", 30, 100)
    async with Decoder(manager.address) as decoder:
        [outcome] = await decoder.run(request)
        # Four blocks hold 64 tokens: 30 of the prompt, 34 generated; one more is sampled from them.
        assert outcome.tokens == expected_tokens(request)[:35]
        assert isinstance(outcome.error, NeverFitsError)  # five blocks are more than the pool will ever have
        await assert_all_free(manager)


@pytest.mark.parametrize("is_graceful", [False, True])
async def test_streams_go_on_through_a_manager_restart(start_manager: StartManager, is_graceful: bool) -> None:
    manager = start_manager("--num-blocks", "256")
    requests = [make_request(f"r{i}", 10 + i, 300) for i in range(6)]
    async with Decoder(manager.address) as decoder:
        decoder.model.hold_at = 30
        decoder.submit(*requests)
        await asyncio.to_thread(decoder.model.until_held)
        if is_graceful:
            manager.send(signal.SIGTERM)
        else:
            manager.kill()
        decoder.model.gate.set()
        await asyncio.to_thread(poll, lambda: decoder.harness.engine._away)
        [away] = await decoder.run(make_request("away"))
        assert isinstance(away.error, ManagerUnavailableError)
        await asyncio.to_thread(manager.start)
        for request in requests:
            assert (await decoder.outcome(request.request_id)).tokens == expected_tokens(request)
        await asyncio.to_thread(poll, lambda: not decoder.harness.engine._away)
        [fresh] = await decoder.run(make_request("fresh"))
        assert fresh.tokens == expected_tokens(make_request("fresh"))
        await assert_all_free(manager)


async def test_a_pool_that_is_gone_is_mapped_anew_and_no_token_changes(start_manager: StartManager) -> None:
    manager = start_manager("--num-blocks", "256")
    requests = [make_request(f"r{i}", 10 + i, 300) for i in range(4)]
    async with Decoder(manager.address) as decoder:
        decoder.model.hold_at = 30
        decoder.submit(*requests)
        await asyncio.to_thread(decoder.model.until_held)
        manager.kill()
        decoder.model.gate.set()
        shutil.rmtree(manager.pool_dir)
        await asyncio.to_thread(manager.start)
        for request in requests:
            outcome = await decoder.outcome(request.request_id)
            assert outcome.tokens == expected_tokens(request)
            assert len(outcome.admitted) == 1
        await assert_all_free(manager)
        # The old file's space is free again, too.
        await asyncio.to_thread(poll, lambda: not [path for path in open_files() if path.endswith(".kv (deleted)")])


async def test_a_manager_that_comes_later_is_found(start_manager: StartManager) -> None:
    manager = start_manager("--num-blocks", "64")
    manager.send(signal.SIGTERM)
    async with Decoder(manager.address) as decoder:
        [away] = await decoder.run(make_request("away"))
        assert isinstance(away.error, ManagerUnavailableError)
        await asyncio.to_thread(manager.start)

        async def registered() -> bool:
            return (await stats(manager)).num_sessions == 1

        await until(registered)
        await until(lambda: served(decoder))


async def test_a_step_that_hangs_loses_its_leases_and_no_token_changes(start_manager: StartManager) -> None:
    manager = start_manager("--num-blocks", "64", "--ttl", "5")
    request = make_request("hangs", 20, 60)
    async with Decoder(manager.address) as decoder:
        decoder.model.hold_at = 6
        decoder.submit(request)
        await asyncio.to_thread(decoder.model.until_held)
        decoder.busy_factor = 10_000

        async def revoked() -> bool:
            counts = await stats(manager)
            return counts.num_revoked == 1 and counts.quarantined > 0

        await until(revoked)
        counts = await stats(manager)
        assert counts.leased == counts.sealed == 0  # set aside, and none handed out
        assert counts.free + counts.cached + counts.quarantined == 64
        decoder.busy_factor = 1
        decoder.model.gate.set()
        assert (await decoder.outcome("hangs")).tokens == expected_tokens(request)
        await assert_all_free(manager)


async def test_a_long_step_below_the_hang_limit_keeps_its_session(start_manager: StartManager) -> None:
    manager = start_manager("--num-blocks", "64", "--ttl", "5", "--hang-limit", "3600")
    request = make_request("long step", 20, 60)
    async with Decoder(manager.address) as decoder:
        decoder.model.hold_at = 6
        decoder.submit(request)
        await asyncio.to_thread(decoder.model.until_held)
        decoder.busy_factor = 10

        async def busy() -> bool:
            sessions = (await decoder.client.list_leases("w1")).sessions
            return sessions[0].busy_ms > 12_500  # more than twice the TTL

        await until(busy)
        assert (await stats(manager)).num_revoked == 0
        decoder.model.gate.set()
        assert (await decoder.outcome("long step")).tokens == expected_tokens(request)


async def test_two_decoders_share_one_pool(start_manager: StartManager) -> None:
    manager = start_manager("--num-blocks", "128")
    requests = [make_request(f"r{i}", 10 + i, 60) for i in range(8)]
    async with Decoder(manager.address, "w1") as one, Decoder(manager.address, "w2") as two:
        outcomes = await asyncio.gather(one.run(*requests), two.run(*requests))
        for decoder_outcomes in outcomes:
            for outcome, request in zip(decoder_outcomes, requests, strict=True):
                assert outcome.tokens == expected_tokens(request)
        await assert_all_free(manager)


async def test_a_second_decoder_of_one_worker_id_is_refused_by_name(start_manager: StartManager) -> None:
    manager = start_manager("--num-blocks", "64")
    async with Decoder(manager.address, "w1") as first:
        with pytest.raises(ConfigError, match="--worker-id"):
            async with Decoder(manager.address, "w1"):
                pass
        assert await served(first)


async def test_another_geometry_is_refused_for_good(start_manager: StartManager) -> None:
    manager = start_manager("--num-blocks", "64")
    async with Decoder(manager.address, "w1"):
        other = Decoder(manager.address, "w2")
        bind = other.leases.bind

        def bind_other(geometry: KvGeometry, *rest: object) -> None:
            bind(KvGeometry(2, 3, 5, "f32", bytes(32)), *rest)  # type: ignore[arg-type]

        other.leases.bind = bind_other  # type: ignore[method-assign,assignment]
        with pytest.raises(ConfigError, match="refuses"):
            async with other:
                pass


async def test_a_decoder_that_starts_again_takes_its_worker_id_over(start_manager: StartManager) -> None:
    manager = start_manager("--num-blocks", "64")
    for _ in range(3):
        async with Decoder(manager.address, "w1") as decoder:
            assert await served(decoder)
    await assert_all_free(manager)
