"""What of the engine's speed reaches clients: tokens a second over gRPC beside those of an engine in this process.

    python -m tests.bench.service_share --model DIR --streams 16 --tokens 48 --rounds 3

Both decode the same prompts greedily, in turns, with the same settings, and must make the same tokens; the service is a manager and
a decoder as separate processes, and its client is this process. Counted are the tokens between the moment when every stream has begun
and the first one's end, and the CPU time of each process from the first request to the last answer, a generated token: on a machine
whose cores the engine fills alone, every microsecond beside it comes off its speed.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
import queue
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from clients.channel import open_channel
from protos import decoder_pb2_grpc
from services.decoder.config import DecoderConfig, parse_args, resolve_kv_dtype, resolve_precision
from services.decoder.contiguous_leases import ContiguousLeases
from services.decoder.engine import Engine, EngineSettings, LoadedModel
from services.decoder.loaded_model import load
from services.decoder.loader import open_checkpoint
from services.decoder.model_config import read_model_config
from services.decoder.request import DecodeRequest, Event, Failed, Finished, SamplingParams, Token
from services.decoder.service import contiguous_kv
from tests.bench.machine import describe_cpu, process_cpu_s
from tests.e2e.followed import token_request
from tests.e2e.processes import Processes

Prompts = Sequence[Sequence[int]]


class Arrivals:
    """Each stream's tokens, and when they came."""

    def __init__(self, num_streams: int) -> None:
        self.token_ids: list[list[int]] = [[] for _ in range(num_streams)]
        self._times: list[list[float]] = [[] for _ in range(num_streams)]

    def add(self, stream: int, token_ids: Sequence[int]) -> None:
        """Tokens of a stream are here."""
        self.token_ids[stream] += token_ids
        self._times[stream] += [time.perf_counter()] * len(token_ids)

    def tokens_per_s(self) -> float:
        """While all streams decode."""
        began = max(times[1] for times in self._times)
        ended = min(times[-1] for times in self._times)
        count = sum(began < at <= ended for times in self._times for at in times)
        return count / (ended - began)


class InProcess:
    """The engine of a decoder of some configuration on a thread of this process, with caches of its own."""

    def __init__(self, config: DecoderConfig, kv_capacity: int) -> None:
        checkpoint = open_checkpoint(config.model)
        model_config = read_model_config(checkpoint)
        precision = resolve_precision(config.precision, config.backend, model_config.kv_dtype)
        kv_dtype = resolve_kv_dtype(config.kv_dtype, model_config.kv_dtype, config.backend, precision)
        self.vocab_size = model_config.vocab_size
        self.is_batch_invariant = False

        def build() -> LoadedModel:
            model, ops = load(
                checkpoint, model_config, kv_dtype, config.backend, precision, config.threads, config.kv_layout
            )
            self.is_batch_invariant = ops.batch_invariant
            return model

        leases = ContiguousLeases(lambda geometry: contiguous_kv(geometry, config.max_seqs, kv_capacity))
        self._came: queue.SimpleQueue[Sequence[tuple[str, Event]]] = queue.SimpleQueue()
        settings = EngineSettings(
            max_seqs=config.max_seqs, kv_capacity=kv_capacity, max_num_batched_tokens=config.max_num_batched_tokens
        )
        self._engine = Engine(build, leases, settings, self._came.put)
        self._engine.start()

    def run(self, prompts: Prompts, num_tokens: int) -> Arrivals:
        """All prompts together."""
        arrivals = Arrivals(len(prompts))
        for index, prompt in enumerate(prompts):
            self._engine.submit(DecodeRequest(str(index), prompt, SamplingParams(), num_tokens))
        running = len(prompts)
        while running:
            for request_id, event in self._came.get():
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Token):
                    arrivals.add(int(request_id), (event.token_id,))
                running -= isinstance(event, Finished)
        return arrivals

    def stop(self) -> None:
        """Ends its thread."""
        self._engine.stop(0)


def follow_service(address: str, prompts: Prompts, num_tokens: int) -> Arrivals:
    """All prompts together, as one client sees them."""
    return uvloop.run(_follow_service(address, prompts, num_tokens))


