"""What can go wrong with a request, end to end: each error names the field and the fix, and the service goes on serving."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos import decoder_pb2 as pb
from protos.rich_status import error_info, retry_delay_s
from services.healthcheck import is_serving
from tests.e2e.processes import DEADLINE_S, DECODER_SERVICE, MANAGER_SERVICE, Decoder, Manager, Processes, until
from tests.e2e.streams import Received, chat, long_request, open_stream, receive, receive_rest, stub_of

pytest.importorskip("mlx.core")

INVALID = grpc.StatusCode.INVALID_ARGUMENT
UNSERVED = grpc.StatusCode.UNIMPLEMENTED
CAPACITY = 100  # no multiple of the block size
IDS = pb.TokenIds(ids=[5, 6, 7])


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Manager, Decoder]]:
    """Room for one request of the whole capacity, and a little more."""
    with Processes(tmp_path_factory.mktemp("small")) as processes:
        manager = processes.start_manager(num_blocks=9)
        yield manager, processes.start_decoder(manager, "--kv-capacity", str(CAPACITY), "--reserve", "full")


BAD: list[tuple[dict[str, Any], grpc.StatusCode, str, str]] = [
    ({}, INVALID, "prompt", "send text, token_ids or chat"),
    ({"text": ""}, INVALID, "text", "send at least one"),
    ({"token_ids": pb.TokenIds()}, INVALID, "token_ids", "send at least one token"),
    ({"token_ids": pb.TokenIds(ids=[1, 9_999_999])}, INVALID, "token_ids.ids[1]", "send ids of this model"),
    ({"chat": pb.Chat()}, INVALID, "chat.messages", "send at least one message"),
    ({"sampling": {"temperature": -1}}, INVALID, "sampling.temperature", "neither 0 (greedy) nor"),
    ({"sampling": {"temperature": float("nan")}}, INVALID, "sampling.temperature", "neither 0"),
    ({"sampling": {"top_p": 0}}, INVALID, "sampling.top_p", "send 1"),
    ({"sampling": {"min_p": 2}}, INVALID, "sampling.min_p", "send 0"),
    ({"sampling": {"repetition_penalty": 0}}, INVALID, "sampling.repetition_penalty", "send 1"),
    ({"stop": {"max_tokens": 0}}, INVALID, "stop.max_tokens", "send at least 1"),
    ({"stop": {"strings": [""]}}, INVALID, "stop.strings[0]", "send 1 to"),
    ({"stop": {"token_ids": [9_999_999]}}, INVALID, "stop.token_ids[0]", "send ids of this model"),
    ({"logprobs": 21}, INVALID, "logprobs", "send at most 20"),
    ({"n": 0}, INVALID, "n", "send 1"),
    ({"n": 17}, INVALID, "n", "send 1 to 16 samples"),
    ({"structured_output": {"regex": "a"}}, UNSERVED, "structured_output", "leave it out"),
]


async def test_bad_requests_name_field_and_fix_and_the_service_goes_on(pair: tuple[Manager, Decoder]) -> None:
    _, decoder = pair
    async with stub_of(decoder.address) as stub:
        for fields, code, name, fix in BAD:
            if name not in ("prompt", "text") and not {"token_ids", "chat"} & set(fields):
                fields = {**fields, "token_ids": IDS}
            received = await receive(stub, pb.GenerateRequest(**fields))
            assert (received.code, received.field) == (code, name)
            assert fix in received.status.message, name
            assert error_info(received.status).domain == "leasehold"
        assert (await receive(stub, chat("Repeat: owl-7", stop=pb.StopConditions(max_tokens=20)))).text == "owl-7"


async def test_row_s19_what_can_never_fit_is_out_of_range(pair: tuple[Manager, Decoder]) -> None:
    manager, decoder = pair
    async with stub_of(decoder.address) as stub:
        for num_prompt, max_tokens in ((3, CAPACITY - 2), (CAPACITY, None)):
            ids = pb.TokenIds(ids=[5] * num_prompt)
            received = await receive(
                stub, pb.GenerateRequest(token_ids=ids, stop=pb.StopConditions(max_tokens=max_tokens))
            )
            assert (received.code, received.reason) == (grpc.StatusCode.OUT_OF_RANGE, "NEVER_FITS")
            assert f"{CAPACITY} tokens" in received.status.message
        exactly = await receive(stub, pb.GenerateRequest(token_ids=IDS, stop=pb.StopConditions(ignore_eos=True)))
    assert len(exactly.token_ids) == CAPACITY - 3, "without max_tokens it is what remains"
    manager.wait_all_free()


async def test_an_exhausted_pool_is_told_with_its_details_and_leaks_nothing(pair: tuple[Manager, Decoder]) -> None:
    manager, decoder = pair
    async with stub_of(decoder.address) as stub:
        # All at once, so that the first has not ended when the others ask.
        received = await asyncio.gather(*(receive(stub, long_request(max_tokens=90)) for _ in range(6)))
        served = [each for each in received if each.error is None]
        all_refused = [each for each in received if each.error is not None]
        again = await receive(stub, long_request(max_tokens=90))
    assert served
    assert all_refused
    for refused in all_refused:
        assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "POOL_EXHAUSTED")
        assert refused.responses == [], "row S30: nothing was started"
        assert "7" in refused.status.message, "row S25: blocks needed"
        assert error_info(refused.status).metadata
        delay_s = retry_delay_s(refused.status)
        assert delay_s is not None
        assert delay_s > 0
    for each in served:
        assert each.finished.num_output_tokens == 90
        assert each.token_ids == again.token_ids
    manager.wait_all_free()


async def test_a_request_larger_than_the_whole_pool_never_fits(processes: Processes) -> None:
    manager = processes.start_manager(num_blocks=2)
    decoder = processes.start_decoder(manager, "--kv-capacity", "128", "--reserve", "full")
    async with stub_of(decoder.address) as stub:
        received = await receive(stub, long_request(max_tokens=100))
    assert (received.code, received.reason) == (grpc.StatusCode.OUT_OF_RANGE, "NEVER_FITS")
    assert "--num-blocks" in received.status.message
    manager.wait_all_free()


async def test_row_s23_without_its_manager_a_decoder_refuses_and_says_so_and_recovers(processes: Processes) -> None:
    manager = processes.start_manager()
    decoder = processes.start_decoder(manager)
    async with stub_of(decoder.address) as stub:
        expected = await receive(stub, long_request(max_tokens=300))
        call, responses = await open_stream(stub, long_request(max_tokens=300))
        manager.kill()

        def refuses() -> bool:
            return not is_serving(decoder.address, DECODER_SERVICE, DEADLINE_S)

        until(refuses, "its health says that it cannot serve")
        refused = await receive(stub, chat("Repeat: owl-7"))
        assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "MANAGER_UNAVAILABLE")
        assert "manager" in refused.status.message
        assert manager.address in refused.status.message
        processes.start_manager(listen=manager.address, pool_dir=manager.pool_dir)
        until(lambda: not refuses(), "it serves again")
        kept = await receive_rest(call, responses)
        assert (await receive(stub, chat("Repeat: owl-7"))).text == "owl-7"
    _went_on(kept, expected)
    assert is_serving(manager.address, MANAGER_SERVICE, 5.0)
    manager.wait_all_free()


def _went_on(kept: Received, expected: Received) -> None:
    """A running stream outlives a restart of the manager, or ends with an error; it never gives other tokens."""
    assert kept.token_ids == expected.token_ids[: len(kept.token_ids)]
    if kept.error is None:
        assert kept.token_ids == expected.token_ids
    else:
        assert kept.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED), kept.error


async def test_a_checkpoint_without_tokenizer_serves_token_ids(processes: Processes, tmp_path: Path) -> None:
    model = _copy_of_the_model(tmp_path)
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    decoder = processes.start_decoder(None, model=model)
    async with stub_of(decoder.address) as stub:
        served, text, messages = await asyncio.gather(
            receive(stub, long_request(max_tokens=8)),
            receive(stub, pb.GenerateRequest(text="hello")),
            receive(stub, chat("hello")),
        )
        info = await stub.GetModelInfo(pb.GetModelInfoRequest())
    assert len(served.token_ids) == 8
    assert served.text == ""
    assert (text.code, text.field) == (UNSERVED, "text")
    assert (messages.code, messages.field) == (UNSERVED, "chat")
    assert not info.has_chat_template


def _copy_of_the_model(tmp_path: Path) -> Path:
    from tests.e2e.processes import DEMO_MODEL

    model = tmp_path / "model"
    model.mkdir()
    for source in DEMO_MODEL.iterdir():
        (model / source.name).write_bytes(source.read_bytes())
    return model
