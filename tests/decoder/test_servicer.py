"""The Decoder service over a real socket, with an engine whose events the test makes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from protos import decoder_pb2 as pb
from protos import decoder_pb2_grpc
from protos.rich_status import error_info, make_status, retry_delay_s
from services.decoder.errors import (
    DecoderError,
    DuplicateRequestError,
    EngineFailedError,
    ManagerUnavailableError,
    PoolExhaustedError,
    QueueFullError,
    ShuttingDownError,
)
from services.decoder.event_router import EventRouter
from services.decoder.request import (
    Admitted,
    Event,
    Failed,
    Finished,
    FinishReason,
    Token,
    TokenLogprobs,
)
from services.decoder.request_parser import Limits, RequestParser
from services.decoder.servicer import DecoderServicer
from services.serving import SERVER_OPTIONS
from tests.decoder.fake_engine import CAPACITY, EOS_ID, TIMEOUT_S, TOKENIZER, FakeEngine, Harness, ids_of
from tests.decoder.tokenizers_for_tests import VOCAB_SIZE
from tests.e2e.streams import receive


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[Harness]:
    engine = FakeEngine()
    router = EventRouter(asyncio.get_running_loop())
    parser = RequestParser(TOKENIZER, None, Limits(VOCAB_SIZE, CAPACITY, "num-1", frozenset({EOS_ID})))
    info = pb.GetModelInfoResponse(model_type="qwen3_moe", numerics_id="num-1", vocab_size=VOCAB_SIZE)
    server = grpc.aio.server(options=SERVER_OPTIONS)
    decoder_pb2_grpc.add_DecoderServicer_to_server(DecoderServicer(engine, router, parser, TOKENIZER, info), server)
    address = f"unix:{tmp_path}/decoder.sock"
    server.add_insecure_port(address)
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        yield Harness(engine, router, decoder_pb2_grpc.DecoderStub(channel))
    await server.stop(0)


def tokens(ids: Sequence[int], first: int = 0) -> list[Event]:
    """Tokens from a position on."""
    return [Token(first + index, token_id, None) for index, token_id in enumerate(ids)]


async def until(condition: Callable[[], bool]) -> None:
    """Waits for a condition, up to TIMEOUT_S."""
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110 - the state of another component
            await asyncio.sleep(0.005)


def parts(responses: Sequence[pb.GenerateResponse]) -> tuple[pb.Started, list[pb.Delta], pb.Finished]:
    """Started, deltas, finished, in that order and nothing else."""
    kinds = [response.WhichOneof("event") for response in responses]
    assert kinds == ["started", *["delta"] * (len(kinds) - 2), "finished"]
    return responses[0].started, [response.delta for response in responses[1:-1]], responses[-1].finished


async def failure(call: Any) -> tuple[grpc.StatusCode, status_pb2.Status]:
    """The code and rich status of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    status = rpc_status.from_call(caught.value)
    assert status is not None
    return caught.value.code(), status


async def test_a_request_streams_from_started_to_finished(harness: Harness) -> None:
    ids = ids_of("he said")
    harness.answer_with(
        [Admitted(2, 41)], tokens(ids[:1]), tokens(ids[1:], 1), [Finished(FinishReason.LENGTH, len(ids), 2)]
    )
    responses = await harness.generate(
        request_id="r1", sampling=pb.SamplingParams(seed=5), stop=pb.StopConditions(max_tokens=len(ids)),
        metadata=(("leasehold-tenant", "acme"),),
    )  # fmt: skip
    started, deltas, finished = parts(responses)
    assert list(started.prompt_token_ids) == [1, 2, 3]
    assert (started.request_id, started.seed, started.max_tokens, started.numerics_id) == ("r1", 5, len(ids), "num-1")
    assert (started.age_ticket, started.num_cached_tokens, started.exact_resume) == (41, 2, False)
    assert [token_id for delta in deltas for token_id in delta.token_ids] == ids
    assert "".join(delta.text for delta in deltas) == "he said"
    assert deltas[0].position == 0
    assert (finished.reason, finished.num_prompt_tokens, finished.num_output_tokens) == (
        pb.FINISH_REASON_LENGTH, 3, len(ids),
    )  # fmt: skip
    assert not finished.HasField("stop_token_id")
    assert harness.engine.submitted[0].tenant == "acme"
    assert harness.engine.aborted == []


