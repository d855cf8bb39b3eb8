"""Both endpoints of real processes, and the log lines of a request."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from clients.metrics import scrape
from protos import decoder_pb2 as pb
from protos.rich_status import retry_delay_s
from tests.e2e.processes import DEADLINE_S, Processes, Service
from tests.e2e.streams import Received, long_request, open_stream, receive, receive_rest, stub_of

pytest.importorskip("mlx.core")

ON_A_FREE_PORT = ("--metrics-listen", "127.0.0.1:0")


async def figures(service: Service) -> dict[tuple[str, ...], float]:
    """The service's samples by name and the values of their labels."""
    [line] = service.events("metrics")
    return {(name, *labels.values()): value for name, labels, value in await scrape(line["address"])}


async def test_a_request_leaves_its_marks_in_both_services(processes: Processes) -> None:
    manager = processes.start_manager(*ON_A_FREE_PORT)
    decoder = processes.start_decoder(manager, *ON_A_FREE_PORT)
    async with stub_of(decoder.address) as stub:
        received = await receive_rest(*await open_stream(stub, long_request("seen", max_tokens=20)))
    assert received.code is grpc.StatusCode.OK
    seen = await figures(decoder)
    assert seen["leasehold_decoder_ttft_seconds_count",] == 1
    assert seen["leasehold_decoder_itl_seconds_count",] == 19
    assert seen["leasehold_decoder_generated_tokens_total",] == 20
    assert seen["leasehold_decoder_tokens_total", "decode"] == 19
    assert seen["leasehold_decoder_requests_total", "length"] == 1
    assert seen["leasehold_decoder_requests_running",] == 0
    assert seen["leasehold_decoder_can_serve",] == 1
    assert seen["leasehold_decoder_lease_wait_seconds_count", "acquire"] == 1
    parts = {key[1] for key in seen if key[0] == "leasehold_decoder_step_part_seconds_count"}
    assert parts == {"schedule", "fill", "forward", "commit", "tokens", "emit"}
    manager.wait_all_free()
    seen = await figures(manager)
    assert seen["leasehold_kv_manager_leases_acquired_total",] == 1
    assert seen["leasehold_kv_manager_calls_total", "OK", "Acquire"] == 1
    assert seen["leasehold_kv_manager_open_streams", "KeepAlive"] == 1
    [ended] = decoder.events("request ended")
    assert (ended["request_id"], ended["cache_id"]) == ("seen", 1)


async def test_a_full_queue_refuses_a_new_request_at_once_and_never_a_resumed_one(processes: Processes) -> None:
    decoder = processes.start_decoder(None, "--max-seqs", "1", "--max-waiting", "1", *ON_A_FREE_PORT, hold_at=2)
    async with stub_of(decoder.address) as stub:
        call, responses = await open_stream(stub, long_request("runs", max_tokens=300), num_responses=2)
        waiting = asyncio.create_task(receive(stub, long_request("waits", max_tokens=300)))
        async with asyncio.timeout(DEADLINE_S):
            while (await figures(decoder))["leasehold_decoder_requests_waiting",] < 1:  # noqa: ASYNC110 - the state of a process
                await asyncio.sleep(0.01)
        refused = await receive(stub, long_request("one too many"))
        assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert "--max-waiting 1" in refused.status.message
        assert retry_delay_s(refused.status) == 1.0
        seen = await figures(decoder)
        assert seen["leasehold_decoder_errors_total", "QUEUE_FULL"] == 1
        assert seen["leasehold_decoder_requests_running",] == 1, "it was told before the first one had ended"
        resumed = asyncio.create_task(receive(stub, _resumption(responses)))
        decoder.go_on()
        first = await receive_rest(call, responses)
        assert (await waiting).token_ids == first.token_ids
        assert Received(responses).token_ids + (await resumed).token_ids == first.token_ids
        assert (await receive(stub, long_request("later", max_tokens=3))).token_ids == first.token_ids[:3]


def _resumption(responses: list[pb.GenerateResponse]) -> pb.GenerateRequest:
    """The request of a client that lost a long request's stream after these."""
    request, had = long_request("resumes", max_tokens=300), Received(responses)
    request.ClearField("prompt")
    request.resume.CopyFrom(
        pb.Resume(
            prompt_token_ids=had.started.prompt_token_ids,
            samples=[pb.SampleProgress(output_token_ids=had.token_ids, delivered_text=had.text)],
            seed=had.started.seed,
            numerics_id=had.started.numerics_id,
            max_tokens=had.started.max_tokens,
        )
    )
    return request


def test_a_taken_metrics_address_stops_a_decoder_before_it_loads(processes: Processes) -> None:
    manager = processes.start_manager(*ON_A_FREE_PORT)
    [line] = manager.events("metrics")
    decoder = processes.start_decoder(manager, "--metrics-listen", line["address"], wait=False)
    assert decoder.wait_exit() == 1
    assert f"--metrics-listen: cannot listen on {line['address']}: Address already in use" in decoder.log()
    assert decoder.events("loading the model") == []
