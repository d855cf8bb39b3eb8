"""How far a sequence may run ahead of its seals, so that kill -9 costs at most 2 * block_size - 1 tokens, in prefill a step's more."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from clients.errors import DeadlineError, ErrorDetails
from protos import kv_manager_pb2 as pb
from services.decoder.block_hash import BlockHasher
from services.decoder.engine import EngineSettings
from services.decoder.errors import EngineFailedError
from services.decoder.leases import (
    BlockSealed,
    KvGeometry,
    LeaseGranted,
    LeaseMessage,
    ManagerAway,
    ManagerBack,
    SealRefused,
    SessionEnded,
)
from services.decoder.scheduler import Scheduler
from services.decoder.sequence import Sequence
from tests.decoder.engine_fakes import GEOMETRY, EngineHarness, PooledLeases, expected_tokens, make_request, poll
from tests.decoder.leasing import Decoder, StartManager, assert_all_free, managers_in

STEP = 8  # max_num_batched_tokens
MAX_TOKENS = 60


class Bench:
    """A scheduler without an engine, whose port grants every lease at once and answers seals when it is told to."""

    def __init__(self, block_size: int, can_seal: bool = True) -> None:
        self.block_size = block_size
        self.port = PooledLeases(512, block_size)
        self.port.hold_seals = True
        self.answers: list[Any] = []
        self.port.post = self.answers.append
        self.scheduler = Scheduler(EngineSettings(max_seqs=4, kv_capacity=256, max_num_batched_tokens=STEP), self.port)
        self.scheduler.set_pool(block_size, BlockHasher(GEOMETRY, "n", block_size) if can_seal else None)
        self.in_prefill: set[Sequence] = set()  # what they computed last was a part of their prompt

    def add(self, name: str, num_prompt: int) -> Sequence:
        """Queues a sequence, and steps until its prompt is computed, with every seal answered."""
        sequence = Sequence(make_request(name, num_prompt, MAX_TOKENS), len(name))
        self.scheduler.add(sequence)
        while not sequence.num_outputs:
            self.step()
            self.answer()
        return sequence

    def step(self) -> int:
        """One step in which every sequence that can draws token 1; the number of tokens in it."""
        chunks = self.scheduler.plan()
        for chunk in chunks:
            ends, sequence = chunk.reaches_end, chunk.sequence
            is_prefill = sequence.num_remaining > 1
            (self.in_prefill.add if is_prefill else self.in_prefill.discard)(sequence)
            self.scheduler.computed(chunk)
            if ends:
                sequence.append(1)
                if sequence.finish_reason() is not None:
                    self.scheduler.remove(sequence)
        self.hear()
        return sum(chunk.num_tokens for chunk in chunks)

    def step_until_held(self) -> None:
        """Steps until nothing more can run."""
        while self.step() or self.answers:
            pass

    def answer(self, most: int | None = None) -> None:
        """Seals are answered."""
        self.port.answer_seals(most)
        self.hear()

    def hear(self) -> None:
        while self.answers:
            answer = self.answers.pop(0)
            if isinstance(answer, LeaseGranted):
                self.scheduler.granted(answer)
            elif isinstance(answer, BlockSealed):
                self.scheduler.sealed(answer)

    def at_stake(self, sequence: Sequence) -> int:
        """What would be computed again after a crash: all that is known, but what is known to be sealed."""
        return len(sequence.token_ids) - sequence.num_sealed * self.block_size


@pytest.mark.parametrize("block_size", [2, 4, 16])
@pytest.mark.parametrize("num_prompt", [1, 7, 16, 33])
def test_a_decode_is_held_back_where_a_crash_would_cost_two_blocks(block_size: int, num_prompt: int) -> None:
    bench = Bench(block_size)
    sequence = bench.add("held", num_prompt)
    bench.step_until_held()
    assert bench.at_stake(sequence) == 2 * block_size - 1
    assert len(bench.port.held_seals) == 1
    bench.answer()
    bench.step_until_held()
    assert bench.at_stake(sequence) == 2 * block_size - 1


def test_a_seal_that_is_answered_within_a_block_holds_nobody_back() -> None:
    bench = Bench(16)
    sequence = bench.add("quick", 16)
    bench.step()  # the second token of a block; its seal is under way for the next 13
    for _ in range(2):
        for _ in range(13):
            assert bench.step() == 1
        bench.answer()
        for _ in range(3):
            assert bench.step() == 1
    assert sequence.num_outputs == 34


def test_who_waits_for_its_seal_holds_nobody_else_back() -> None:
    bench = Bench(4)
    held = bench.add("held", 5)
    bench.step_until_held()
    [asked] = bench.port.held_seals
    bench.port.held_seals.clear()
    other = bench.add("other", 5)
    while not bench.scheduler.plan():
        bench.answer()
    before = held.num_outputs
    for _ in range(20):
        bench.step()
        bench.answer()
    assert (other.num_outputs, held.num_outputs) == (21, before)
    bench.scheduler.sealed(BlockSealed(asked.cache_id, asked.block_index, asked.block_id, asked.block_id))
    bench.step()
    assert held.num_outputs == before + 1


@pytest.mark.parametrize("seed", range(20))
def test_at_no_step_is_more_at_stake_than_is_promised_and_everybody_comes_to_its_end(seed: int) -> None:
    rng = random.Random(seed)
    bench = Bench(rng.choice([4, 8, 16]))
    sequences = [Sequence(make_request(f"{seed} {i}", rng.randint(1, 70), rng.randint(1, 60)), i) for i in range(6)]
    for sequence in sequences:
        bench.scheduler.add(sequence)
    longest = 2 * bench.block_size - 1
    while any(sequence.finish_reason() is None for sequence in sequences):
        computed = bench.step()
        for sequence in sequences:
            if sequence.state.name == "RUNNING" and sequence.num_computed:
                known = min(len(sequence.token_ids), sequence.num_computed + 1)
                at_stake = known - sequence.num_sealed * bench.block_size
                assert at_stake <= longest + (STEP if sequence in bench.in_prefill else 0)
        if not computed or rng.random() < 0.3:
            bench.answer(rng.randint(1, 3))


def test_nobody_waits_for_seals_while_the_manager_is_away() -> None:
    bench = Bench(4)
    sequence = bench.add("away", 5)
    bench.step_until_held()
    bench.scheduler.answers_seals = False
    for _ in range(12):
        assert bench.step() == 1
    bench.scheduler.answers_seals = True
    assert bench.step() == 0
    bench.answer()
    assert bench.step() == 1
    assert bench.at_stake(sequence) <= 7


def test_nobody_waits_for_what_is_not_sealed() -> None:
    refused, unsealable = Bench(4), Bench(4, can_seal=False)
    sequence = refused.add("refused", 5)
    refused.step_until_held()
    refused.scheduler.seal_refused(SealRefused(sequence.cache_id, "as the test says"))
    unsealable.add("no hasher", 5)
    for _ in range(30):
        assert refused.step() == unsealable.step() == 1
    assert unsealable.port.log == [entry for entry in unsealable.port.log if entry[0] != "seal"]


def _leases() -> PooledLeases:
    leases = PooledLeases(256, 4)
    leases.can_seal = leases.hold_seals = True
    return leases


def test_the_engine_waits_without_turning_and_an_answer_wakes_it() -> None:
    leases = _leases()
    request = make_request("waits", 5, 40)
    with EngineHarness(leases) as harness:
        num_plans = num_messages = 0
        plan, handle = harness.engine._scheduler.plan, harness.engine._handle

        def counted_plan() -> Any:
            nonlocal num_plans
            num_plans += 1
            return plan()

        def counted_handle(message: Any) -> None:
            nonlocal num_messages
            num_messages += 1
            handle(message)

        harness.engine._scheduler.plan = counted_plan  # type: ignore[method-assign]
        harness.engine._handle = counted_handle  # type: ignore[method-assign]
        harness.engine.submit(request)
        for num_sealed in range(10):
            known = 7 + 4 * num_sealed
            harness.wait(lambda known=known: 5 + harness.num_tokens("waits") == known)  # type: ignore[misc]
            poll(lambda: leases.held_seals)
            leases.answer_seals(1)
        assert harness.outcome("waits").tokens == expected_tokens(request)
        # Each turn had something to do, or had heard something: a step, or a message.
        assert num_plans <= len(harness.model.batches) + num_messages + 1


@pytest.mark.parametrize("message", [ManagerAway("it was killed"), SessionEnded()])
def test_who_is_held_back_goes_on_when_the_manager_is_gone(message: LeaseMessage) -> None:
    leases = _leases()
    request = make_request("goes on", 5, 40)
    with EngineHarness(leases) as harness:
        harness.engine.submit(request)
        harness.wait(lambda: harness.num_tokens("goes on") == 2)
        harness.model.hold_at = 12
        harness.post(message)
        harness.model.until_held()
        harness.post(ManagerBack())
        harness.model.gate.set()
        poll(lambda: len(harness.model.batches) >= 13)
        leases.hold_seals = False
        leases.answer_seals()
        assert harness.outcome("goes on").tokens == expected_tokens(request)


def test_what_was_copied_from_the_leader_is_sealed_before_it_is_waited_for() -> None:
    leases = _leases()
    leases.hold_seals = False
    leases.refuse = lambda kind, cache_id: EngineFailedError("no") if (kind, cache_id) == ("seal", 1) else None
    first = make_request("samples", 18, 12)
    second = make_request("samples", 18, 12, sampling=first.sampling, sample_index=1)
    second = type(second)(**{**second.__dict__, "request_id": "second", "prompt_token_ids": first.prompt_token_ids})
    with EngineHarness(leases) as harness:
        harness.engine.submit(first, second)
        assert harness.outcome("samples").tokens == expected_tokens(first)
        assert harness.outcome("second").tokens == expected_tokens(second)
    [fork] = leases.forks
    # Nothing of the leader's could be shared: four blocks and a tail were copied, and sealed at once.
    assert [ask.block_index for ask in leases.seals if ask.cache_id == fork.cache_id] == list(range(7))


# With a real manager.

BLOCK = 16


@pytest.fixture
def start_manager(tmp_path: Path) -> Iterator[StartManager]:
    with managers_in(tmp_path / "pool") as start:
        yield start


def _at_stake(decoder: Decoder) -> list[int]:
    sequences = decoder.harness.engine._sequences.values()
    return [len(sequence.token_ids) - sequence.num_sealed * BLOCK for sequence in sequences]


async def test_a_manager_that_hangs_holds_streams_back_until_it_counts_as_away(start_manager: StartManager) -> None:
    manager = start_manager("--num-blocks", "256", "--ttl", "100")
    settings = EngineSettings(max_seqs=8, kv_capacity=512, max_num_batched_tokens=64, reserve_full=True)
    requests = [make_request(f"r{i}", 10 + 30 * i, 300) for i in range(4)]
    async with Decoder(manager.address, settings=settings) as decoder:
        patience = Patience(decoder)
        num_tokens = decoder.harness.num_tokens
        decoder.model.hold_when = lambda: all(
            num_tokens(request.request_id) >= 3 for request in requests
        )  # they decode
        decoder.submit(*requests)
        await asyncio.to_thread(decoder.model.until_held)
        assert manager.process is not None
        manager.process.send_signal(signal.SIGSTOP)
        decoder.model.gate.set()
        # Each comes to its bound, and none passes it: a kill -9 here would cost no stream more.
        await asyncio.to_thread(poll, lambda: _at_stake(decoder) == [2 * BLOCK - 1] * 4 and not _is_away(decoder))
        # The call that is not answered ends the session; then they go on in the blocks that they hold.
        patience.is_over.set()
        await decoder.until_tokens("r0", 200)
        assert _is_away(decoder)
        patience.is_over.clear()
        manager.process.send_signal(signal.SIGCONT)
        for request in requests:
            assert (await decoder.outcome(request.request_id)).tokens == expected_tokens(request)
        await assert_all_free(manager)


class Patience:
    """Has a decoder's seals meet their deadline when the test says so."""

    def __init__(self, decoder: Decoder) -> None:
        self.is_over = asyncio.Event()
        self._seal = decoder.client.seal
        decoder.client.seal = self._seal_in_time  # type: ignore[method-assign]

    async def _seal_in_time(self, request: pb.SealRequest) -> pb.SealResponse:
        answer, end = asyncio.ensure_future(self._seal(request)), asyncio.ensure_future(self.is_over.wait())
        try:
            await asyncio.wait({answer, end}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise DeadlineError(ErrorDetails(grpc.StatusCode.DEADLINE_EXCEEDED, "the test says so", "manager"))
            return answer.result()
        finally:
            answer.cancel()
            end.cancel()


def _is_away(decoder: Decoder) -> bool:
    return decoder.harness.engine._away is not None


async def test_streams_pass_their_bound_while_the_manager_is_down(start_manager: StartManager) -> None:
    manager = start_manager("--num-blocks", "256")
    settings = EngineSettings(max_seqs=8, kv_capacity=512, max_num_batched_tokens=64, reserve_full=True)
    requests = [make_request(f"r{i}", 10 + i, 400) for i in range(6)]
    async with Decoder(manager.address, settings=settings) as decoder:
        decoder.model.hold_at = 30
        decoder.submit(*requests)
        await asyncio.to_thread(decoder.model.until_held)
        manager.kill()
        decoder.model.gate.set()
        for request in requests:
            await decoder.until_tokens(request.request_id, 30 + 10 * BLOCK)
        await asyncio.to_thread(manager.start)
        for request in requests:
            assert (await decoder.outcome(request.request_id)).tokens == expected_tokens(request)
        await assert_all_free(manager)


async def test_a_session_that_is_opened_anew_says_so_to_the_engine(start_manager: StartManager) -> None:
    manager = start_manager("--num-blocks", "64", "--ttl", "5")
    request = make_request("hangs", 20, 60)
    heard: list[type] = []
    decoder = Decoder(manager.address)
    bind = decoder.leases.bind

    def bind_watched(geometry: KvGeometry, post: Any, busy_ms: Any) -> None:
        def watched(message: LeaseMessage) -> None:
            heard.append(type(message))
            post(message)

        bind(geometry, watched, busy_ms)

    decoder.leases.bind = bind_watched  # type: ignore[method-assign]
    async with decoder:
        decoder.model.hold_at = 6
        decoder.submit(request)
        await asyncio.to_thread(decoder.model.until_held)
        decoder.busy_factor = 10_000  # longer than the hang limit
        await asyncio.to_thread(poll, lambda: SessionEnded in heard)
        decoder.busy_factor = 1
        decoder.model.gate.set()
        assert (await decoder.outcome("hangs")).tokens == expected_tokens(request)
        assert heard.index(ManagerBack) > heard.index(SessionEnded)
