"""The engine: continuous batching, endings, failures and pressure, on a fake model that reads everything back."""

from __future__ import annotations

import itertools
import random
import threading
from dataclasses import replace

import grpc
import pytest

from protos.rich_status import make_status
from services.decoder.contiguous_leases import ContiguousLeases
from services.decoder.engine import Engine, EngineSettings
from services.decoder.errors import (
    CheckpointError,
    ConfigError,
    DuplicateRequestError,
    EngineFailedError,
    InvalidRequestError,
    ManagerUnavailableError,
    NeverFitsError,
    PoolExhaustedError,
    ShuttingDownError,
)
from services.decoder.leases import ClaimsWanted, HeldLease, LeaseRevoked, ManagerAway, ManagerBack, PoolReady
from services.decoder.request import Admitted, FinishReason, SamplingParams, Token
from services.decoder.sequence import Sequence
from tests.decoder.engine_fakes import (
    DEADLINE_S,
    EngineHarness,
    FakeKv,
    PooledLeases,
    expected_tokens,
    make_request,
    poll,
)


def exhausted() -> PoolExhaustedError:
    status = make_status(grpc.StatusCode.RESOURCE_EXHAUSTED, "no free blocks", reason="POOL_EXHAUSTED")
    return PoolExhaustedError(status)


@pytest.fixture
def leases() -> PooledLeases:
    return PooledLeases(num_blocks=256, block_size=4)


def test_one_request_gets_its_tokens_in_order_and_gives_its_blocks_back(leases: PooledLeases) -> None:
    request = make_request("one", 10, 20)
    with EngineHarness(leases) as harness:
        [outcome] = harness.run(request)
        assert outcome.tokens == expected_tokens(request)
        assert isinstance(outcome.events[0], Admitted)
        positions = [event.position for event in outcome.events if isinstance(event, Token)]
        assert positions == list(range(20))
        assert outcome.finished.reason is FinishReason.LENGTH
        assert outcome.finished.num_output_tokens == 20
        assert len(leases.free) == 256
        assert leases.tables == {}


def test_requests_join_and_leave_at_any_step_and_none_are_mixed_up(leases: PooledLeases) -> None:
    rng = random.Random(7)
    requests = [make_request(f"r{i}", rng.randint(1, 40), rng.randint(1, 30)) for i in range(60)]
    settings = EngineSettings(max_seqs=8, kv_capacity=80, max_num_batched_tokens=16)
    with EngineHarness(leases, settings) as harness:
        for outcome, request in zip(harness.run(*requests), requests, strict=True):
            assert outcome.tokens == expected_tokens(request)
        assert max(num_seqs for num_seqs, _ in harness.model.batches) == 8
        assert max(num_tokens for _, num_tokens in harness.model.batches) <= 16
    assert len(leases.free) == 256


def test_s4_the_batch_grows_to_thirty_two_between_admission_and_decode() -> None:
    leases = PooledLeases(num_blocks=512, block_size=4)
    requests = [make_request(f"r{i}", 3 + i, 24) for i in range(32)]
    with EngineHarness(leases) as harness:
        harness.model.gate.clear()
        harness.engine.submit(requests[0])
        poll(harness.model.is_stepping.is_set)
        for request in requests[1:]:
            harness.engine.submit(request)
        harness.model.gate.set()
        for request in requests:
            assert harness.outcome(request.request_id).tokens == expected_tokens(request)
        assert max(num_seqs for num_seqs, _ in harness.model.batches) >= 16


@pytest.mark.parametrize("block_size", [1, 8, 16, 32])
@pytest.mark.parametrize("max_num_batched_tokens", [4, 33])
def test_chunks_and_block_sizes_change_no_token(block_size: int, max_num_batched_tokens: int) -> None:
    leases = PooledLeases(num_blocks=400, block_size=block_size)
    settings = EngineSettings(max_seqs=4, kv_capacity=128, max_num_batched_tokens=max_num_batched_tokens)
    requests = [make_request(f"r{i}", 7 * i + 1, 16) for i in range(6)]
    with EngineHarness(leases, settings) as harness:
        for outcome, request in zip(harness.run(*requests), requests, strict=True):
            assert outcome.tokens == expected_tokens(request)


def test_contiguous_caches_give_the_same_tokens_without_a_pool() -> None:
    leases = ContiguousLeases(lambda geometry: FakeKv(4, 100), max_seqs=4, kv_capacity=100)
    settings = EngineSettings(max_seqs=4, kv_capacity=100, max_num_batched_tokens=16)
    requests = [make_request(f"r{i}", 5 * i + 1, 16) for i in range(12)]
    with EngineHarness(leases, settings) as harness:
        for outcome, request in zip(harness.run(*requests), requests, strict=True):
            assert outcome.tokens == expected_tokens(request)
            assert outcome.admitted == [Admitted(0, None)]