async def test_a_stop_token_is_told_and_is_no_part_of_the_text(harness: Harness) -> None:
    ids = [*ids_of("he"), EOS_ID]
    harness.answer_with([Admitted(0, None), *tokens(ids), Finished(FinishReason.STOP, len(ids), 0, EOS_ID)])
    started, deltas, finished = parts(await harness.generate())
    assert started.age_ticket == 0
    assert [(list(delta.token_ids), delta.text) for delta in deltas] == [(ids, "he")]
    assert (finished.reason, finished.stop_token_id) == (pb.FINISH_REASON_STOP, EOS_ID)


async def test_tokens_come_at_once_while_their_text_is_held_back(harness: Harness) -> None:
    first, *rest = ids_of("你")
    harness.answer_with([Admitted(0, None)])
    call = harness.stub.Generate(pb.GenerateRequest(request_id="r", token_ids=pb.TokenIds(ids=[1])), timeout=TIMEOUT_S)
    assert (await call.read()).WhichOneof("event") == "started"
    harness.router.emit([("r", event) for event in tokens([first])])
    delta = (await call.read()).delta
    assert (list(delta.token_ids), delta.text) == ([first], "")
    harness.router.emit([("r", event) for event in tokens(rest, 1)])
    delta = (await call.read()).delta
    assert (delta.position, delta.text) == (1, "你")
    harness.router.emit([("r", Finished(FinishReason.LENGTH, 1 + len(rest), 0))])
    assert (await call.read()).finished.num_output_tokens == 1 + len(rest)


async def test_a_stop_string_ends_the_request_and_drops_later_tokens(harness: Harness) -> None:
    ids = ids_of("abSTOPhe")
    harness.answer_with([Admitted(0, None)], tokens(ids))
    _, deltas, finished = parts(await harness.generate(request_id="r", stop=pb.StopConditions(strings=["TO", "x"])))
    received = [token_id for delta in deltas for token_id in delta.token_ids]
    assert received == ids[: len(received)]
    assert "".join(delta.text for delta in deltas) == "abS"
    assert (finished.reason, finished.stop_string) == (pb.FINISH_REASON_STOP, "TO")
    assert finished.num_output_tokens == len(received) < len(ids)
    await until(lambda: harness.engine.aborted == ["r"])


async def test_the_id_of_a_stream_that_a_stop_string_ended_may_be_used_at_once(harness: Harness) -> None:
    """Although the engine ends it at its next step boundary: until then the new one waits, and hears nothing of the old one."""
    harness.answer_with([Admitted(0, None)], tokens(ids_of("abSTOPhe")))
    parts(await harness.generate(request_id="r", stop=pb.StopConditions(strings=["TO"])))
    harness.answer_with([Admitted(0, None), *tokens(ids_of("new")), Finished(FinishReason.LENGTH, 3, 0)])
    again = asyncio.create_task(harness.generate(request_id="r"))
    await harness.generate(request_id="meanwhile")
    assert [request.request_id for request in harness.engine.submitted] == ["r", "meanwhile"]
    harness.router.emit([("r", event) for event in tokens(ids_of("old"), 8)])
    harness.router.emit([("r", Finished(FinishReason.CANCELLED, 11, 0))])
    _, deltas, _ = parts(await again)
    assert "".join(delta.text for delta in deltas) == "new"


async def test_of_two_that_wait_for_the_same_id_one_gets_it(harness: Harness) -> None:
    harness.answer_with([Admitted(0, None)], tokens(ids_of("abSTOPhe")))
    parts(await harness.generate(request_id="r", stop=pb.StopConditions(strings=["TO"])))
    harness.answer_with([Admitted(0, None)])
    request = pb.GenerateRequest(request_id="r", token_ids=pb.TokenIds(ids=[1]))
    calls = [harness.stub.Generate(request, timeout=TIMEOUT_S) for _ in range(2)]
    reads = [asyncio.ensure_future(call.read()) for call in calls]
    harness.answer_with([Admitted(0, None)])
    await harness.stub.GetModelInfo(pb.GetModelInfoRequest())
    harness.router.emit([("r", Finished(FinishReason.CANCELLED, 8, 0))])
    done = await asyncio.wait_for(asyncio.gather(*reads, return_exceptions=True), TIMEOUT_S)
    refused = [result for result in done if isinstance(result, grpc.aio.AioRpcError)]
    assert [error.code() for error in refused] == [grpc.StatusCode.ALREADY_EXISTS]
    assert len(harness.engine.submitted) == 2


