"""The load's timing and the figures, against a system whose delays are known, in virtual time."""

from __future__ import annotations

import asyncio
import random

import grpc
import pytest

from clients.loadtest import records
from clients.loadtest.arrivals import Arrivals
from clients.loadtest.driver import Driver, Plan, record_reference
from clients.loadtest.figures import ServiceLevel, failures, summarize
from clients.loadtest.lengths import Numbers
from clients.loadtest.live import Live
from clients.loadtest.records import RunRecord
from clients.loadtest.workload import Mix, ProbeWorkload, RepeatedWorkload, TokenWorkload, Workload
from clients.percentiles import percentile
from protos import decoder_pb2 as pb
from tests.clients.loadtest.fake_system import FakeSystem
from tests.clients.loadtest.virtual_time import run_in_virtual_time

SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}
LEVEL = ServiceLevel()


def tokens(mix: Mix | None = None, turns: int = 1) -> TokenWorkload:
    length = Numbers(4, 4)
    return TokenWorkload(length, length, 100, turns, mix or Mix(), seed=0)


def drive(system: FakeSystem, plan: Plan, workload: Workload | None = None) -> RunRecord:
    run = RunRecord("test", {})
    run_in_virtual_time(Driver(system.generate, workload or tokens(), plan, run).drive())
    return run


def open_loop(rate: float, duration_s: float, pattern: str = "constant") -> Plan:
    return Plan(duration_s, arrivals=Arrivals(pattern, [rate], duration_s))


def test_percentiles_of_known_delays_are_exact() -> None:
    rng = random.Random(3)
    delays = [rng.lognormvariate(-2, 0.7) for _ in range(2000)]
    system = FakeSystem(ttft_s=lambda number: delays[number], itl_s=0.02, num_tokens=6)
    run = drive(system, open_loop(100, 20))
    figures = summarize(run, LEVEL)["latency_s"]
    for name, share in SHARES.items():
        assert figures["ttft"][name] == pytest.approx(percentile(delays, share), rel=1e-6)
        assert figures["e2e"][name] == pytest.approx(percentile(delays, share) + 0.1, rel=1e-6)
        assert figures["tpot"][name] == pytest.approx(0.02, rel=1e-6)
        assert figures["itl"][name] == pytest.approx(0.02, rel=1e-6)
    assert figures["itl"]["count"] == 5 * 2000


@pytest.mark.parametrize("pattern", ["constant", "poisson"])
def test_a_stall_of_5_s_shows_in_full_in_an_open_loop(pattern: str) -> None:
    system = FakeSystem(stalls=[(10.03, 15.03)])
    plan = open_loop(20, 40, pattern)
    run = drive(system, plan)
    assert plan.arrivals is not None
    due = list(plan.arrivals.times(random.Random(f"{plan.seed}:arrivals")))
    truth = [(15.03 if 10.03 <= at + 0.1 < 15.03 else at + 0.1) - at for at in due]
    figures = summarize(run, LEVEL)["latency_s"]["ttft"]
    assert figures["count"] == len(due)
    for name, share in SHARES.items():
        assert figures[name] == pytest.approx(percentile(truth, share), rel=0.02)
    assert figures["p99"] > 4.0
    assert system.max_running > 80  # nobody waited for anybody


def test_a_client_that_is_late_counts_from_when_the_request_was_due() -> None:
    async def main() -> RunRecord:
        run = RunRecord("late", {})
        driver = Driver(FakeSystem().generate, tokens(), open_loop(10, 2), run)
        driving = asyncio.ensure_future(driver.drive())
        await asyncio.sleep(0.95)
        asyncio.get_running_loop()._jumping.now += 0.5  # type: ignore[attr-defined]  # the loop was held up
        await driving
        return run

    run = run_in_virtual_time(main())
    worst = max(record.sent_s - record.due_s for record in run.requests)
    assert worst == pytest.approx(0.45, abs=0.02)
    assert summarize(run, LEVEL)["client"]["was_the_limit"]
    assert max(record.ttft_s or 0 for record in run.requests) == pytest.approx(0.55, abs=0.02)


def test_a_closed_loop_has_one_request_a_user_in_flight() -> None:
    system = FakeSystem()
    run = drive(system, Plan(10.0, users=7, think_s=Numbers(0.5, 0.5)))
    assert system.max_running == 7
    each_s = 0.1 + 0.04 + 0.5
    assert len(run.requests) == pytest.approx(7 * 10 / each_s, rel=0.1)
    assert summarize(run, LEVEL)["throughput"]["requests_per_s"] == pytest.approx(7 / each_s, rel=0.1)


def test_turns_build_on_one_another_after_a_think_time() -> None:
    system = FakeSystem()
    plan = Plan(100.0, arrivals=Arrivals("constant", [1.0], 100.0), think_s=Numbers(2, 2), max_conversations=1)
    run = drive(system, plan, tokens(turns=3))
    assert [record.turn for record in run.requests] == [0, 1, 2]
    first, second, third = (list(request.token_ids.ids) for request in system.requests)
    assert second[: len(first)] == first
    assert second[len(first) : len(first) + 5] == [0, 1, 2, 3, 4]  # the answer
    assert third[: len(second)] == second
    gaps = [b.due_s - a.ended_s for a, b in zip(run.requests, run.requests[1:], strict=False)]
    assert gaps == pytest.approx([2.0, 2.0])


