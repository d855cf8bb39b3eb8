"""A decoder's figures: what requests, asks for blocks and steps leave in them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import structlog

from protos import decoder_pb2 as pb
from services.decoder.engine import Engine, EngineSettings, LoadedModel
from services.decoder.errors import EngineFailedError, QueueFullError
from services.decoder.lease_watch import LeaseMeter, LeaseWatch
from services.decoder.leases import KvGeometry, LeaseGranted, LeaseRevoked
from services.decoder.metrics import DecoderCollector
from services.decoder.request import Admitted, DecodeRequest, SamplingParams, Token
from services.decoder.request_meter import RequestFigures
from services.decoder.scheduler import Scheduler
from services.decoder.sequence import Chunk, Sequence
from services.decoder.step_meter import PARTS, StepMeter


class Ticks:
    """A clock that the test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Ticks:
    return Ticks()


def test_latencies_of_a_request(clock: Ticks) -> None:
    figures = RequestFigures(clock)
    clock.now = 10.0
    meter = figures.request()
    clock.now = 11.0
    meter.submit(20)
    assert (figures.num_waiting, figures.num_running) == (1, 0)
    clock.now = 13.0
    meter.take({"r": [Admitted(16, 5, cache_id=7)]})
    assert (figures.num_waiting, figures.num_running, meter.cache_id) == (0, 1, 7)
    for position, clock.now in enumerate((14.0, 14.5, 16.0)):
        meter.take({"r": [Token(position, 1, None)]})
    clock.now = 17.0
    meter.end("length")
    assert (figures.num_waiting, figures.num_running) == (0, 0)
    assert figures.queue.sum == 2.0
    assert figures.ttft.sum == 4.0
    assert (figures.itl.sum, figures.itl.count) == (2.0, 2)
    assert figures.tpot.sum == 1.0
    assert figures.e2e.sum == 7.0
    assert (figures.num_prompt_tokens, figures.num_cached_tokens) == (20, 16)
    assert figures.outcomes["length"] == 1


@pytest.mark.parametrize("outcome", ["cancelled", "disconnected", "failed"])
def test_an_answer_that_is_not_whole_has_no_latency_of_its_whole(clock: Ticks, outcome: str) -> None:
    figures = RequestFigures(clock)
    meter = figures.request()
    meter.submit(1)
    meter.take({"r": [Admitted(0, None), Token(0, 1, None), Token(1, 1, None)]})
    meter.end(outcome, EngineFailedError("x") if outcome == "failed" else None)
    assert (figures.e2e.count, figures.tpot.count, figures.ttft.count) == (0, 0, 1)
    assert figures.num_running == 0
    assert figures.outcomes[outcome] == 1
    assert figures.errors == ({"ENGINE_FAILED": 1} if outcome == "failed" else {})


def test_a_request_that_is_over_before_it_was_admitted_leaves_no_gauge(clock: Ticks) -> None:
    figures = RequestFigures(clock)
    waiting, refused = figures.request(), figures.request()
    waiting.submit(1)
    waiting.end("disconnected")
    refused.end("refused", QueueFullError(1, 1, 1))
    assert (figures.num_waiting, figures.num_running) == (0, 0)
    assert figures.errors == {"QUEUE_FULL": 1}


def test_asks_for_blocks_are_timed_until_their_answer(clock: Ticks) -> None:
    meter = LeaseMeter(clock)
    meter.ask("acquire", 1)
    meter.ask("acquire", 2)
    meter.withdraw(2)
    clock.now = 0.5
    meter.answer(1, is_granted=True)
    meter.ask("extend", 1)
    clock.now = 2.5
    meter.answer(1, is_granted=False)
    meter.answer(2, is_granted=True)
    meter.answer(3, is_granted=True)
    assert (meter.waits["acquire"].sum, meter.waits["acquire"].count) == (0.5, 1)
    assert (meter.waits["extend"].sum, meter.waits["extend"].count) == (2.0, 1)
    assert meter.num_refused == 1