async def test_text_held_back_for_a_stop_string_comes_at_the_end(harness: Harness) -> None:
    ids = ids_of("a STO")
    harness.answer_with([Admitted(0, None)], tokens(ids), [Finished(FinishReason.LENGTH, len(ids), 0)])
    _, deltas, finished = parts(await harness.generate(stop=pb.StopConditions(strings=["STOP"])))
    assert "".join(delta.text for delta in deltas) == "a STO"
    assert finished.stop_string == ""


async def test_logprobs_stand_beside_their_tokens(harness: Harness) -> None:
    logprobs = TokenLogprobs(7, -0.5, [(7, -0.5), (9, -1.5)])
    harness.answer_with([Admitted(0, None), Token(0, 7, logprobs), Finished(FinishReason.LENGTH, 1, 0)])
    _, deltas, _ = parts(await harness.generate(logprobs=2))
    (got,) = deltas[0].logprobs
    assert (got.sampled.token_id, got.sampled.logprob) == (7, -0.5)
    assert [(entry.token_id, entry.logprob) for entry in got.top] == [(7, -0.5), (9, -1.5)]
    assert harness.engine.submitted[0].num_logprobs == 2


def _resume(outputs: Sequence[int], text: str, max_tokens: int = 20) -> pb.Resume:
    sample = pb.SampleProgress(output_token_ids=outputs, delivered_text=text)
    return pb.Resume(
        prompt_token_ids=[1, 2], samples=[sample], seed=3, numerics_id="num-1", max_tokens=max_tokens, age_ticket=6
    )


async def test_a_resumed_stream_goes_on_after_the_delivered_text(harness: Harness) -> None:
    before, after = ids_of("he "), ids_of("said")
    harness.answer_with(
        [Admitted(4, 6)], tokens(after, len(before)), [Finished(FinishReason.LENGTH, len(before) + len(after), 4)]
    )
    started, deltas, finished = parts(await harness.generate(resume=_resume(before, "h")))
    assert started.exact_resume
    assert (list(started.prompt_token_ids), started.num_cached_tokens) == ([1, 2], 2)
    assert (list(deltas[0].token_ids), deltas[0].position) == ([], len(before))
    assert "h" + "".join(delta.text for delta in deltas) == "he said"
    assert [token_id for delta in deltas for token_id in delta.token_ids] == after
    assert finished.num_output_tokens == len(before) + len(after)
    assert harness.engine.submitted[0].output_token_ids == tuple(before)
    assert harness.engine.submitted[0].age_ticket == 6


async def test_resuming_what_a_stop_string_had_ended_needs_no_engine(harness: Harness) -> None:
    outputs = ids_of("heSTO")
    started, deltas, finished = parts(
        await harness.generate(resume=_resume(outputs, "h"), stop=pb.StopConditions(strings=["STO"]))
    )
    assert started.exact_resume
    assert [(list(delta.token_ids), delta.text) for delta in deltas] == [([], "e")]
    assert (finished.reason, finished.stop_string, finished.num_output_tokens) == (
        pb.FINISH_REASON_STOP, "STO", len(outputs),
    )  # fmt: skip
    assert harness.engine.submitted == []


async def test_resuming_what_a_stop_token_had_ended(harness: Harness) -> None:
    outputs = [*ids_of("he"), EOS_ID]
    harness.answer_with([Admitted(0, 6), Finished(FinishReason.STOP, len(outputs), 0, EOS_ID)])
    _, deltas, finished = parts(await harness.generate(resume=_resume(outputs, "he")))
    assert deltas == []
    assert finished.stop_token_id == EOS_ID


async def test_resuming_after_the_last_token_knows_the_half_character_that_ended_the_text(harness: Harness) -> None:
    outputs = ids_of("你")[:1]
    harness.answer_with([Admitted(0, 6), Finished(FinishReason.LENGTH, 1, 0)])
    _, deltas, finished = parts(
        await harness.generate(resume=_resume(outputs, "\N{REPLACEMENT CHARACTER}", max_tokens=1))
    )
    assert deltas == []
    assert finished.reason == pb.FINISH_REASON_LENGTH


async def test_a_wrong_delivered_text_is_refused(harness: Harness) -> None:
    code, status = await failure(harness.generate(resume=_resume(ids_of("he"), "she")))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert _field(status) == "resume.samples[0].delivered_text"