def test_right_answers_are_counted_and_a_fast_wrong_one_is_a_failure() -> None:
    def answer(request: pb.GenerateRequest) -> str:
        return request.chat.messages[-1].content.removeprefix("Repeat: ")

    workload = ProbeWorkload(["recall"], 1, Mix(), seed=0)
    run = drive(FakeSystem(answer=answer), open_loop(10, 5), workload)
    summary = summarize(run, LEVEL)
    assert summary["requests"]["checked"] == summary["requests"]["ok"] == 50
    assert failures(summary) == []
    wrong = summarize(drive(FakeSystem(answer=lambda request: "mine"), open_loop(10, 5), workload), LEVEL)
    assert wrong["requests"]["wrong"] == 50
    assert wrong["goodput_requests_per_s"] == 0
    assert failures(wrong) == ["50 requests: wrong answer"]


def test_a_recorded_run_finds_tokens_that_changed_under_load() -> None:
    system = FakeSystem()
    workload = RepeatedWorkload(tokens(), 4)
    run = RunRecord("recorded", {})

    async def main() -> None:
        reference = await record_reference(system.generate, workload, 4)
        assert set(reference) == {(number, 0) for number in range(4)}
        reference[2, 0] = [9, 9, 9, 9, 9]
        plan = open_loop(10, 4)
        await Driver(system.generate, workload, plan, run, reference, reference_size=4).drive()

    run_in_virtual_time(main())
    assert {record.conversation % 4 for record in run.requests if record.status == records.WRONG} == {2}
    assert all(record.right for record in run.requests if record.conversation % 4 != 2)


def test_errors_are_counted_by_status_and_are_no_goodput() -> None:
    def fails(number: int) -> grpc.StatusCode | None:
        return grpc.StatusCode.RESOURCE_EXHAUSTED if number % 4 == 0 else None

    summary = summarize(drive(FakeSystem(fails=fails), open_loop(10, 4)), LEVEL)
    assert summary["statuses"] == {"RESOURCE_EXHAUSTED": 10, "ok": 30}
    assert summary["good_share"] == 0.75
    assert failures(summary) == ["10 requests: RESOURCE_EXHAUSTED"]


def test_cancellations_deadlines_priorities_and_tenants_come_by_share() -> None:
    mix = Mix(0.2, 0.3, 0.12, priorities=[("5", 0.5)], tenants=[("a", 0.25), ("b", 0.25)])
    system = FakeSystem()
    run = drive(system, open_loop(100, 20), tokens(mix))
    summary = summarize(run, LEVEL)
    count = len(run.requests)
    assert summary["statuses"][records.CANCELLED] == pytest.approx(0.2 * count, rel=0.2)
    assert summary["statuses"][records.DEADLINE] == pytest.approx(0.3 * count, rel=0.2)
    assert failures(summary) == []
    assert sum(request.priority == 5 for request in system.requests) == pytest.approx(0.5 * count, rel=0.1)
    assert system.tenants.count("a") == pytest.approx(0.25 * count, rel=0.2)
    assert system.tenants.count("") == pytest.approx(0.5 * count, rel=0.2)


def test_goodput_needs_the_service_level() -> None:
    system = FakeSystem(ttft_s=lambda number: 0.1 if number % 2 else 0.3)
    run = drive(system, open_loop(10, 10))
    assert summarize(run, ServiceLevel(ttft_s=0.2))["good_share"] == 0.5
    assert summarize(run, ServiceLevel(ttft_s=0.4, tpot_s=0.005))["good_share"] == 0
    assert summarize(run, ServiceLevel(ttft_s=0.4, tpot_s=0.05))["good_share"] == 1


def test_what_does_not_end_is_told() -> None:
    system = FakeSystem(stalls=[(3.0, 10_000.0)])
    run = drive(system, Plan(4.0, drain_s=5.0, arrivals=Arrivals("constant", [10.0], 4.0)))
    assert run.ended_s == pytest.approx(9.0)
    summary = summarize(run, LEVEL)
    assert summary["statuses"][records.UNFINISHED] == pytest.approx(11, abs=1)
    assert failures(summary)


def test_the_same_seed_asks_the_same_whatever_the_timing() -> None:
    slow, fast = FakeSystem(ttft_s=lambda number: 3.0), FakeSystem(ttft_s=lambda number: 0.01)
    plan = Plan(20.0, users=3, max_conversations=12)
    drive(slow, plan)
    drive(fast, plan)
    prompts = [sorted(tuple(r.token_ids.ids) for r in system.requests) for system in (slow, fast)]
    assert prompts[0] == prompts[1]


def test_the_display_tells_how_it_goes() -> None:
    def fails(number: int) -> grpc.StatusCode | None:
        return grpc.StatusCode.RESOURCE_EXHAUSTED if number % 4 == 0 else None

    async def main() -> list[str]:
        run = RunRecord("shown", {})
        driver = Driver(FakeSystem(fails=fails).generate, tokens(), open_loop(10, 4), run)
        await driver.drive()
        run.pool.append(records.PoolSample(1.0, 100, 50, 25, 10, 15, 0, 3, 1))
        run.marks.append(records.Mark(2.0, "kill decoder"))
        return Live(driver).lines()

    first, bad, pool, mark = run_in_virtual_time(main())
    assert "40 sent  0 in flight" in first
    assert "TTFT p50 0.100 s" in first
    assert "10 RESOURCE_EXHAUSTED" in bad
    assert "[##########====------....................]" in pool
    assert "2.0 s: kill decoder" in mark


def test_a_fault_of_the_harness_is_not_hidden() -> None:
    class Broken:
        def conversation(self, index: int) -> None:
            raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        drive(FakeSystem(), open_loop(1, 2), Broken())  # type: ignore[arg-type]