def chunk(num_tokens: int, num_remaining: int) -> Chunk:
    """A chunk of a sequence that has so many tokens to go."""
    return Chunk(cast(Any, SimpleNamespace(num_remaining=num_remaining)), num_tokens)


def test_a_step_is_timed_by_part_and_counted_by_phase(clock: Ticks) -> None:
    meter = StepMeter(clock)
    meter.begin()
    for number, part in enumerate(PARTS[:-1], 1):
        if part == "fill":
            meter.note_batch([chunk(1, 1), chunk(1, 1), chunk(30, 100), chunk(1, 9)], 2)
        clock.now += number
        meter.mark(part)
    clock.now += 100
    meter.end()
    assert {part: histogram.sum for part, histogram in meter.parts.items()} == {
        "schedule": 1,
        "fill": 2,
        "forward": 3,
        "commit": 4,
        "tokens": 5,
        "emit": 100,
    }
    assert (meter.steps.sum, meter.steps.count) == (115, 1)
    assert (meter.num_prefill_tokens, meter.num_decode_tokens, meter.num_generated) == (31, 2, 2)
    assert meter.batch_sizes.sum == 4


def test_an_idle_turn_and_a_failed_step_are_no_steps(clock: Ticks) -> None:
    meter = StepMeter(clock)
    meter.begin()
    meter.mark("schedule")
    meter.end()
    meter.begin()
    meter.note_batch([chunk(1, 1)], 1)
    meter.fail()
    meter.end()
    assert (meter.steps.count, meter.num_generated, meter.num_failed) == (0, 0, 1)


class QuietPort:
    """A port of leases that only remembers; its answers are the test's."""

    def __init__(self) -> None:
        self.post: Any = None
        self.calls: list[str] = []

    def bind(self, geometry: KvGeometry, post: Any, busy_ms: Any) -> None:
        self.post = post

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: self.calls.append(name)


def never() -> LoadedModel:
    """A model that is not needed."""
    raise AssertionError("not started")


async def test_the_watch_times_what_passes_through_it() -> None:
    port = QuietPort()
    watch = LeaseWatch(cast(Any, port))
    watch.bind(cast(Any, None), lambda message: None, lambda: None)
    watch.acquire(cast(Any, SimpleNamespace(cache_id=1)))
    port.post(LeaseGranted(1, (0,), 0, None))
    port.post(LeaseRevoked(1))
    watch.extend(cast(Any, SimpleNamespace(cache_id=1)))
    watch.release(1)
    assert watch.meter.waits["acquire"].count == 1
    assert watch.meter.waits["extend"].count == 0
    assert port.calls == ["acquire", "extend", "release"]


async def test_a_decoder_that_starts_has_figures_of_requests_only() -> None:
    collector = DecoderCollector(RequestFigures())
    early = {family.name for family in collector.collect()}
    collector.watch = watch = LeaseWatch(cast(Any, QuietPort()))
    collector.engine = Engine(never, watch, EngineSettings(), lambda events: None)
    collector.info = pb.GetModelInfoResponse(worker_id="w", max_seqs=4)
    whole = {family.name for family in collector.collect()}
    assert "leasehold_decoder_ttft_seconds" in early
    assert whole - early >= {"leasehold_decoder_step_part_seconds", "leasehold_decoder_can_serve", "leasehold_decoder"}


def test_log_lines_of_a_preempted_request_name_it_and_its_lease() -> None:
    scheduler = Scheduler(EngineSettings(), cast(Any, QuietPort()))
    scheduler.set_pool(16)
    scheduler.add(Sequence(DecodeRequest("r1", [1, 2, 3], SamplingParams(), 4), 0))
    scheduler.plan()
    with structlog.testing.capture_logs() as lines:
        scheduler.granted(LeaseGranted(1, (0,), 0, 1))
        scheduler.preempt(1)
        scheduler.preempt(1)
        scheduler.plan()
        scheduler.granted(LeaseGranted(2, (0,), 0, 1))
    assert [(line["event"], line["request_id"], line["cache_id"]) for line in lines] == [
        ("preempted", "r1", 1),
        ("resumed", "r1", 2),
    ]
    assert scheduler.num_preempted == 1