def test_s16_a_freed_contiguous_cache_is_the_next_to_be_used() -> None:
    leases = ContiguousLeases(lambda geometry: FakeKv(3, 50), max_seqs=3, kv_capacity=50)
    with EngineHarness(leases, EngineSettings(max_seqs=3, kv_capacity=50)) as harness:
        for name in ("a", "b"):
            harness.run(make_request(name))
        assert leases._free == [2, 1, 0]


def test_a_stop_token_is_delivered_and_ends_the_request(leases: PooledLeases) -> None:
    free = make_request("stops", 6, 20)
    stop = expected_tokens(free)[4]
    request = make_request("stops", 6, 20, stop_token_ids=frozenset({stop}))
    with EngineHarness(leases) as harness:
        [outcome] = harness.run(request)
    assert outcome.tokens == expected_tokens(free)[:5]
    assert outcome.finished.reason is FinishReason.STOP
    assert outcome.finished.stop_token_id == stop


def test_no_stop_token_is_drawn_before_min_tokens(leases: PooledLeases) -> None:
    stop = expected_tokens(make_request("min", 6, 20))[1]
    request = make_request("min", 6, 20, stop_token_ids=frozenset({stop}), min_tokens=10)
    with EngineHarness(leases) as harness:
        [outcome] = harness.run(request)
    assert stop not in outcome.tokens[:10]
    assert outcome.tokens == expected_tokens(request)


def test_logprobs_come_only_when_asked_for(leases: PooledLeases) -> None:
    with EngineHarness(leases) as harness:
        plain, asked = harness.run(make_request("plain"), make_request("asked", num_logprobs=1))
    assert all(event.logprobs is None for event in plain.events if isinstance(event, Token))
    for event in asked.events:
        if isinstance(event, Token):
            assert event.logprobs is not None
            assert (event.logprobs.token_id, event.logprobs.logprob) == (event.token_id, -0.5)


@pytest.mark.parametrize("cut", [1, 3, 4, 7, 8, 11])
def test_a_request_cut_anywhere_goes_on_with_the_same_tokens(leases: PooledLeases, cut: int) -> None:
    whole = make_request("cut", 9, 12)
    tokens = expected_tokens(whole)
    resumed = make_request("cut", 9, 12, output_token_ids=tuple(tokens[:cut]), age_ticket=5)
    with EngineHarness(leases) as harness:
        [outcome] = harness.run(resumed)
    assert outcome.tokens == tokens[cut:]
    assert outcome.finished.num_output_tokens == 12
    first = next(event for event in outcome.events if isinstance(event, Token))
    assert first.position == cut


def test_a_resumed_request_that_is_complete_ends_at_once(leases: PooledLeases) -> None:
    tokens = tuple(expected_tokens(make_request("done", 9, 6)))
    full = make_request("done", 9, 6, output_token_ids=tokens)
    stopped = make_request("done2", 9, 60, output_token_ids=(1, 2, 3), stop_token_ids=frozenset({3}))
    with EngineHarness(leases) as harness:
        first, second = harness.run(full, stopped)
    assert (first.tokens, first.finished.reason) == ([], FinishReason.LENGTH)
    assert (second.tokens, second.finished.reason, second.finished.stop_token_id) == ([], FinishReason.STOP, 3)
    assert leases.log == []


def test_an_abort_takes_effect_at_the_step_boundary(leases: PooledLeases) -> None:
    with EngineHarness(leases) as harness:
        harness.model.gate.clear()
        harness.engine.submit(make_request("long", 4, 1000))
        poll(harness.model.is_stepping.is_set)
        assert harness.engine.abort("long")
        assert leases.log == [("acquire", 1, 2)]  # no release: the step may still touch its blocks
        harness.model.gate.set()
        assert harness.outcome("long").finished.reason is FinishReason.CANCELLED
        assert leases.tables == {}
        assert not harness.engine.abort("long")
        assert not harness.engine.abort("never seen")


def test_a_waiting_request_can_be_aborted_too(leases: PooledLeases) -> None:
    with EngineHarness(leases, EngineSettings(max_seqs=1)) as harness:
        harness.engine.submit(make_request("runs", 4, 1000))
        harness.wait(lambda: "runs" in harness.outcomes)
        harness.engine.submit(make_request("waits"))
        harness.engine.abort("waits")
        assert harness.outcome("waits").finished.reason is FinishReason.CANCELLED
        assert harness.outcomes["waits"].tokens == []