async def test_a_client_that_goes_away_aborts_its_request(harness: Harness) -> None:
    harness.answer_with([Admitted(0, None)])
    call = harness.stub.Generate(pb.GenerateRequest(request_id="gone", token_ids=pb.TokenIds(ids=[1])))
    assert (await call.read()).WhichOneof("event") == "started"
    call.cancel()
    await until(lambda: harness.engine.aborted == ["gone"])


async def test_a_deadline_aborts_its_request_before_and_after_the_start(harness: Harness) -> None:
    for events in ([], [Admitted(0, None)]):
        harness.answer_with(events)
        for timeout_s in (0.2, 1.0, 5.0, 20.0):  # a busy machine may let a short one pass before anything has come
            name = f"late{len(events)}-{timeout_s}"
            request = pb.GenerateRequest(request_id=name, token_ids=pb.TokenIds(ids=[1]))
            received = await receive(harness.stub, request, timeout_s)
            assert received.code is grpc.StatusCode.DEADLINE_EXCEEDED
            is_submitted = any(submitted.request_id == name for submitted in harness.engine.submitted)
            if is_submitted and len(received.responses) == len(events):
                break
        else:
            raise AssertionError("no request met its deadline where it should")
        await until(lambda name=name: name in harness.engine.aborted)  # type: ignore[misc]


async def test_abort_answers_whether_it_found_the_request(harness: Harness) -> None:
    harness.answer_with([Admitted(0, None)])
    call = harness.stub.Generate(pb.GenerateRequest(request_id="r", token_ids=pb.TokenIds(ids=[1])), timeout=TIMEOUT_S)
    await call.read()
    assert (await harness.stub.Abort(pb.AbortRequest(request_id="r"))).found
    assert not (await harness.stub.Abort(pb.AbortRequest(request_id="other"))).found
    harness.router.emit([("r", Finished(FinishReason.CANCELLED, 0, 0))])
    assert (await call.read()).finished.reason == pb.FINISH_REASON_CANCELLED


async def test_a_running_request_keeps_its_id(harness: Harness) -> None:
    harness.answer_with([Admitted(0, None)])
    call = harness.stub.Generate(pb.GenerateRequest(request_id="r", token_ids=pb.TokenIds(ids=[1])), timeout=TIMEOUT_S)
    await call.read()
    code, status = await failure(harness.generate(request_id="r"))
    assert (code, error_info(status).reason) == (grpc.StatusCode.ALREADY_EXISTS, "DUPLICATE_REQUEST_ID")
    harness.router.emit([("r", token) for token in tokens([5])])
    assert list((await call.read()).delta.token_ids) == [5], "the first one goes on"


def _exhausted() -> PoolExhaustedError:
    return PoolExhaustedError(
        make_status(
            grpc.StatusCode.RESOURCE_EXHAUSTED, "cache 7: 4 blocks needed, 1 free", reason="POOL_EXHAUSTED",
            metadata={"cache_id": "7"}, quota_subject="pool", retry_delay_s=0.5,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("error", "code", "delay_s"),
    [
        (ManagerUnavailableError("row S23: paged requests need the KV manager"), grpc.StatusCode.UNAVAILABLE, 1.0),
        (ShuttingDownError("stopping"), grpc.StatusCode.UNAVAILABLE, 1.0),
        (DuplicateRequestError("request_id: taken"), grpc.StatusCode.ALREADY_EXISTS, None),
        (EngineFailedError("a step failed"), grpc.StatusCode.INTERNAL, None),
        (_exhausted(), grpc.StatusCode.RESOURCE_EXHAUSTED, 0.5),
        (QueueFullError(3, 1, 3), grpc.StatusCode.RESOURCE_EXHAUSTED, 1.0),
    ],
)
async def test_row_s30_the_caller_always_gets_the_error(
    harness: Harness, error: DecoderError, code: grpc.StatusCode, delay_s: float | None
) -> None:
    """Whether the engine refuses the request, fails it before its start or in its midst."""
    harness.engine.refusal = error
    got, status = await failure(harness.generate(request_id="r"))
    assert (got, status.message, error_info(status).reason) == (code, str(error), error.reason)
    assert error_info(status).domain == "leasehold"
    assert retry_delay_s(status) == delay_s
    harness.engine.refusal = None
    for events in ([Failed(error)], [Admitted(0, None), *tokens([4]), Failed(error)]):
        harness.answer_with(events)
        got, status = await failure(harness.generate(request_id="r"))
        assert (got, error_info(status).reason) == (code, error.reason)
    assert harness.engine.aborted == [], "the engine has ended it by itself"


async def test_a_full_queue_refuses_before_a_prompt_is_read_but_never_a_resumed_stream(harness: Harness) -> None:
    harness.engine.fullness = QueueFullError(3, 1, 3)
    code, status = await failure(harness.generate(sampling=pb.SamplingParams(temperature=-1)))
    assert (code, error_info(status).reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert "--max-waiting 3" in status.message
    assert any(detail.Is(error_details_pb2.QuotaFailure.DESCRIPTOR) for detail in status.details)
    assert harness.engine.submitted == []
    harness.answer_with([Admitted(0, 6), Finished(FinishReason.LENGTH, 2, 0)])
    parts(await harness.generate(resume=_resume(ids_of("he"), "he")))
    assert [request.is_resumed for request in harness.engine.submitted] == [True]


async def test_tokens_of_before_a_failure_are_delivered(harness: Harness) -> None:
    harness.answer_with([Admitted(0, None), *tokens([4, 5]), Failed(EngineFailedError("x"))])
    call = harness.stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1])), timeout=TIMEOUT_S)
    responses = [await call.read(), await call.read()]
    assert list(responses[1].delta.token_ids) == [4, 5]
    with pytest.raises(grpc.aio.AioRpcError):
        await call.read()


