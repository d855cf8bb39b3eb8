"""Requests for several samples over a real socket, with an engine whose events the test makes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos import decoder_pb2 as pb
from protos import decoder_pb2_grpc
from services.decoder.errors import EngineFailedError
from services.decoder.event_router import EventRouter
from services.decoder.request import Admitted, Event, Failed, Finished, FinishReason, Token, sample_id
from services.decoder.request_parser import Limits, RequestParser
from services.decoder.servicer import DecoderServicer
from tests.decoder.fake_engine import CAPACITY, EOS_ID, TIMEOUT_S, TOKENIZER, FakeEngine, Harness, ids_of
from tests.decoder.tokenizers_for_tests import VOCAB_SIZE


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[Harness]:
    engine = FakeEngine()
    router = EventRouter(asyncio.get_running_loop())
    parser = RequestParser(TOKENIZER, None, Limits(VOCAB_SIZE, CAPACITY, "num-1", frozenset({EOS_ID})))
    info = pb.GetModelInfoResponse(numerics_id="num-1")
    server = grpc.aio.server()
    decoder_pb2_grpc.add_DecoderServicer_to_server(DecoderServicer(engine, router, parser, TOKENIZER, info), server)
    address = f"unix:{tmp_path}/decoder.sock"
    server.add_insecure_port(address)
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        yield Harness(engine, router, decoder_pb2_grpc.DecoderStub(channel))
    await server.stop(0)


class Client:
    """One open request of the name "r" for several samples, and what it has received."""

    def __init__(self, harness: Harness, num: int, **fields: Any) -> None:
        if "resume" not in fields:
            fields["token_ids"] = pb.TokenIds(ids=[1, 2, 3])
        self.harness = harness
        self.call = harness.stub.Generate(pb.GenerateRequest(request_id="r", n=num, **fields), timeout=TIMEOUT_S)
        self.responses: list[pb.GenerateResponse] = []

    def emit(self, *events: tuple[int, Event]) -> None:
        """One step's events, each with its sample's index."""
        self.harness.router.emit([(sample_id("r", index), event) for index, event in events])

    async def read(self, num: int) -> list[pb.GenerateResponse]:
        """The next responses."""
        came = [await self.call.read() for _ in range(num)]
        self.responses += came
        return came

    async def rest(self) -> list[pb.GenerateResponse]:
        """All responses up to the end."""
        while (response := await self.call.read()) is not grpc.aio.EOF:
            self.responses.append(response)
        return self.responses

    def text(self, index: int) -> str:
        return "".join(r.delta.text for r in self.responses if r.delta.sample_index == index)

    def token_ids(self, index: int) -> list[int]:
        return [i for r in self.responses if r.delta.sample_index == index for i in r.delta.token_ids]

    def finished(self) -> dict[int, pb.Finished]:
        ends = [r.finished for r in self.responses if r.HasField("finished")]
        assert len({end.sample_index for end in ends}) == len(ends)
        return {end.sample_index: end for end in ends}


async def until_submitted(harness: Harness, num: int) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while len(harness.engine.submitted) < num:  # noqa: ASYNC110 - the state of another component
            await asyncio.sleep(0.005)


def tokens(index: int, ids: Sequence[int], first: int = 0) -> list[tuple[int, Event]]:
    return [(index, Token(first + at, token_id, None)) for at, token_id in enumerate(ids)]


async def test_samples_start_once_and_end_each_for_itself(harness: Harness) -> None:
    one, two = ids_of("he"), ids_of("said")
    client = Client(harness, 2)
    await until_submitted(harness, 2)
    assert [request.sample_index for request in harness.engine.submitted] == [0, 1]
    client.emit((0, Admitted(1, 9)), *tokens(0, one[:1]))
    [started, _] = await client.read(2)
    assert (started.started.request_id, started.started.age_ticket, started.started.num_cached_tokens) == ("r", 9, 1)
    client.emit((1, Admitted(2, 9)), *tokens(1, two), *tokens(0, one[1:], 1))
    client.emit((1, Finished(FinishReason.STOP, len(two), 2)))
    client.emit((0, Finished(FinishReason.LENGTH, len(one), 1)))
    responses = await client.rest()
    assert [r.WhichOneof("event") for r in responses].count("started") == 1
    assert (client.text(0), client.text(1)) == ("he", "said")
    assert (client.token_ids(0), client.token_ids(1)) == (one, two)
    ends = client.finished()
    assert (ends[0].reason, ends[0].num_cached_tokens) == (pb.FINISH_REASON_LENGTH, 1)
    assert (ends[1].reason, ends[1].num_cached_tokens) == (pb.FINISH_REASON_STOP, 2)
    assert harness.engine.aborted == []


async def test_started_comes_before_the_end_of_a_sample_that_never_ran(harness: Harness) -> None:
    client = Client(harness, 2)
    await until_submitted(harness, 2)
    client.emit((0, Finished(FinishReason.CANCELLED, 0, 0)), (1, Admitted(0, None)), *tokens(1, ids_of("he")))
    client.emit((1, Finished(FinishReason.LENGTH, len(ids_of("he")), 0)))
    responses = await client.rest()
    assert responses[0].WhichOneof("event") == "started"
    assert client.finished()[0].reason == pb.FINISH_REASON_CANCELLED
    assert client.text(1) == "he"


async def test_a_stop_string_ends_its_own_sample_only(harness: Harness) -> None:
    client = Client(harness, 2, stop=pb.StopConditions(strings=["STOP"]))
    await until_submitted(harness, 2)
    one, two = ids_of("aSTOPb"), ids_of("he said")
    client.emit((0, Admitted(0, 9)), (1, Admitted(0, 9)), *tokens(0, one))
    await client.read(3)
    assert client.finished()[0].stop_string == "STOP"
    client.emit(*tokens(1, two))
    await client.read(1)
    assert harness.engine.aborted == ["r"], "at once, and once, while the other goes on"
    client.emit((1, Finished(FinishReason.LENGTH, len(two), 0)))
    await client.rest()
    assert (client.text(0), client.text(1)) == ("a", "he said")
    assert harness.engine.aborted == ["r"]


async def test_abort_and_disconnection_end_every_sample_that_runs(harness: Harness) -> None:
    for way in ("abort", "cancel"):
        harness.engine.submitted.clear()
        harness.engine.aborted.clear()
        client = Client(harness, 3)
        await until_submitted(harness, 3)
        client.emit((0, Admitted(0, 9)), (1, Admitted(0, 9)), (1, Finished(FinishReason.STOP, 0, 0)))
        await client.read(2)
        if way == "abort":
            assert (await harness.stub.Abort(pb.AbortRequest(request_id="r"))).found
            assert {"r", sample_id("r", 2)} <= set(harness.engine.aborted)
            client.emit((0, Finished(FinishReason.CANCELLED, 0, 0)), (2, Finished(FinishReason.CANCELLED, 0, 0)))
            await client.rest()
            assert client.finished()[2].reason == pb.FINISH_REASON_CANCELLED
        else:
            client.call.cancel()
            async with asyncio.timeout(TIMEOUT_S):
                while harness.engine.aborted != ["r", sample_id("r", 2)]:  # noqa: ASYNC110 - of another component
                    await asyncio.sleep(0.005)
        assert not (await harness.stub.Abort(pb.AbortRequest(request_id="r"))).found


async def test_an_id_stays_taken_while_any_of_its_samples_runs(harness: Harness) -> None:
    client = Client(harness, 2)
    await until_submitted(harness, 2)
    client.emit((0, Admitted(0, 9)), (0, Finished(FinishReason.STOP, 0, 0)))
    await client.read(2)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await harness.generate(request_id="r")
    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
    client.emit((1, Admitted(0, 9)), (1, Finished(FinishReason.STOP, 0, 0)))
    await client.rest()
    harness.answer_with([Admitted(0, None), Finished(FinishReason.LENGTH, 0, 0)])
    assert len(await harness.generate(request_id="r")) == 2


async def test_a_sample_that_fails_fails_the_request_and_ends_the_others(harness: Harness) -> None:
    client = Client(harness, 3)
    await until_submitted(harness, 3)
    client.emit((0, Admitted(0, 9)), (1, Failed(EngineFailedError("no"))))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.rest()
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert harness.engine.aborted == ["r", sample_id("r", 2)]
    # Who asks again at once waits until the engine has ended the last of them.
    harness.answer_with([Admitted(0, None), Finished(FinishReason.LENGTH, 0, 0)])
    again = asyncio.create_task(harness.generate(request_id="r", n=3))
    client.emit((0, Finished(FinishReason.CANCELLED, 0, 0)))
    await harness.generate(request_id="meanwhile")
    assert len(harness.engine.submitted) == 4
    client.emit((2, Finished(FinishReason.CANCELLED, 0, 0)))
    assert len(await again) == 4


async def test_a_request_whose_first_sample_is_refused_never_starts(harness: Harness) -> None:
    client = Client(harness, 2)
    await until_submitted(harness, 2)
    refusal, admission = (0, Failed(EngineFailedError("no"))), (1, Admitted(0, 9))
    client.emit(refusal, admission, *tokens(1, ids_of("he")))
    client.emit((1, Finished(FinishReason.CANCELLED, 0, 0)))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.rest()
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert client.responses == []


def _resume(*samples: tuple[Sequence[int], str], max_tokens: int = 20) -> pb.Resume:
    progress = [pb.SampleProgress(output_token_ids=ids, delivered_text=text) for ids, text in samples]
    return pb.Resume(
        prompt_token_ids=[1, 2], samples=progress, seed=3, numerics_id="num-1", max_tokens=max_tokens, age_ticket=6
    )


async def test_samples_resume_where_each_was_and_finished_ones_end_at_once(harness: Harness) -> None:
    stopped, running, fresh = ids_of("heSTO"), ids_of("he "), ids_of("said")
    resume = _resume((stopped, "h"), (running, "h"), ([], ""))
    client = Client(harness, 3, resume=resume, stop=pb.StopConditions(strings=["STO"]))
    await until_submitted(harness, 2)
    assert [request.sample_index for request in harness.engine.submitted] == [1, 2]
    client.emit((1, Admitted(2, 6)))
    await client.read(4)
    assert client.responses[0].started.exact_resume
    assert client.finished()[0].num_output_tokens == len(stopped)
    assert (client.text(0), client.text(1)) == ("e", "e ")
    client.emit((2, Admitted(1, 6)), *tokens(2, fresh), *tokens(1, ids_of("x"), len(running)))
    client.emit((1, Finished(FinishReason.LENGTH, len(running) + 1, 2)), (2, Finished(FinishReason.STOP, 4, 1)))
    await client.rest()
    assert (client.text(1), client.text(2)) == ("e x", "said")
    assert client.finished().keys() == {0, 1, 2}


async def test_resuming_samples_that_stop_strings_had_all_ended_needs_no_engine(harness: Harness) -> None:
    ids = ids_of("heSTO")
    client = Client(harness, 2, resume=_resume((ids, "he"), (ids, "")), stop=pb.StopConditions(strings=["STO"]))
    await client.rest()
    assert (client.text(0), client.text(1)) == ("", "he")
    assert client.finished().keys() == {0, 1}
    assert harness.engine.submitted == []


async def test_a_wrong_delivered_text_names_its_sample(harness: Harness) -> None:
    client = Client(harness, 2, resume=_resume(([], ""), (ids_of("he"), "she")))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.rest()
    assert "resume.samples[1].delivered_text" in str(caught.value.details())