def test_a_failed_step_fails_its_own_sequences_and_the_engine_goes_on(leases: PooledLeases) -> None:
    good = make_request("good", 5, 200)
    with EngineHarness(leases, EngineSettings(max_seqs=2, max_num_batched_tokens=8)) as harness:
        harness.model.fail_when = lambda batch: 999_999 in batch.token_ids
        bad = make_request("bad", 5, 5)
        bad = type(bad)(bad.request_id, [999_999], bad.sampling, bad.max_tokens)
        [failed] = harness.run(bad)
        assert isinstance(failed.error, EngineFailedError)
        assert "told to fail" in str(failed.error)
        [outcome] = harness.run(good)
        assert outcome.tokens == expected_tokens(good)
        assert len(leases.free) == 256


def test_emit_that_raises_does_not_stop_the_engine(leases: PooledLeases) -> None:
    with EngineHarness(leases) as harness:
        emit, harness.engine._emit = harness.engine._emit, lambda events: 1 / 0  # type: ignore[assignment]
        harness.engine.submit(make_request("lost"))
        poll(lambda: not harness.engine.abort("lost"))
        harness.engine._emit = emit
        request = make_request("heard")
        [outcome] = harness.run(request)
        assert outcome.tokens == expected_tokens(request)


def test_submit_refuses_what_can_never_run(leases: PooledLeases) -> None:
    with EngineHarness(leases, EngineSettings(kv_capacity=16)) as harness:
        with pytest.raises(InvalidRequestError, match="prompt"):
            harness.engine.submit(make_request("empty", 0))
        with pytest.raises(NeverFitsError, match="--kv-capacity"):
            harness.engine.submit(make_request("long", 10, 7))
        harness.model.gate.clear()
        harness.engine.submit(make_request("twice"))
        with pytest.raises(DuplicateRequestError, match="twice"):
            harness.engine.submit(make_request("twice"))
        harness.model.gate.set()
        harness.outcome("twice")


def test_a_request_id_is_free_again_after_its_last_event(leases: PooledLeases) -> None:
    with EngineHarness(leases) as harness:
        harness.run(make_request("again"))
        poll(lambda: not harness.engine.abort("again"))
        harness.outcomes.clear()
        harness.run(make_request("again"))


def test_s23_without_its_manager_a_new_request_fails_at_once() -> None:
    leases = PooledLeases(64, 4)
    leases.announce = False
    request = make_request("running", 5, 100)
    with EngineHarness(leases) as harness:
        [never] = harness.run(make_request("never"))
        assert isinstance(never.error, ManagerUnavailableError)
        harness.post(PoolReady(leases.kv, 4))
        harness.engine.submit(request)
        harness.wait(lambda: harness.num_tokens("running") > 3)
        harness.post(ManagerAway("it was killed"))
        [turned_away] = harness.run(make_request("new"))
        assert isinstance(turned_away.error, ManagerUnavailableError)
        assert "it was killed" in str(turned_away.error)
        harness.post(ManagerBack())
        [served] = harness.run(make_request("served"))
        assert served.tokens == expected_tokens(make_request("served"))
        assert harness.outcome("running").tokens == expected_tokens(request)


def test_a_sequence_without_room_waits_and_the_others_go_on(leases: PooledLeases) -> None:
    stuck, other = make_request("stuck", 4, 40), make_request("other", 1, 3)
    with EngineHarness(leases) as harness:
        leases.hold_extends = True
        harness.engine.submit(stuck)
        harness.wait(lambda: harness.num_tokens("stuck") == 5)
        [outcome] = harness.run(other)
        assert outcome.tokens == expected_tokens(other)
        assert harness.num_tokens("stuck") == 5  # two blocks of four hold prompt and four tokens
        leases.grant_held()
        assert harness.outcome("stuck").tokens == expected_tokens(stuck)


def test_a_refused_prefetch_harms_nobody_and_a_refused_need_gives_way(leases: PooledLeases) -> None:
    request = make_request("grows", 4, 40)
    with EngineHarness(leases) as harness:
        leases.refuse = lambda kind, cache_id: exhausted() if (kind, cache_id) == ("extend", 1) else None
        [outcome] = harness.run(request)
        assert outcome.tokens == expected_tokens(request)
        assert leases.log[:5] == [
            ("acquire", 1, 2),
            ("extend", 1, 4),  # a prefetch
            ("extend", 1, 3),  # what it needs
            ("release", 1, 0),
            ("acquire", 2, 3),  # the prompt, the tokens that it had, and one more
        ]
        assert [ask.is_patient for ask in leases.acquires] == [False, True]
        assert leases.acquires[1].age_ticket == 101
        assert len(leases.free) == 256


