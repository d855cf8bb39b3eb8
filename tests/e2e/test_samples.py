"""Several samples of one prompt through real processes: each is what it is alone, whatever happens to the processes."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

pytest.importorskip("mlx.core")

from clients.decoder import DecoderClient
from clients.events import Finished, FinishReason, Started, StreamResumed, Tokens
from protos import decoder_pb2 as pb
from services.decoder.contiguous_leases import ContiguousLeases
from services.decoder.engine import Engine, EngineSettings
from services.decoder.loaded_model import load
from services.decoder.loader import open_checkpoint
from services.decoder.model_config import read_model_config
from services.decoder.request import DecodeRequest, SamplingParams, sample_id
from services.decoder.service import contiguous_kv
from tests.decoder.engine_fakes import Outcome
from tests.decoder.tiny_models import TinyConfig, write_tiny_checkpoint
from tests.e2e.followed import Pace, token_request
from tests.e2e.processes import DEMO_MODEL, ROOT, Decoder, Manager, Processes
from tests.e2e.streams import TIMEOUT_S, long_request, open_stream, receive, receive_rest, stub_of

VOCAB_SIZE = 96
NUM_SAMPLES = 4
NUM_TOKENS = 60
PROMPT = [(7 * index) % VOCAB_SIZE for index in range(75)]  # no whole number of blocks, and longer than a chunk
SEED = 11
FLAGS = ("--kv-dtype", "bf16", "--max-num-batched-tokens", "64")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("samples") / "model", TinyConfig(vocab_size=VOCAB_SIZE), 3)


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    """Each sample alone, in an engine of this process that has no manager: no client can ask for a single index."""
    checkpoint = open_checkpoint(model)
    config = read_model_config(checkpoint)
    settings = EngineSettings(max_seqs=1, kv_capacity=256)
    leases = ContiguousLeases(lambda geometry: contiguous_kv(geometry, 1, 256))
    outcomes: dict[str, Outcome] = {}

    def emit(events: object) -> None:
        for request_id, event in events:  # type: ignore[attr-defined]
            outcomes.setdefault(request_id, Outcome()).events.append(event)

    engine = Engine(lambda: load(checkpoint, config, "bf16", "mlx", "exact")[0], leases, settings, emit)
    engine.start()
    for index in range(NUM_SAMPLES):
        sampling = SamplingParams(temperature=1.0, seed=SEED)
        engine.submit(DecodeRequest(sample_id("x", index), PROMPT, sampling, NUM_TOKENS, sample_index=index))
    engine.stop(drain_s=60.0)
    tokens = [outcomes[sample_id("x", index)].tokens for index in range(NUM_SAMPLES)]
    assert len({tuple(sample) for sample in tokens}) == NUM_SAMPLES
    return tokens


def request_for(n: int = NUM_SAMPLES, max_tokens: int = NUM_TOKENS) -> pb.GenerateRequest:
    """The request whose samples are known."""
    request = token_request(PROMPT, max_tokens, seed=SEED)
    request.n = n
    return request


@dataclass
class Samples:
    """All that one stream of several samples brought."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    finished: dict[int, Finished] = field(default_factory=dict)
    num_started: int = 0
    num_resumed: int = 0
    is_exact: bool = True

    def listed(self) -> list[list[int]]:
        """The tokens, by sample index."""
        return [self.tokens[index] for index in sorted(self.tokens)]


async def gather(decoders: list[Decoder], request: pb.GenerateRequest, pace: Pace | None = None) -> Samples:
    """A whole request through the client library."""
    samples = Samples()
    async with DecoderClient([decoder.address for decoder in decoders]) as client:
        async for event in client.generate(request):
            match event:
                case Started():
                    samples.num_started += 1
                case StreamResumed():
                    samples.num_resumed += 1
                    samples.is_exact &= event.exact
                case Finished():
                    samples.finished[event.sample_index] = event
                case Tokens():
                    samples.tokens.setdefault(event.sample_index, []).extend(event.token_ids)
                    samples.texts[event.sample_index] = samples.texts.get(event.sample_index, "") + event.text
                    if pace is not None:
                        pace.add(len(event.token_ids))
    return samples


async def test_samples_are_what_each_is_alone_and_the_prompt_is_computed_once(
    processes: Processes, model: Path, expected: list[list[int]]
) -> None:
    manager = processes.start_manager()
    decoder = processes.start_decoder(manager, *FLAGS, model=model)
    samples = await gather([decoder], request_for())
    assert samples.listed() == expected
    assert samples.num_started == 1
    cached = {index: end.num_cached_tokens for index, end in samples.finished.items()}
    assert cached == {0: 0, 1: len(PROMPT) - 1, 2: len(PROMPT) - 1, 3: len(PROMPT) - 1}
    manager.wait_all_free()
    assert manager.stats().num_deduplicated == 0, "the prompt's blocks were shared, not computed and thrown away"
    assert (await gather([decoder], request_for(1))).listed() == expected[:1]
    assert (await gather([decoder], request_for(3))).listed() == expected[:3], "after hits, too"


async def test_without_a_manager_samples_are_the_same(
    processes: Processes, model: Path, expected: list[list[int]]
) -> None:
    decoder = processes.start_decoder(None, *FLAGS, model=model)
    assert (await gather([decoder], request_for())).listed() == expected


@pytest.mark.parametrize("num_blocks", [10, 16])
async def test_in_a_full_pool_samples_give_way_to_each_other_and_none_changes(
    processes: Processes, model: Path, expected: list[list[int]], num_blocks: int
) -> None:
    manager = processes.start_manager(num_blocks=num_blocks)  # one sample has 9 blocks, 4 of them in common
    decoder = processes.start_decoder(manager, *FLAGS, model=model)
    samples = await gather([decoder], request_for())
    assert samples.listed() == expected
    manager.wait_all_free()
    assert manager.stats().num_exhausted > 0


