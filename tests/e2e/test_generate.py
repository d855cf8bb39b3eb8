"""Generate from end to end: real processes, real sockets, the bundled model."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from protos import decoder_pb2 as pb
from tests.e2e.processes import DEMO_MODEL, Decoder, Manager, Processes
from tests.e2e.streams import DEADLINES_S, TIMEOUT_S, chat, long_request, open_stream, receive, receive_rest, stub_of

pytest.importorskip("mlx.core")


@dataclass(frozen=True)
class Pair:
    """A manager and a decoder that the tests of this file share; each leaves the pool as it found it."""

    manager: Manager
    decoder: Decoder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with Processes(tmp_path_factory.mktemp("pair")) as processes:
        manager = processes.start_manager()
        yield Pair(manager, processes.start_decoder(manager))


@pytest.fixture(autouse=True)
def _leaves_nothing(pair: Pair) -> Iterator[None]:
    yield
    pair.manager.wait_all_free()


async def test_a_chat_streams_its_answer_token_by_token(pair: Pair) -> None:
    async with stub_of(pair.decoder.address) as stub:
        received = await receive(stub, chat("Repeat: zebra-4821", request_id="recall"))
    assert received.text == "zebra-4821"
    assert received.finished.reason == pb.FINISH_REASON_STOP
    assert received.finished.num_output_tokens == len(received.token_ids)
    assert received.finished.stop_token_id == received.token_ids[-1]
    assert received.started.request_id == "recall"
    assert len(received.started.prompt_token_ids) == received.finished.num_prompt_tokens
    assert len(received.responses) > 4, "deltas came one by one"


async def test_many_chats_at_once_are_not_mixed_up(pair: Pair) -> None:
    words = [f"{animal}-{1000 + 37 * number}" for number, animal in enumerate(["fox", "owl", "bear", "wolf"] * 8)]
    async with stub_of(pair.decoder.address) as stub:

        async def ask(index: int) -> str:
            await asyncio.sleep(0.01 * (index * 7 % 13))  # joining and leaving at different steps
            return (await receive(stub, chat(f"Repeat: {words[index]}"))).text

        answers = await asyncio.gather(*(ask(index) for index in range(len(words))))
    assert answers == words


async def test_the_same_seed_gives_the_same_tokens_alone_and_in_a_crowd(pair: Pair) -> None:
    async with stub_of(pair.decoder.address) as stub:
        alone = await receive(stub, long_request(max_tokens=60))
        crowd = await asyncio.gather(*(receive(stub, long_request(max_tokens=60)) for _ in range(5)))
    assert {tuple(received.token_ids) for received in (alone, *crowd)} == {tuple(alone.token_ids)}
    assert alone.finished.reason == pb.FINISH_REASON_LENGTH


def _stops_at_a_string(request_id: str) -> pb.GenerateRequest:
    return chat("Repeat: zebra-4821", request_id=request_id, stop=pb.StopConditions(strings=["-48"]))


async def test_stop_strings_logprobs_and_tokenize(pair: Pair) -> None:
    async with stub_of(pair.decoder.address) as stub:
        stopped = await receive(stub, chat("Repeat: zebra-4821", stop=pb.StopConditions(strings=["-48"]), logprobs=3))
        ids = list((await stub.Tokenize(pb.TokenizeRequest(chat=chat("Repeat: zebra-4821").chat))).ids)
        again = [await receive(stub, _stops_at_a_string("again")) for _ in range(10)]
    assert [one.text for one in again] == ["zebra"] * 10, "the id is free when the stream is over"
    assert stopped.text == "zebra"
    assert (stopped.finished.reason, stopped.finished.stop_string) == (pb.FINISH_REASON_STOP, "-48")
    assert ids == list(stopped.started.prompt_token_ids)
    logprobs = [entry for response in stopped.responses for entry in response.delta.logprobs]
    assert [entry.sampled.token_id for entry in logprobs] == stopped.token_ids
    assert all(len(entry.top) == 3 and entry.top[0].token_id == entry.sampled.token_id for entry in logprobs)


async def test_a_broken_stream_goes_on_token_exact_wherever_it_broke(pair: Pair) -> None:
    request = long_request(max_tokens=40)
    async with stub_of(pair.decoder.address) as stub:
        whole = await receive(stub, request)
        deltas = [response.delta for response in whole.responses[1:-1]]
        for cut in (0, 1, 17, 39):
            kept, text = whole.token_ids[:cut], _text_after(deltas, cut)
            resume = pb.Resume(
                prompt_token_ids=whole.started.prompt_token_ids,
                samples=[pb.SampleProgress(output_token_ids=kept, delivered_text=text)],
                seed=whole.started.seed,
                numerics_id=whole.started.numerics_id,
                max_tokens=whole.started.max_tokens,
            )
            rest = await receive(stub, pb.GenerateRequest(resume=resume, stop=request.stop, sampling=request.sampling))
            assert rest.started.exact_resume
            assert kept + rest.token_ids == whole.token_ids
            assert text + rest.text == whole.text
            assert rest.finished.num_output_tokens == 40


def _text_after(deltas: list[pb.Delta], num_tokens: int) -> str:
    return "".join(delta.text for delta in deltas if delta.position + len(delta.token_ids) <= num_tokens)


async def test_a_client_that_goes_away_frees_its_blocks(pair: Pair) -> None:
    async with stub_of(pair.decoder.address) as stub:
        call, _ = await open_stream(stub, long_request(max_tokens=2000))
        assert pair.manager.stats().leased > 0
        call.cancel()
    pair.manager.wait_all_free()


async def test_a_deadline_is_honoured_and_frees_the_blocks(pair: Pair) -> None:
    async with stub_of(pair.decoder.address) as stub:
        for timeout_s in DEADLINES_S:
            received = await receive(stub, long_request(max_tokens=2000), timeout_s=timeout_s)
            assert received.code is grpc.StatusCode.DEADLINE_EXCEEDED
            pair.manager.wait_all_free()
            if received.token_ids:
                break
    assert 0 < len(received.token_ids) < 2000


async def test_abort_ends_a_stream_as_cancelled(pair: Pair) -> None:
    async with stub_of(pair.decoder.address) as stub:
        call, responses = await open_stream(stub, long_request("to-abort", max_tokens=2000))
        assert (await stub.Abort(pb.AbortRequest(request_id="to-abort"))).found
        received = await receive_rest(call, responses)
        assert received.finished.reason == pb.FINISH_REASON_CANCELLED
        assert received.finished.num_output_tokens == len(received.token_ids)
        assert not (await stub.Abort(pb.AbortRequest(request_id="to-abort"))).found


async def test_any_mix_of_endings_leaves_every_block_free(pair: Pair) -> None:
    rng = random.Random(5)
    async with stub_of(pair.decoder.address) as stub:

        async def one(index: int) -> None:
            ending = rng.choice(["finish", "stop", "cancel", "deadline", "abort", "refuse"])
            request = long_request(f"mix-{index}", max_tokens=rng.randint(1, 60) if ending == "finish" else 1500)
            if ending == "stop":
                request = chat("Tell me a story.", stop=pb.StopConditions(strings=["e"]))
            if ending == "refuse":
                request.stop.max_tokens = 1_000_000
            if ending not in ("cancel", "abort"):
                await receive(stub, request, timeout_s=rng.uniform(0.001, 0.3) if ending == "deadline" else TIMEOUT_S)
                return
            call, responses = await open_stream(stub, request, num_responses=rng.randint(1, 6))
            if ending == "abort":
                await stub.Abort(pb.AbortRequest(request_id=request.request_id))
                await receive_rest(call, responses)
            else:
                call.cancel()

        await asyncio.gather(*(one(index) for index in range(48)))
    pair.manager.wait_all_free()
    async with stub_of(pair.decoder.address) as stub:
        assert (await receive(stub, chat("Repeat: owl-7"))).text == "owl-7"


async def test_model_info(pair: Pair) -> None:
    async with stub_of(pair.decoder.address) as stub:
        info = await stub.GetModelInfo(pb.GetModelInfoRequest())
    assert (info.model_type, info.name, info.worker_id) == ("qwen3_moe", DEMO_MODEL.name, pair.decoder.worker_id)
    assert (info.backend, info.kv_storage, info.block_size) == ("mlx", pb.KV_STORAGE_PAGED, 16)
    assert info.has_chat_template
    assert info.batch_invariant
    assert len(info.model_fingerprint) == 32
    assert info.numerics_id
    assert list(info.stop_token_ids)


async def test_two_decoders_share_one_manager(pair: Pair, processes: Processes) -> None:
    second = processes.start_decoder(pair.manager)
    async with stub_of(pair.decoder.address) as first_stub, stub_of(second.address) as second_stub:
        one, two = await asyncio.gather(
            receive(first_stub, long_request(max_tokens=50)), receive(second_stub, long_request(max_tokens=50))
        )
        assert pair.manager.stats().num_sessions == 2
    assert one.token_ids == two.token_ids
    assert one.started.numerics_id == two.started.numerics_id
    assert second.terminate() == 0


async def test_row_s33_no_paged_needs_no_manager_and_makes_the_same_tokens(pair: Pair, processes: Processes) -> None:
    contiguous = processes.start_decoder(None)
    async with stub_of(pair.decoder.address) as paged_stub, stub_of(contiguous.address) as stub:
        info = await stub.GetModelInfo(pb.GetModelInfoRequest())
        paged, other = (
            await receive(paged_stub, long_request(max_tokens=50)),
            await receive(stub, long_request(max_tokens=50)),
        )
    assert (info.kv_storage, info.block_size) == (pb.KV_STORAGE_CONTIGUOUS, 0), "row S7"
    assert other.token_ids == paged.token_ids
    assert other.started.age_ticket == 0
    assert not list(_files_below(contiguous.log_path.parent, "*.kv")), "row S33: no pool"
    assert contiguous.terminate() == 0


def _files_below(directory: Path, pattern: str) -> Iterator[Path]:
    return directory.rglob(pattern)