def test_growth_that_can_never_be_fails_the_request(leases: PooledLeases) -> None:
    request = make_request("too long", 4, 40)
    with EngineHarness(leases) as harness:
        leases.refuse = lambda kind, cache_id: NeverFitsError("never") if kind == "extend" else None
        [outcome] = harness.run(request)
        assert outcome.tokens == expected_tokens(request)[:5]
        assert isinstance(outcome.error, NeverFitsError)
        assert len(leases.free) == 256


def test_full_blocks_are_sealed_in_order_after_the_step_that_wrote_them() -> None:
    leases = PooledLeases(64, 4)
    leases.can_seal = True
    request = make_request("sealed", 9, 10)
    with EngineHarness(leases, EngineSettings(max_seqs=4, max_num_batched_tokens=6)) as harness:
        harness.run(request)
        # 18 tokens have K/V: the last one is only sampled.
        assert [(ask.cache_id, ask.block_index) for ask in leases.seals] == [(1, index) for index in range(4)]
        assert [kind for kind, _, _ in leases.log if kind in ("seal", "release")] == ["seal"] * 4 + ["release"]
        for before, after in itertools.pairwise(leases.seals):
            assert after.parent_hash == before.content_hash
        [first] = harness.run(replace(request, request_id="again"))
        assert first.tokens == expected_tokens(request)
    # The last prompt token is always computed, so the block that it is in is not asked for.
    assert leases.acquires[1].prefix_hashes == tuple(ask.content_hash for ask in leases.seals[:2])


def test_tenants_have_hashes_of_their_own_unless_told_otherwise() -> None:
    def hashes(shares: bool) -> list[tuple[bytes, ...]]:
        leases = PooledLeases(64, 4)
        leases.can_seal = True
        settings = EngineSettings(shares_prefixes_between_tenants=shares)
        with EngineHarness(leases, settings) as harness:
            for tenant in ("a", "b"):
                harness.run(replace(make_request("same", 9, 2), request_id=tenant, tenant=tenant))
        return [ask.prefix_hashes for ask in leases.acquires]

    own_a, own_b = hashes(shares=False)
    assert set(own_a).isdisjoint(own_b)
    shared_a, shared_b = hashes(shares=True)
    assert shared_a == shared_b


def test_s24_s30_a_refused_acquire_fails_the_request_and_leaves_nothing(leases: PooledLeases) -> None:
    with EngineHarness(leases) as harness:
        leases.refuse = lambda kind, cache_id: exhausted()
        [outcome] = harness.run(make_request("refused"))
        assert isinstance(outcome.error, PoolExhaustedError)
        leases.refuse = lambda kind, cache_id: None
        [outcome] = harness.run(make_request("refused later"))
        assert outcome.tokens == expected_tokens(make_request("refused later"))
        assert [entry for entry in leases.log if entry[0] == "release"] == [("release", 2, 0)]


def test_s21_reserve_full_takes_the_whole_capacity_up_front(leases: PooledLeases) -> None:
    settings = EngineSettings(kv_capacity=30, reserve_full=True)
    with EngineHarness(leases, settings) as harness:
        harness.run(make_request("full", 3, 20))
    assert leases.log == [("acquire", 1, 8), ("release", 1, 0)]


def test_on_demand_a_request_takes_only_what_it_needs(leases: PooledLeases) -> None:
    with EngineHarness(leases) as harness:
        harness.run(make_request("small", 7, 2))
    assert leases.log == [("acquire", 1, 2), ("extend", 1, 3), ("release", 1, 0)]


def test_a_revoked_lease_is_released_and_its_sequence_starts_over(leases: PooledLeases) -> None:
    request = make_request("victim", 9, 30)
    with EngineHarness(leases) as harness:
        harness.engine.submit(request)
        harness.wait(lambda: harness.num_tokens("victim") >= 7)
        harness.post(LeaseRevoked(1))
        harness.post(LeaseRevoked(1))
        outcome = harness.outcome("victim")
        assert outcome.tokens == expected_tokens(request)
        assert len(outcome.admitted) == 1
        assert ("release", 1, 0) in leases.log
        assert any(kind == "acquire" and cache_id == 2 for kind, cache_id, _ in leases.log)


