"""Who runs in a step, without an engine: plans are looked at one by one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from services.decoder.block_hash import BlockHasher
from services.decoder.engine_settings import EngineSettings
from services.decoder.errors import EngineFailedError, NeverFitsError
from services.decoder.leases import BlockSealed, LeaseGranted, LeaseRefused, SealRefused
from services.decoder.scheduler import LeaseError, Scheduler
from services.decoder.sequence import Chunk, Sequence, SequenceState
from tests.decoder.engine_fakes import GEOMETRY, PooledLeases, make_request

BLOCK = 4


class Bench:
    """A scheduler whose port's answers go straight into it."""

    def __init__(self, num_blocks: int = 64, **settings: Any) -> None:
        self.port = PooledLeases(num_blocks, BLOCK)
        self.answers: list[LeaseGranted | LeaseRefused | BlockSealed] = []
        self.port.post = self.answers.append  # type: ignore[assignment]
        limits = EngineSettings(max_seqs=4, kv_capacity=64, max_num_batched_tokens=8)
        self.scheduler = Scheduler(replace(limits, **settings), self.port)
        self.scheduler.set_pool(BLOCK)
        self.num_arrived = 0

    def add(self, name: str, num_prompt: int, max_tokens: int = 8, **changes: int) -> Sequence:
        sequence = Sequence(make_request(name, num_prompt, max_tokens, **changes), self.num_arrived)
        self.num_arrived += 1
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> list[tuple[str, int]]:
        """One step in which every sequence that can draws token 1."""
        chunks = self.scheduler.plan()
        self.hear()
        for chunk in chunks:
            self.compute(chunk)
        return [(chunk.sequence.request.request_id, chunk.num_tokens) for chunk in chunks]

    def compute(self, chunk: Chunk) -> None:
        ends = chunk.reaches_end
        chunk.sequence.num_computed += chunk.num_tokens
        if ends:
            chunk.sequence.append(1)

    def hear(self) -> None:
        while self.answers:
            answer = self.answers.pop(0)
            if isinstance(answer, LeaseGranted):
                self.scheduler.granted(answer)
            elif isinstance(answer, BlockSealed):
                self.scheduler.sealed(answer)
            else:
                self.scheduler.refused(answer)


def test_decodes_go_first_and_prefills_share_what_is_left() -> None:
    bench = Bench()
    bench.add("short", 3)
    bench.step()
    assert bench.step() == [("short", 3)]
    bench.add("long", 20)
    bench.add("longer", 6)
    assert bench.step() == [("short", 1)]
    assert bench.step() == [("short", 1), ("long", 7)]
    assert bench.step() == [("short", 1), ("long", 7)]
    assert bench.step() == [("short", 1), ("long", 6), ("longer", 1)]
    assert bench.step() == [("short", 1), ("long", 1), ("longer", 5)]


def test_no_more_than_max_seqs_have_seats() -> None:
    bench = Bench(max_seqs=2)
    sequences = [bench.add(f"s{i}", 2) for i in range(3)]
    bench.step()
    assert [name for name, _ in bench.step()] == ["s0", "s1"]
    bench.scheduler.remove(sequences[0])
    bench.step()
    assert [name for name, _ in bench.step()] == ["s1", "s2"]


def test_growth_is_asked_for_while_a_block_is_still_spare() -> None:
    bench = Bench()
    bench.add("grows", 7, 30)
    bench.step()
    assert bench.port.log == [("acquire", 1, 2)]
    bench.step()  # 7 tokens in 2 blocks: less than one block is spare
    assert bench.port.log[1:] == [("extend", 1, 4)]
    while len(bench.port.log) == 2:
        bench.step()
    assert bench.port.log[2:] == [("extend", 1, 6)]


def test_growth_ends_with_the_last_token_that_may_come() -> None:
    bench = Bench()
    sequence = bench.add("ends", 7, 3)
    for _ in range(4):
        bench.step()
    assert bench.port.log == [("acquire", 1, 2), ("extend", 1, 3)]
    assert sequence.num_outputs == 3


def test_a_repeated_grant_changes_nothing_and_a_late_one_is_ignored() -> None:
    bench = Bench()
    sequence = bench.add("twice", 3)
    bench.scheduler.plan()
    [granted] = bench.answers
    assert isinstance(granted, LeaseGranted)
    assert bench.scheduler.granted(granted) == (sequence, True)
    assert bench.scheduler.granted(granted) == (sequence, False)
    bench.scheduler.remove(sequence)
    assert bench.scheduler.granted(granted) is None
    assert bench.scheduler.held() == []


