"""The engine: continuous batching, endings, failures and pressure, on a fake model that reads everything back."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable

import pytest

from services.decoder.batch import Batch
from services.decoder.contiguous_leases import ContiguousLeases
from services.decoder.engine import Engine, EngineSettings
from services.decoder.errors import (
    CheckpointError,
    ConfigError,
    DuplicateRequestError,
    EngineFailedError,
    InvalidRequestError,
    NeverFitsError,
    ShuttingDownError,
)
from services.decoder.kv_view import ContiguousKv, KvView
from services.decoder.leases import KvGeometry
from services.decoder.request import Admitted, Event, FinishReason, SamplingParams, Token
from services.decoder.sequence import Sequence
from services.decoder.service import contiguous_kv
from tests.decoder.engine_fakes import (
    DEADLINE_S,
    EngineHarness,
    FakeStep,
    PooledLeases,
    expected_tokens,
    make_request,
    poll,
)


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
    leases = ContiguousLeases(lambda geometry: contiguous_kv(geometry, 4, 100))
    settings = EngineSettings(max_seqs=4, kv_capacity=100, max_num_batched_tokens=16)
    requests = [make_request(f"r{i}", 5 * i + 1, 16) for i in range(12)]
    with EngineHarness(leases, settings) as harness:
        for outcome, request in zip(harness.run(*requests), requests, strict=True):
            assert outcome.tokens == expected_tokens(request)
            assert outcome.admitted == [Admitted(0, None)]


def test_s16_a_freed_contiguous_cache_is_the_next_to_be_used() -> None:
    caches: list[ContiguousKv] = []

    def make_kv(geometry: KvGeometry) -> ContiguousKv:
        caches.append(contiguous_kv(geometry, 3, 50))
        return caches[0]

    with EngineHarness(ContiguousLeases(make_kv), EngineSettings(max_seqs=3, kv_capacity=50)) as harness:
        for name in ("a", "b"):
            harness.run(make_request(name))
        assert (caches[0].num_allocated, caches[0].num_free) == (1, 3)


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
        harness.model.gate.clear()
        harness.engine.submit(make_request("runs"))
        harness.model.until_held()
        harness.engine.submit(make_request("waits"))
        harness.engine.abort("waits")
        harness.model.gate.set()
        assert harness.outcome("waits").finished.reason is FinishReason.CANCELLED
        assert harness.outcomes["waits"].tokens == []
        assert harness.outcome("runs").tokens == expected_tokens(make_request("runs"))


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
        harness.model.hold_at = 5
        harness.engine.submit(make_request("cut off", 5, 1000))
        harness.model.until_held()
        stopping = threading.Thread(target=harness.engine.stop, args=(0.0,))
        stopping.start()
        poll(lambda: _refuses_all(harness.engine))
        harness.model.gate.set()
        stopping.join()
        assert isinstance(harness.outcomes["cut off"].error, ShuttingDownError)
    assert len(leases.free) == 256


def _refuses_all(engine: Engine) -> bool:
    try:
        engine.require_room()
    except ShuttingDownError:
        return True
    return False


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


def test_a_steps_tokens_go_out_once_the_next_step_is_under_way_and_the_last_ones_before_the_engine_waits(
    leases: PooledLeases,
) -> None:
    """So that the thread of the streams does not take the interpreter between two steps, when nothing computes."""
    with EngineHarness(leases) as harness:
        order: list[str] = []
        begin, emit = harness.model.begin, harness._emit

        def noting_begin(batch: Batch, kv: KvView) -> FakeStep:
            order.append("step")
            return begin(batch, kv)

        def noting_emit(events: Iterable[tuple[str, Event]]) -> None:
            order.append("tokens" if any(isinstance(event, Token) for _, event in events) else "other")
            emit(list(events))

        harness.model.begin = noting_begin  # type: ignore[method-assign]
        harness.engine._emit = noting_emit
        harness.run(make_request("one", 5, 3))
        assert [name for name in order if name != "other"] == ["step", "step", "tokens", "step", "tokens", "tokens"]
