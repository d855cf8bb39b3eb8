"""The engine and its leases: growth, refusals, revocations, claims and seals, with a port that the test controls."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace

import grpc
import pytest

from protos.rich_status import make_status
from services.decoder.engine import EngineSettings
from services.decoder.errors import ManagerUnavailableError, NeverFitsError, PoolExhaustedError
from services.decoder.leases import ClaimsWanted, HeldLease, LeaseRevoked, ManagerAway, ManagerBack, PoolReady
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


def test_s23_without_its_manager_a_new_request_fails_at_once() -> None:
    leases = PooledLeases(64, 4)
    leases.announce = False
    request = make_request("running", 5, 100)
    with EngineHarness(leases) as harness:
        [never] = harness.run(make_request("never"))
        assert isinstance(never.error, ManagerUnavailableError)
        harness.post(PoolReady(leases.kv, 4))
        harness.model.hold_at = 3
        harness.engine.submit(request)
        harness.model.until_held()
        harness.post(ManagerAway("it was killed"))
        harness.model.gate.set()
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
        harness.model.hold_at = 7
        harness.engine.submit(request)
        harness.model.until_held()
        harness.post(LeaseRevoked(1))
        harness.post(LeaseRevoked(1))
        harness.model.gate.set()
        outcome = harness.outcome("victim")
        assert outcome.tokens == expected_tokens(request)
        assert len(outcome.admitted) == 1
        assert ("release", 1, 0) in leases.log
        assert any(kind == "acquire" and cache_id == 2 for kind, cache_id, _ in leases.log)


def test_a_new_pool_voids_all_leases_and_no_token_changes(leases: PooledLeases) -> None:
    requests = [make_request(f"r{i}", 6 + i, 25) for i in range(5)]
    with EngineHarness(leases) as harness:
        harness.model.hold_at = 9
        for request in requests:
            harness.engine.submit(request)
        harness.model.until_held()
        fresh = FakeKv(256, 4)
        leases.kv = fresh
        harness.post(PoolReady(fresh, 4))
        harness.model.gate.set()
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