@pytest.mark.parametrize(("num_blocks", "num_cached"), [(0, 0), (1, 0), (2, 7), (2, 6), (2, 8)])
def test_an_answer_that_cannot_be_served_fails_its_request(num_blocks: int, num_cached: int) -> None:
    bench = Bench()
    sequence = bench.add("odd", 6)
    bench.scheduler.plan()
    with pytest.raises(LeaseError) as caught:
        bench.scheduler.granted(LeaseGranted(1, tuple(range(num_blocks)), num_cached, 9))
    assert caught.value.sequence is sequence
    assert isinstance(caught.value.error, EngineFailedError)
    bench.scheduler.remove(sequence)
    assert bench.port.log[-1] == ("release", 1, 0)


def test_cached_tokens_are_not_computed_again() -> None:
    bench = Bench(num_blocks=64)
    sequence = bench.add("cached", 9)
    bench.scheduler.plan()
    bench.scheduler.granted(LeaseGranted(1, (5, 6, 7), 8, 9))
    assert sequence.num_computed == 8
    assert sequence.num_cached_tokens == 8
    [chunk] = bench.scheduler.plan()
    assert (chunk.num_tokens, chunk.reaches_end) == (1, True)


def running(bench: Bench, name: str, num_prompt: int) -> Sequence:
    """A sequence whose prompt is computed."""
    sequence = bench.add(name, num_prompt, 20)
    while sequence.num_outputs == 0:
        bench.step()
    return sequence


def test_a_deduplicated_block_takes_its_place_and_the_duplicate_is_given_back() -> None:
    bench = Bench()
    sequence = running(bench, "twin", 6)
    own = sequence.block_ids.tolist()
    bench.scheduler.sealed(BlockSealed(1, 0, own[0], own[0]))
    assert sequence.block_ids.tolist() == own
    bench.scheduler.sealed(BlockSealed(1, 0, own[0], 55))
    assert sequence.block_ids.tolist() == [55, *own[1:]]
    assert bench.port.log[-1] == ("release_block", 1, own[0])
    # The answer to an Extend may be older than the switch.
    bench.scheduler.granted(LeaseGranted(1, (*own, 60), 0, 9))
    assert sequence.block_ids.tolist() == [55, *own[1:], 60]


def test_a_seal_of_a_lease_of_before_is_ignored() -> None:
    bench = Bench()
    sequence = running(bench, "gone", 6)
    bench.scheduler.preempt(1)
    log = list(bench.port.log)
    bench.scheduler.sealed(BlockSealed(1, 0, 3, 55))
    bench.scheduler.seal_refused(SealRefused(1))
    assert sequence.can_seal
    assert bench.port.log == log


def test_nothing_is_sealed_after_a_refusal() -> None:
    bench = Bench()
    bench.scheduler.set_pool(BLOCK, BlockHasher(GEOMETRY, "n", BLOCK))
    sequence = running(bench, "odd", 6)
    bench.scheduler.seal_full(sequence)
    assert [ask.block_index for ask in bench.port.seals] == [0]
    bench.scheduler.seal_refused(SealRefused(sequence.cache_id))
    while sequence.num_computed < 12:
        bench.step()
    bench.scheduler.seal_full(sequence)
    assert [ask.block_index for ask in bench.port.seals] == [0]


def test_cached_blocks_are_not_sealed_again() -> None:
    bench = Bench()
    bench.scheduler.set_pool(BLOCK, BlockHasher(GEOMETRY, "n", BLOCK))
    sequence = bench.add("hit", 13)
    bench.scheduler.plan()
    bench.scheduler.granted(LeaseGranted(1, (5, 6, 7, 8), 8, 9))
    [chunk] = bench.scheduler.plan()
    bench.compute(chunk)
    bench.scheduler.seal_full(sequence)
    assert [(ask.block_index, ask.block_id) for ask in bench.port.seals] == [(2, 7)]
    assert bench.port.seals[0].parent_hash == bench.port.acquires[0].prefix_hashes[1]


def test_a_refused_acquire_leaves_nothing_to_release() -> None:
    bench = Bench()
    sequence = bench.add("refused", 6)
    bench.scheduler.plan()
    with pytest.raises(LeaseError):
        bench.scheduler.refused(LeaseRefused(1, NeverFitsError("never")))
    bench.scheduler.remove(sequence)
    assert [kind for kind, _, _ in bench.port.log] == ["acquire"]
    assert sequence.state is SequenceState.ENDED


def test_a_preempted_sequence_keeps_its_age_and_goes_first() -> None:
    bench = Bench(max_seqs=1)
    old = bench.add("old", 3, 20)
    bench.step()
    bench.step()
    bench.add("young", 3)
    bench.scheduler.preempt(old.cache_id)
    assert old.age_ticket is not None
    assert old.num_computed == 0
    bench.step()
    assert bench.step() == [("old", 4)]  # its prompt and the token that it had