async def _follow_service(address: str, prompts: Prompts, num_tokens: int) -> Arrivals:
    arrivals = Arrivals(len(prompts))

    async def follow(stub: Any, index: int) -> None:
        async for response in stub.Generate(token_request(prompts[index], num_tokens)):
            if response.WhichOneof("event") == "delta":
                arrivals.add(index, response.delta.token_ids)

    async with open_channel(address) as channel:
        stub = decoder_pb2_grpc.DecoderStub(channel)
        await asyncio.gather(*(follow(stub, index) for index in range(len(prompts))))
    return arrivals


@dataclass(frozen=True)
class Measured:
    """What one of the two did with a round's prompts."""

    arrivals: Arrivals
    cpu_us: Mapping[str, float]  # by process, a generated token


def _measured(run: Callable[[], Arrivals], pids: Mapping[str, int]) -> Measured:
    before = {name: process_cpu_s(pid) for name, pid in pids.items()}
    arrivals = run()
    num_tokens = sum(map(len, arrivals.token_ids))
    spent = {name: process_cpu_s(pid) - before[name] for name, pid in pids.items()}
    return Measured(arrivals, {name: round(cpu_s * 1e6 / num_tokens, 1) for name, cpu_s in spent.items()})


def measure(arguments: argparse.Namespace, directory: Path) -> list[float]:
    """The service's share in each round."""
    capacity = arguments.prompt_tokens + arguments.tokens + 16
    flags = ("--max-seqs", str(arguments.streams), "--kv-capacity", str(capacity), *arguments.decoder_flags)
    named = ("--model", str(arguments.model), "--backend", arguments.backend)
    rng = np.random.default_rng(5)
    shares = []
    with Processes(directory) as processes:
        manager = processes.start_manager(num_blocks=1024)
        decoder = processes.start_decoder(manager, *flags, model=arguments.model, backend=arguments.backend)
        engine = InProcess(parse_args([*named, *flags]), capacity)
        services = {"decoder": decoder.process.pid, "manager": manager.process.pid}
        pids = {"engine": {"engine": os.getpid()}, "service": {**services, "client": os.getpid()}}
        for number in range(arguments.rounds + 1):
            sizes = (arguments.streams, arguments.prompt_tokens)
            prompts = rng.integers(3, min(engine.vocab_size, 5000), sizes).tolist()
            runs = {
                "engine": functools.partial(engine.run, prompts, arguments.tokens),
                "service": functools.partial(follow_service, decoder.address, prompts, arguments.tokens),
            }
            # Who comes second may find the machine warm, or its neighbours awake.
            order = sorted(runs, reverse=number % 2 == 1)
            found = {name: _measured(runs[name], pids[name]) for name in order}
            alone, served = found["engine"], found["service"]
            if engine.is_batch_invariant and alone.arrivals.token_ids != served.arrivals.token_ids:
                raise ValueError("the service's tokens are not the engine's: the two do not do the same work")
            if number == 0:  # it maps the weights into both processes
                continue
            shares.append(_report(number, alone, served))
        engine.stop()
    return shares


def _report(number: int, alone: Measured, served: Measured) -> float:
    engine_rate, service_rate = alone.arrivals.tokens_per_s(), served.arrivals.tokens_per_s()
    share = service_rate / engine_rate
    result = {
        "round": number,
        "engine_tokens_per_s": round(engine_rate, 1),
        "service_tokens_per_s": round(service_rate, 1),
        "share": round(share, 3),
        "cpu_us_per_token": {**alone.cpu_us, **served.cpu_us},
    }
    print(json.dumps(result), flush=True)
    return share


def main() -> None:
    """Prints one JSON line a round, and the median share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--backend", default="native")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=48, help="generated by each stream")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("decoder_flags", nargs="*", help="more flags of the decoder, after --")
    arguments = parser.parse_args()
    print(json.dumps(describe_cpu()), file=sys.stderr)
    with tempfile.TemporaryDirectory() as directory:
        shares = measure(arguments, Path(directory))
    print(json.dumps({"streams": arguments.streams, "median_share": round(statistics.median(shares), 3)}))


if __name__ == "__main__":
    main()