@pytest.mark.parametrize("moment", [0, 40, 150, 220])
async def test_a_decoder_killed_in_their_midst_changes_no_sample(
    processes: Processes, model: Path, expected: list[list[int]], moment: int
) -> None:
    manager = processes.start_manager()
    first, second = (processes.start_decoder(manager, *FLAGS, model=model) for _ in range(2))
    pace = Pace()
    running = asyncio.create_task(gather([first, second], request_for(), pace))
    await pace.reach(max(moment, 1))
    await asyncio.to_thread(first.kill)
    samples = await running
    assert samples.listed() == expected
    assert samples.is_exact
    assert samples.finished.keys() == set(range(NUM_SAMPLES))
    manager.wait_all_free()


async def test_a_manager_killed_in_their_midst_changes_no_sample(
    processes: Processes, model: Path, expected: list[list[int]]
) -> None:
    manager = processes.start_manager()
    decoder = processes.start_decoder(manager, *FLAGS, model=model)
    pace = Pace()
    running = asyncio.create_task(gather([decoder], request_for(), pace))
    await pace.reach(1)  # the others may be forking
    await asyncio.to_thread(manager.kill)
    again = await asyncio.to_thread(lambda: processes.start_manager(listen=manager.address, pool_dir=manager.pool_dir))
    samples = await running
    assert samples.listed() == expected
    assert samples.num_resumed == 0
    again.wait_all_free()


@dataclass(frozen=True)
class Pair:
    """A manager and a decoder with the bundled model, which has text."""

    manager: Manager
    decoder: Decoder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with Processes(tmp_path_factory.mktemp("pair")) as processes:
        manager = processes.start_manager()
        yield Pair(manager, processes.start_decoder(manager, "--max-seqs", "6", model=DEMO_MODEL))


def _with_text(**stop: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        text="Tell me a story.",
        n=3,
        sampling=pb.SamplingParams(temperature=1.5, seed=4),
        stop=pb.StopConditions(max_tokens=40, ignore_eos=True, **stop),  # type: ignore[arg-type]
    )


async def test_a_stop_string_ends_each_sample_where_its_own_text_has_it(pair: Pair) -> None:
    whole = await gather([pair.decoder], _with_text())
    stop = whole.texts[1][10:12]
    samples = await gather([pair.decoder], _with_text(strings=[stop]))
    for index, text in whole.texts.items():
        assert samples.texts[index] == text.split(stop)[0]
        assert samples.finished[index].reason is (FinishReason.STOP if stop in text else FinishReason.LENGTH)
    assert samples.finished[1].stop_string == stop
    pair.manager.wait_all_free()


async def test_abort_ends_all_samples_as_cancelled(pair: Pair) -> None:
    request = long_request("to-abort", max_tokens=1500)
    request.n = 3
    async with stub_of(pair.decoder.address) as stub:
        call, responses = await open_stream(stub, request, num_responses=6)
        assert (await stub.Abort(pb.AbortRequest(request_id="to-abort"))).found
        received = await receive_rest(call, responses)
        ends = [response.finished for response in received.responses if response.HasField("finished")]
        assert sorted(end.sample_index for end in ends) == [0, 1, 2]
        assert {end.reason for end in ends} == {pb.FINISH_REASON_CANCELLED}
        assert not (await stub.Abort(pb.AbortRequest(request_id="to-abort"))).found
    pair.manager.wait_all_free()


async def test_a_client_that_goes_away_or_is_out_of_time_frees_all_samples(pair: Pair) -> None:
    request = long_request(max_tokens=1500)
    request.n = 3
    async with stub_of(pair.decoder.address) as stub:
        call, _ = await open_stream(stub, request, num_responses=5)
        call.cancel()
        pair.manager.wait_all_free()
        received = await receive(stub, request, timeout_s=0.5)
    assert received.code is grpc.StatusCode.DEADLINE_EXCEEDED
    pair.manager.wait_all_free()


async def test_too_many_samples_are_refused_by_name(pair: Pair) -> None:
    async with stub_of(pair.decoder.address) as stub:
        for n in (0, 7, 17, 2**32 - 1):
            received = await receive(stub, pb.GenerateRequest(text="x", n=n))
            assert (received.code, received.field) == (grpc.StatusCode.INVALID_ARGUMENT, "n")
            assert f"n: is {n}; send 1 to 6 samples" in received.status.message


async def _leasehold(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "clients.cli", *argv]
    return await asyncio.to_thread(
        lambda: subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    )


async def test_the_command_prints_samples_and_sample_0_is_the_single_one(pair: Pair) -> None:
    flags = ("--prompt", "Once", "--raw", "--max-tokens", "12", "--ignore-eos", "--temperature", "1", "--seed", "5")
    generate = ("generate", "--decoder", pair.decoder.address, *flags)
    alone = json.loads((await _leasehold(*generate, "--json")).stdout)
    assert "samples" not in alone
    together = json.loads((await _leasehold(*generate, "--json", "--n", "3")).stdout)
    assert together["token_ids"] == alone["token_ids"]
    assert [sample["sample_index"] for sample in together["samples"]] == [0, 1, 2]
    assert len({sample["text"] for sample in together["samples"]}) == 3
    printed = await _leasehold(*generate, "--n", "3")
    assert printed.returncode == 0
    blocks = [f"--- sample {s['sample_index']}: length, 12 tokens\n{s['text']}\n" for s in together["samples"]]
    assert printed.stdout == "".join(blocks)
    refused = await _leasehold(*generate, "--n", "7")
    assert refused.returncode == 1
    assert "INVALID_ARGUMENT" in refused.stderr