def _field(status: status_pb2.Status) -> str:
    bad = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad) for detail in status.details)
    return str(bad.field_violations[0].field)


async def test_bad_requests_name_their_field_and_the_service_goes_on(harness: Harness) -> None:
    rows: list[tuple[dict[str, Any], grpc.StatusCode, str]] = [
        ({"token_ids": pb.TokenIds()}, grpc.StatusCode.INVALID_ARGUMENT, "token_ids"),
        ({"sampling": pb.SamplingParams(temperature=-1)}, grpc.StatusCode.INVALID_ARGUMENT, "sampling.temperature"),
        ({"n": 17}, grpc.StatusCode.INVALID_ARGUMENT, "n"),
        ({"structured_output": pb.StructuredOutput(regex="a")}, grpc.StatusCode.UNIMPLEMENTED, "structured_output"),
    ]
    for fields, code, name in rows:
        got, status = await failure(harness.generate(**fields))
        assert (got, _field(status)) == (code, name)
    code, status = await failure(harness.generate(stop=pb.StopConditions(max_tokens=CAPACITY)))
    assert (code, error_info(status).reason) == (grpc.StatusCode.OUT_OF_RANGE, "NEVER_FITS")
    assert harness.engine.submitted == []
    harness.answer_with([Admitted(0, None), Finished(FinishReason.LENGTH, 0, 0)])
    parts(await harness.generate())


async def test_tokenize_and_model_info(harness: Harness) -> None:
    reply = await harness.stub.Tokenize(pb.TokenizeRequest(text="he said"))
    assert list(reply.ids) == ids_of("he said")
    code, status = await failure(_awaited(harness.stub.Tokenize(pb.TokenizeRequest(text=""))))
    assert (code, _field(status)) == (grpc.StatusCode.INVALID_ARGUMENT, "text")
    code, _ = await failure(_awaited(harness.stub.Tokenize(pb.TokenizeRequest(chat=pb.Chat()))))
    assert code is grpc.StatusCode.UNIMPLEMENTED
    assert (await harness.stub.GetModelInfo(pb.GetModelInfoRequest())).model_type == "qwen3_moe"


async def _awaited(call: Any) -> Any:
    return await call


async def test_many_streams_share_one_wake_up_a_step(harness: Harness) -> None:
    harness.answer_with([Admitted(0, None)])
    names = [f"r{index}" for index in range(16)]
    runs = [asyncio.create_task(harness.generate(request_id=name)) for name in names]
    await until(lambda: len(harness.engine.submitted) == len(names))
    for position in range(5):
        harness.router.emit([(name, Token(position, 10 * index + position, None)) for index, name in enumerate(names)])
    harness.router.emit([(name, Finished(FinishReason.LENGTH, 5, 0)) for name in names])
    for index, responses in enumerate(await asyncio.gather(*runs)):
        _, deltas, _ = parts(responses)
        received = [token_id for delta in deltas for token_id in delta.token_ids]
        assert received == [10 * index + position for position in range(5)]