def test_a_new_pool_voids_all_leases_and_no_token_changes(leases: PooledLeases) -> None:
    requests = [make_request(f"r{i}", 6 + i, 25) for i in range(5)]
    with EngineHarness(leases) as harness:
        for request in requests:
            harness.engine.submit(request)
        harness.wait(lambda: len(harness.outcomes) == 5)
        fresh = FakeKv(256, 4)
        leases.kv = fresh
        harness.post(PoolReady(fresh, 4))
        for request in requests:
            assert harness.outcome(request.request_id).tokens == expected_tokens(request)
    assert len(leases.free) == 256


def test_claims_are_what_is_held_at_a_step_boundary(leases: PooledLeases) -> None:
    claims: list[list[HeldLease]] = []
    answered = threading.Event()

    def answer(held: object) -> None:
        claims.append(list(held))  # type: ignore[call-overload]
        answered.set()

    with EngineHarness(leases) as harness:
        harness.model.gate.clear()
        harness.engine.submit(make_request("held", 5, 100, priority=3, tenant="t"))
        poll(harness.model.is_stepping.is_set)
        harness.post(ClaimsWanted(answer))
        assert not answered.is_set()
        harness.model.gate.set()
        assert answered.wait(DEADLINE_S)
    [[held]] = claims
    assert (held.cache_id, held.priority, held.tenant, held.age_ticket) == (1, 3, "t", 101)
    assert len(held.block_ids) >= 2


def test_priority_goes_before_age_and_age_before_arrival(leases: PooledLeases) -> None:
    with EngineHarness(leases, EngineSettings(max_seqs=1)) as harness:
        harness.model.gate.clear()
        harness.engine.submit(make_request("first", 4, 2))
        poll(harness.model.is_stepping.is_set)
        for name, changes in (("new", {}), ("old", {"age_ticket": 3}), ("urgent", {"priority": 1})):
            harness.engine.submit(make_request(name, 4, 2, **changes))
        harness.model.gate.set()
        for name in ("new", "old", "urgent"):
            harness.outcome(name)
        order = [name for burst in harness.bursts for name, event in burst if isinstance(event, Admitted)]
        assert order == ["first", "urgent", "old", "new"]


def test_stop_drains_running_requests(leases: PooledLeases) -> None:
    request = make_request("drains", 5, 60)
    harness = EngineHarness(leases)
    with harness:
        harness.engine.submit(request)
        harness.wait(lambda: "drains" in harness.outcomes)
        harness.engine.stop(DEADLINE_S)
        assert harness.outcomes["drains"].tokens == expected_tokens(request)
        with pytest.raises(ShuttingDownError):
            harness.engine.submit(make_request("late"))
    assert len(leases.free) == 256


def test_stop_without_time_fails_what_runs_and_releases_everything(leases: PooledLeases) -> None:
    with EngineHarness(leases) as harness:
        harness.engine.submit(make_request("cut off", 5, 1000))
        harness.wait(lambda: "cut off" in harness.outcomes)
        harness.engine.stop(0.0)
        assert isinstance(harness.outcomes["cut off"].error, ShuttingDownError)
    assert len(leases.free) == 256


def test_busy_ms_is_the_age_of_the_step(leases: PooledLeases) -> None:
    with EngineHarness(leases) as harness:
        assert harness.engine.busy_ms() is None
        harness.model.gate.clear()
        harness.engine.submit(make_request("slow", 3, 1))
        poll(harness.model.is_stepping.is_set)
        poll(lambda: (harness.engine.busy_ms() or 0) >= 5)
        harness.model.gate.set()
        harness.outcome("slow")
        poll(lambda: harness.engine.busy_ms() is None)


def test_start_raises_what_loading_raised() -> None:
    def fail() -> None:
        raise CheckpointError("model.safetensors: truncated")

    engine = Engine(fail, PooledLeases(1, 1), EngineSettings(), lambda events: None)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="truncated"):
        engine.start()
    engine.stop(0.0)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="--max-num-batched-tokens"):
        EngineSettings(max_seqs=32, max_num_batched_tokens=16)
    with pytest.raises(ConfigError, match="--kv-capacity"):
        EngineSettings(kv_capacity=0)


def test_penalties_see_prompt_and_output() -> None:
    sampling = SamplingParams(presence_penalty=1.0, repetition_penalty=1.5)
    sequence = Sequence(make_request("penal", 2, 9, sampling=sampling, output_token_ids=(5, 5, 6)), 0)
    sequence.append(5)
    how = sequence.next_sampling()
    assert how.output_counts == {5: 3, 6: 1}
    assert how.seen_token_ids == frozenset({*sequence.request.prompt_token_ids, 5, 6})
    assert how.position == 4
    plain = Sequence(make_request("plain"), 0).next_sampling()
    assert plain.output_counts is None
    assert plain.seen_token_ids is None
