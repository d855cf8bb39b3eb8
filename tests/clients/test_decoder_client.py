"""The client library against a scripted server: streams that break anywhere go on exactly."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clients.decoder import DecoderClient
from clients.errors import (
    BadTargetError,
    DeadlineError,
    DecoderUnavailable,
    ExhaustedError,
    ProtocolError,
    RequestRefusedError,
    UnavailableError,
)
from clients.events import Event, Finished, FinishReason, Started, StreamBroken, StreamResumed, Tokens
from protos import decoder_pb2 as pb
from tests.clients.conftest import DEADLINES_S, Serve
from tests.clients.fake_decoder import AGE_TICKET, PROMPT_IDS, Answer, FakeDecoder, FakeTime

if TYPE_CHECKING:
    from tests.clients.fake_decoder import Context

ANSWER = Answer(["He", "llo", ", ", "wör", "ld", "!"], group=2, lag=1)
REQUEST = pb.GenerateRequest(text="say hello", stop=pb.StopConditions(max_tokens=9))
NUM_EVENTS = 6  # started, three pairs of tokens, the text held back, finished


async def collect(stream: AsyncIterator[Event]) -> list[Event]:
    return [event async for event in stream]


def ids_of(events: list[Event], sample_index: int = 0) -> list[int]:
    return [i for e in events if isinstance(e, Tokens) and e.sample_index == sample_index for i in e.token_ids]


def text_of(events: list[Event], sample_index: int = 0) -> str:
    return "".join(e.text for e in events if isinstance(e, Tokens) and e.sample_index == sample_index)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def test_a_whole_stream_is_started_tokens_finished(serve_decoder: Serve) -> None:
    async with DecoderClient(await serve_decoder(FakeDecoder(ANSWER))) as client:
        events = await collect(client.generate(REQUEST))
    started, *tokens, finished = events
    assert isinstance(started, Started)
    assert started.prompt_token_ids == PROMPT_IDS
    assert started.num_cached_tokens == 2
    assert all(isinstance(event, Tokens) for event in tokens)
    assert (ids_of(events), text_of(events)) == (ANSWER.token_ids, ANSWER.text)
    assert isinstance(finished, Finished)
    assert finished.reason is FinishReason.STOP
    assert finished.stop_token_id == 0


async def test_every_pair_of_cuts_leaves_tokens_and_text_exact(serve_decoder: Serve) -> None:
    decoder = FakeDecoder(ANSWER)
    async with DecoderClient(await serve_decoder(decoder), waiting=FakeTime().waiting()) as client:
        for cuts in itertools.product(range(NUM_EVENTS + 1), repeat=2):
            decoder.cuts, decoder.requests = list(cuts), []
            events = await collect(client.generate(REQUEST))
            assert (ids_of(events), text_of(events)) == (ANSWER.token_ids, ANSWER.text), cuts
            assert sum(isinstance(event, Started) for event in events) == 1, cuts
            assert sum(isinstance(event, Finished) for event in events) == 1, cuts
            positions = [event.position for event in events if isinstance(event, Tokens)]
            assert positions == sorted(positions), cuts


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.lists(st.text(max_size=3), max_size=12),
    group=st.integers(1, 4),
    lag=st.integers(0, 3),
    cuts=st.lists(st.integers(0, 12), max_size=5),
    num_samples=st.integers(1, 3),
)
async def test_any_answer_survives_any_cuts(
    serve_decoder: Serve, pieces: list[str], group: int, lag: int, cuts: list[int], num_samples: int
) -> None:
    answer = Answer(pieces, group, lag)
    decoder = FakeDecoder(answer, cuts)
    async with DecoderClient(await serve_decoder(decoder), waiting=FakeTime().waiting()) as client:
        events = await collect(client.generate(pb.GenerateRequest(text="x", n=num_samples)))
    for index in range(num_samples):
        assert ids_of(events, index) == answer.token_ids
        assert text_of(events, index) == answer.text
    assert sum(isinstance(event, Finished) for event in events) == num_samples


async def test_the_resume_says_all_that_the_client_has(serve_decoder: Serve) -> None:
    decoder = FakeDecoder(ANSWER, cuts=[2])
    request = pb.GenerateRequest(text="x", sampling=pb.SamplingParams(temperature=1.0, seed=0))
    async with DecoderClient(await serve_decoder(decoder), waiting=FakeTime().waiting()) as client:
        events = await collect(client.generate(request))
    first, second = decoder.requests
    assert first.text == "x"
    assert second.WhichOneof("prompt") is None
    assert list(second.resume.prompt_token_ids) == list(PROMPT_IDS)
    assert list(second.resume.samples[0].output_token_ids) == ANSWER.token_ids[:2]
    assert second.resume.samples[0].delivered_text == "He"
    assert second.resume.seed == 0
    assert second.resume.numerics_id == "fake-1"
    assert second.resume.age_ticket == AGE_TICKET
    assert second.resume.max_tokens == 64
    assert second.request_id == first.request_id != ""
    resumed = next(event for event in events if isinstance(event, StreamResumed))
    assert resumed.exact
    assert resumed.num_output_tokens == 2


async def test_a_drawn_seed_is_sent_and_kept_over_a_break_before_started(serve_decoder: Serve) -> None:
    decoder = FakeDecoder(ANSWER, cuts=[0])
    async with DecoderClient(await serve_decoder(decoder), waiting=FakeTime().waiting()) as client:
        await collect(client.generate(pb.GenerateRequest(text="x", sampling=pb.SamplingParams(temperature=0.8))))
    first, second = decoder.requests
    assert first.sampling.HasField("seed")
    assert first.sampling.seed == second.sampling.seed


async def test_another_target_takes_over_and_an_inexact_resume_is_told(serve_decoder: Serve) -> None:
    broken, other = FakeDecoder(ANSWER, cuts=[2]), FakeDecoder(ANSWER, numerics_id="fake-2")
    targets = [await serve_decoder(broken), await serve_decoder(other)]
    async with DecoderClient(targets, waiting=FakeTime().waiting()) as client:
        events = await collect(client.generate(REQUEST))
    assert text_of(events) == ANSWER.text
    break_event = next(event for event in events if isinstance(event, StreamBroken))
    assert break_event.next_target == targets[1]
    resumed = next(event for event in events if isinstance(event, StreamResumed))
    assert not resumed.exact
    assert resumed.target == targets[1]


async def test_an_unreachable_decoder_is_retried_until_the_limit() -> None:
    time = FakeTime()
    async with DecoderClient(f"127.0.0.1:{free_port()}", waiting=time.waiting()) as client:
        with pytest.raises(DecoderUnavailable) as caught:
            await collect(client.generate(REQUEST, retry_for_s=10.0))
    assert time.now == pytest.approx(10.0)
    assert caught.value.num_attempts == len(time.waits) + 1
    assert time.waits[:-1] == sorted(time.waits[:-1])


async def test_no_retry_when_retry_for_is_zero() -> None:
    time = FakeTime()
    async with DecoderClient(f"127.0.0.1:{free_port()}", waiting=time.waiting()) as client:
        with pytest.raises(UnavailableError):
            await collect(client.generate(REQUEST, retry_for_s=0.0))
    assert time.waits == []


async def test_progress_resets_the_retry_limit(serve_decoder: Serve) -> None:
    answer = Answer(["a"] * 60)
    decoder = FakeDecoder(answer, cuts=[2] * 59)  # one token a connection
    time = FakeTime()
    async with DecoderClient(await serve_decoder(decoder), waiting=time.waiting()) as client:
        events = await collect(client.generate(REQUEST, retry_for_s=1.0))
    assert ids_of(events) == answer.token_ids
    assert time.now > 1.0


async def test_a_decoder_that_only_starts_is_no_progress(serve_decoder: Serve) -> None:
    decoder = FakeDecoder(ANSWER, cuts=[1] * 1000)
    time = FakeTime()
    async with DecoderClient(await serve_decoder(decoder), waiting=time.waiting()) as client:
        with pytest.raises(DecoderUnavailable):
            await collect(client.generate(REQUEST, retry_for_s=10.0))
    assert time.now == pytest.approx(10.0)


async def test_a_single_decoder_is_given_the_time_it_asks_for(serve_decoder: Serve) -> None:
    decoder = FakeDecoder(ANSWER)
    decoder.refusal, decoder.num_refusals = (grpc.StatusCode.UNAVAILABLE, "MANAGER_UNAVAILABLE", ""), 1
    time = FakeTime()
    async with DecoderClient(await serve_decoder(decoder), waiting=time.waiting()) as client:
        events = await collect(client.generate(REQUEST))
    assert text_of(events) == ANSWER.text
    assert time.waits == [1.5]


async def test_a_call_that_met_a_decoder_in_the_moment_of_its_stop_is_sent_again(serve_decoder: Serve) -> None:
    decoder = FakeDecoder(ANSWER)
    decoder.refusal, decoder.num_refusals = (grpc.StatusCode.CANCELLED, "", ""), 1
    async with DecoderClient(await serve_decoder(decoder), waiting=FakeTime().waiting()) as client:
        events = await collect(client.generate(REQUEST))
    assert text_of(events) == ANSWER.text
    assert [event.error.code for event in events if isinstance(event, StreamBroken)] == [grpc.StatusCode.CANCELLED]


async def test_a_refusal_is_typed_and_not_retried(serve_decoder: Serve) -> None:
    decoder = FakeDecoder(ANSWER)
    decoder.refusal = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", "sampling.temperature")
    async with DecoderClient(await serve_decoder(decoder)) as client:
        with pytest.raises(RequestRefusedError) as caught:
            await collect(client.generate(REQUEST))
    details = caught.value.details
    assert details.code is grpc.StatusCode.INVALID_ARGUMENT
    assert details.reason == "INVALID_REQUEST"
    assert details.field == "sampling.temperature"
    assert details.metadata == {"limit": "7"}
    assert len(decoder.requests) == 1


async def test_a_full_pool_says_when_to_come_back(serve_decoder: Serve) -> None:
    decoder = FakeDecoder(ANSWER)
    decoder.refusal = (grpc.StatusCode.RESOURCE_EXHAUSTED, "POOL_EXHAUSTED", "")
    async with DecoderClient(await serve_decoder(decoder)) as client:
        with pytest.raises(ExhaustedError) as caught:
            await collect(client.generate(REQUEST))
    assert caught.value.details.retry_delay_s == 1.5


@pytest.mark.parametrize("num_full", [1, 2])
async def test_a_full_queue_is_one_decoders_and_each_of_the_others_is_asked_once(
    serve_decoder: Serve, num_full: int
) -> None:
    decoders = [FakeDecoder(ANSWER), FakeDecoder(ANSWER)]
    for decoder in decoders[:num_full]:
        decoder.refusal = (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", "")
    targets = [await serve_decoder(decoder) for decoder in decoders]
    async with DecoderClient(targets, waiting=FakeTime().waiting()) as client:
        if num_full == 1:
            assert text_of(await collect(client.generate(REQUEST))) == ANSWER.text
        else:
            with pytest.raises(ExhaustedError) as caught:
                await collect(client.generate(REQUEST))
            assert caught.value.details.retry_delay_s == 1.5
    assert [len(decoder.requests) for decoder in decoders] == [1, 1]


async def test_a_full_queue_is_told_at_once_where_no_other_decoder_may_be_asked(serve_decoder: Serve) -> None:
    decoders = [FakeDecoder(ANSWER), FakeDecoder(ANSWER)]
    decoders[0].refusal = (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", "")
    targets = [await serve_decoder(decoder) for decoder in decoders]
    for wanted, retry_for_s in ((targets[:1], 60.0), (targets, 0.0)):
        async with DecoderClient(wanted) as client:
            with pytest.raises(ExhaustedError):
                await collect(client.generate(REQUEST, retry_for_s=retry_for_s))
    assert decoders[1].requests == []


async def test_its_own_ghost_is_aborted_and_waited_for(serve_decoder: Serve) -> None:
    decoder = FakeDecoder(ANSWER, cuts=[2])
    async with DecoderClient(await serve_decoder(decoder), waiting=FakeTime().waiting()) as client:
        events: list[Event] = []
        async for event in client.generate(REQUEST):
            events.append(event)
            if isinstance(event, StreamBroken) and len(decoder.requests) == 1:
                decoder.refusal, decoder.num_refusals = (grpc.StatusCode.ALREADY_EXISTS, "DUPLICATE_REQUEST_ID", ""), 1
    assert text_of(events) == ANSWER.text
    assert decoder.aborted == [decoder.requests[0].request_id]


async def test_closing_the_iterator_cancels_the_request(serve_decoder: Serve) -> None:
    decoder = FakeDecoder(ANSWER)
    decoder.hangs_after = 2
    async with DecoderClient(await serve_decoder(decoder)) as client:
        async with aclosing(client.generate(REQUEST)) as stream:
            async for event in stream:
                if isinstance(event, Tokens):
                    break
        await asyncio.wait_for(decoder.cancelled.wait(), 30)


async def test_cancelling_the_task_cancels_the_request(serve_decoder: Serve) -> None:
    decoder = FakeDecoder(ANSWER)
    decoder.hangs_after = 1
    async with DecoderClient(await serve_decoder(decoder)) as client:
        stream = client.generate(REQUEST)
        assert isinstance(await anext(stream), Started)
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.wait_for(decoder.cancelled.wait(), 30)


async def test_the_deadline_ends_a_silent_stream(serve_decoder: Serve) -> None:
    decoder = FakeDecoder(ANSWER)
    decoder.hangs_after = 2
    async with DecoderClient(await serve_decoder(decoder)) as client:
        for timeout_s in DEADLINES_S:
            events: list[Event] = []

            async def collect_until_it_fails(timeout_s: float = timeout_s, events: list[Event] = events) -> None:
                async for event in client.generate(REQUEST, timeout_s=timeout_s):
                    events.append(event)

            with pytest.raises(DeadlineError):
                await collect_until_it_fails()
            if len(ids_of(events)) == 2:
                break
    assert ids_of(events) == ANSWER.token_ids[:2]


async def test_the_deadline_ends_the_retries() -> None:
    time = FakeTime()
    async with DecoderClient(f"127.0.0.1:{free_port()}", waiting=time.waiting()) as client:
        with pytest.raises(DeadlineError):
            await collect(client.generate(REQUEST, retry_for_s=100.0, timeout_s=5.0))
    assert time.now == pytest.approx(5.0)


@pytest.mark.parametrize("position", [0, 3])
async def test_a_gap_or_a_repeat_is_a_protocol_error(serve_decoder: Serve, position: int) -> None:
    class Jumping(FakeDecoder):
        async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
            yield pb.GenerateResponse(started=pb.Started())
            yield pb.GenerateResponse(delta=pb.Delta(position=0, token_ids=[1, 2]))
            yield pb.GenerateResponse(delta=pb.Delta(position=position, token_ids=[3]))

    async with DecoderClient(await serve_decoder(Jumping(ANSWER))) as client:
        with pytest.raises(ProtocolError, match=f"position {position}"):
            await collect(client.generate(REQUEST))


async def test_a_stream_that_just_ends_is_a_protocol_error(serve_decoder: Serve) -> None:
    class Ending(FakeDecoder):
        async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
            yield pb.GenerateResponse(started=pb.Started())

    async with DecoderClient(await serve_decoder(Ending(ANSWER))) as client:
        with pytest.raises(ProtocolError, match="ended the stream"):
            await collect(client.generate(REQUEST))


async def test_unary_calls_go_round_the_targets(serve_decoder: Serve) -> None:
    decoder = FakeDecoder(ANSWER)
    targets = [f"127.0.0.1:{free_port()}", await serve_decoder(decoder)]
    async with DecoderClient(targets, waiting=FakeTime().waiting()) as client:
        assert (await client.model_info(retry_for_s=5.0)).name == "fake"
        assert await client.tokenize(pb.TokenizeRequest(text="x"), retry_for_s=5.0) == list(PROMPT_IDS)
        with pytest.raises(UnavailableError):
            await client.abort("nobody")


async def test_requests_take_the_targets_in_turn(serve_decoder: Serve) -> None:
    decoders = [FakeDecoder(ANSWER), FakeDecoder(ANSWER)]
    async with DecoderClient([await serve_decoder(decoder) for decoder in decoders]) as client:
        for _ in range(4):
            await collect(client.generate(REQUEST))
    assert [len(decoder.requests) for decoder in decoders] == [2, 2]


@pytest.mark.parametrize("target", ["nonsense", "host:0", "host:99999", ":5", "unix:", "unix:///", "a b:5"])
def test_a_bad_address_is_refused_with_the_fix(target: str) -> None:
    with pytest.raises(BadTargetError, match="write"):
        DecoderClient(target)
