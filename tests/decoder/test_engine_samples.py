"""Several samples of one prompt in the engine: it is computed once, and each sample is what it would be alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from google.rpc import status_pb2

from services.decoder.contiguous_leases import ContiguousLeases
from services.decoder.engine import EngineSettings
from services.decoder.errors import (
    DecoderError,
    DuplicateRequestError,
    EngineFailedError,
    ManagerUnavailableError,
    PoolExhaustedError,
)
from services.decoder.leases import LeaseRevoked, ManagerAway, PoolReady
from services.decoder.request import DecodeRequest, FinishReason, sample_id
from services.decoder.service import contiguous_kv
from tests.decoder.engine_fakes import EngineHarness, FakeKv, PooledLeases, expected_tokens, make_request

BLOCK = 4


@pytest.fixture
def leases() -> PooledLeases:
    pool = PooledLeases(num_blocks=256, block_size=BLOCK)
    pool.can_seal = True
    return pool


def samples_of(name: str, num: int, num_prompt: int = 18, max_tokens: int = 12, **changes: Any) -> list[DecodeRequest]:
    """All samples of one request."""
    first = make_request(name, num_prompt, max_tokens, **changes)
    return [replace(first, request_id=sample_id(name, index), sample_index=index) for index in range(num)]


def check(harness: EngineHarness, requests: list[DecodeRequest]) -> None:
    """Submits them together: each is exact."""
    harness.engine.submit(*requests)
    for request in requests:
        outcome = harness.outcome(request.request_id)
        assert [*request.output_token_ids, *outcome.tokens] == expected_tokens(request)
        assert len(outcome.admitted) == 1


@pytest.mark.parametrize("num_prompt", [1, 2, 15, 16, 17, 33])
def test_the_prompt_is_computed_once_and_every_sample_is_what_it_is_alone(
    leases: PooledLeases, num_prompt: int
) -> None:
    requests = samples_of("many", 4, num_prompt)
    settings = EngineSettings(max_seqs=4, kv_capacity=100, max_num_batched_tokens=8)
    with EngineHarness(leases, settings) as harness:
        check(harness, requests)
        assert len({tuple(expected_tokens(request)) for request in requests}) == 4
        # The last token of the prompt is computed by each: its next one is sampled from it.
        assert sum(tokens for _, tokens in harness.model.batches) == num_prompt + 3 + 4 * 11
        cached = [harness.outcomes[request.request_id].finished.num_cached_tokens for request in requests]
        assert cached == [0, *[num_prompt - 1] * 3]
    assert [ask.max_shared_blocks for ask in leases.forks] == [(num_prompt - 1) // BLOCK] * 3
    assert sorted(leases.free) == list(range(256))


def test_forks_share_the_sealed_blocks_and_copy_only_the_tail(leases: PooledLeases) -> None:
    with EngineHarness(leases) as harness:
        harness.model.hold_at = 2
        harness.engine.submit(*samples_of("shared", 3))
        harness.model.until_held()
        first, *others = leases.tables.values()
        assert all(table[:4] == first[:4] and table[4] != first[4] for table in others)
        assert len(others) == 2
        harness.model.gate.set()


def test_samples_join_a_crowd_and_wait_for_seats(leases: PooledLeases) -> None:
    settings = EngineSettings(max_seqs=4, kv_capacity=100, max_num_batched_tokens=8)
    groups = [samples_of(f"group {i}", 3, 5 * i + 1, 9) for i in range(5)]
    with EngineHarness(leases, settings) as harness:
        for group in groups:
            harness.engine.submit(*group)
        for request in (request for group in groups for request in group):
            assert harness.outcome(request.request_id).tokens == expected_tokens(request)
    assert sorted(leases.free) == list(range(256))


def test_contiguous_caches_are_copied() -> None:
    requests = samples_of("copied", 4, 30)
    with EngineHarness(ContiguousLeases(lambda geometry: contiguous_kv(geometry, 32, 100))) as harness:
        check(harness, requests)
        assert sum(tokens for _, tokens in harness.model.batches) == 30 + 3 + 4 * 11


def test_a_leader_that_ends_with_its_first_token_leaves_its_followers_to_themselves(leases: PooledLeases) -> None:
    requests = samples_of("short", 4, 18, max_tokens=1)
    with EngineHarness(leases) as harness:
        check(harness, requests)
    assert leases.forks == []  # its blocks are hits, for whom they are cached
    hashes = {ask.prefix_hashes for ask in leases.acquires}
    assert len(hashes) == 1
    assert len(leases.acquires) == 4
    assert sorted(leases.free) == list(range(256))


def _exhausted() -> DecoderError:
    return PoolExhaustedError(status_pb2.Status(code=8, message="no blocks"))


@pytest.mark.parametrize("error", [_exhausted(), EngineFailedError("no")])
def test_a_refused_fork_asks_for_blocks_of_its_own_and_may_wait(leases: PooledLeases, error: DecoderError) -> None:
    leases.refuse = lambda kind, cache_id: error if kind == "fork" else None
    requests = samples_of("refused", 3)
    with EngineHarness(leases) as harness:
        check(harness, requests)
        assert sum(tokens for _, tokens in harness.model.batches) == 18 + 2 + 3 * 11, "copied from the leader even so"
    assert len(leases.forks) == 2
    leader, *others = leases.acquires
    assert not leader.is_patient
    assert all(ask.is_patient and ask.prefix_hashes == leader.prefix_hashes for ask in others)
    assert {ask.age_ticket for ask in others} == {101}, "as old as their leader"
    assert sorted(leases.free) == list(range(256))


@pytest.mark.parametrize("victim", [1, 2, 3])
@pytest.mark.parametrize("step", [1, 3, 5])
def test_any_sample_may_be_preempted_at_any_time(leases: PooledLeases, victim: int, step: int) -> None:
    requests = samples_of("revoked", 3, 18)
    settings = EngineSettings(max_seqs=4, kv_capacity=100, max_num_batched_tokens=8)
    with EngineHarness(leases, settings) as harness:
        harness.model.hold_at = step
        harness.engine.submit(*requests)
        harness.model.until_held()
        leases.post(LeaseRevoked(victim))
        harness.model.gate.set()
        for request in requests:
            assert harness.outcome(request.request_id).tokens == expected_tokens(request)
    assert sorted(leases.free) == list(range(256))


@pytest.mark.parametrize("aborted", [0, 1])
@pytest.mark.parametrize("step", [0, 1, 3, 6])
def test_an_aborted_sample_leaves_the_others_as_they_are(leases: PooledLeases, aborted: int, step: int) -> None:
    requests = samples_of("aborted", 3, 18)
    settings = EngineSettings(max_seqs=4, kv_capacity=100, max_num_batched_tokens=8)
    with EngineHarness(leases, settings) as harness:
        harness.model.hold_at = step
        harness.engine.submit(*requests)
        harness.model.until_held()
        assert harness.engine.abort(requests[aborted].request_id)
        harness.model.gate.set()
        for index, request in enumerate(requests):
            outcome = harness.outcome(request.request_id)
            if index == aborted:
                assert outcome.finished.reason is FinishReason.CANCELLED
            else:
                assert outcome.tokens == expected_tokens(request)
    assert sorted(leases.free) == list(range(256))


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_new_pool_in_their_midst_changes_no_sample(leases: PooledLeases, step: int) -> None:
    requests = samples_of("moved", 3, 18)
    settings = EngineSettings(max_seqs=4, kv_capacity=100, max_num_batched_tokens=8)
    with EngineHarness(leases, settings) as harness:
        harness.model.hold_at = step
        harness.engine.submit(*requests)
        harness.model.until_held()
        leases.kv = FakeKv(256, BLOCK)
        leases.post(PoolReady(leases.kv, BLOCK, can_seal=True))
        harness.model.gate.set()
        for request in requests:
            assert harness.outcome(request.request_id).tokens == expected_tokens(request)


@pytest.mark.parametrize("cuts", [(0, 0, 0), (5, 0, 3), (12, 0, 4), (0, 12, 7), (12, 12, 12), (12, 12, 3)])
def test_resumed_samples_go_on_each_where_it_was(leases: PooledLeases, cuts: tuple[int, ...]) -> None:
    requests = [
        replace(request, output_token_ids=tuple(expected_tokens(request)[:cut]), age_ticket=7)
        for request, cut in zip(samples_of("resumed", 3), cuts, strict=True)
    ]
    with EngineHarness(leases) as harness:
        check(harness, requests)
    assert all(ask.is_patient for ask in leases.acquires)
    assert sorted(leases.free) == list(range(256))


def test_a_failed_step_of_the_leader_fails_it_alone(leases: PooledLeases) -> None:
    requests = samples_of("unlucky", 3, 18)
    with EngineHarness(leases) as harness:
        harness.model.fail_when = lambda batch: not harness.model.batches and not leases.acquires[1:]
        harness.engine.submit(*requests)
        assert isinstance(harness.outcome("unlucky").error, EngineFailedError)
        for request in requests[1:]:
            assert harness.outcome(request.request_id).tokens == expected_tokens(request)


def test_ids_are_taken_all_or_none(leases: PooledLeases) -> None:
    requests = samples_of("taken", 3, max_tokens=50)
    with EngineHarness(leases) as harness:
        harness.model.gate.clear()
        harness.engine.submit(requests[2])
        with pytest.raises(DuplicateRequestError):
            harness.engine.submit(*requests)
        harness.engine.submit(*requests[:2])
        harness.model.gate.set()
        for request in requests:
            assert harness.outcome(request.request_id).tokens == expected_tokens(request)


def test_without_a_manager_new_samples_fail_and_those_that_wait_for_their_leader_do_not(leases: PooledLeases) -> None:
    settings = EngineSettings(max_seqs=4, kv_capacity=100, max_num_batched_tokens=8)
    requests, late = samples_of("early", 3, 18), samples_of("late", 3)
    with EngineHarness(leases, settings) as harness:
        harness.model.hold_at = 1
        harness.engine.submit(*requests)
        harness.model.until_held()
        leases.post(ManagerAway("gone"))
        harness.engine.submit(*late)
        harness.model.gate.set()
        for request in late:
            assert isinstance(harness.outcome(request.request_id).error, ManagerUnavailableError)
        for request in requests:
            assert harness.outcome(request.request_id).tokens == expected_tokens(request)


def test_stopping_fails_samples_that_wait_for_their_leader(leases: PooledLeases) -> None:
    settings = EngineSettings(max_seqs=4, kv_capacity=100, max_num_batched_tokens=8)
    requests = samples_of("stopped", 3, 18)
    with EngineHarness(leases, settings) as harness:
        harness.model.hold_at = 1
        harness.engine.submit(*requests)
        harness.model.until_held()
    assert all(isinstance(harness.outcomes[request.request_id].error, DecoderError) for request in requests)
    assert sorted(leases.free) == list(range(256))
