"""What of the engine's speed reaches clients: tokens a second over gRPC beside those of an engine in this process.

    python -m tests.bench.service_share --model DIR --streams 16 --tokens 48 --rounds 3

Both decode the same prompts greedily, in turns, on the same machine; the service is a manager and a decoder as separate processes,
and its client is this process. Counted are the tokens between the moment when every stream has begun and the first one's end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import queue
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from protos import decoder_pb2_grpc
from services.decoder.contiguous_leases import ContiguousLeases
from services.decoder.engine import Engine, EngineSettings
from services.decoder.loaded_model import load
from services.decoder.loader import open_checkpoint
from services.decoder.model_config import ModelConfig, read_model_config
from services.decoder.request import DecodeRequest, Event, Failed, Finished, SamplingParams, Token
from services.decoder.service import contiguous_kv
from tests.bench.machine import describe_cpu
from tests.e2e.followed import token_request
from tests.e2e.processes import Processes

Prompts = Sequence[Sequence[int]]


class Arrivals:
    """When each stream's tokens came."""

    def __init__(self, num_streams: int) -> None:
        self._times: list[list[float]] = [[] for _ in range(num_streams)]

    def add(self, stream: int, num_tokens: int = 1) -> None:
        """Tokens of a stream are here."""
        self._times[stream] += [time.perf_counter()] * num_tokens

    def tokens_per_s(self) -> float:
        """While all streams decode."""
        began = max(times[1] for times in self._times)
        ended = min(times[-1] for times in self._times)
        count = sum(began < at <= ended for times in self._times for at in times)
        return count / (ended - began)


class InProcess:
    """An engine on a thread of this process, with caches of its own."""

    def __init__(self, directory: Path, backend: str, num_streams: int, kv_capacity: int) -> None:
        checkpoint = open_checkpoint(directory)
        self.config: ModelConfig = read_model_config(checkpoint)
        kv_dtype = self.config.kv_dtype
        leases = ContiguousLeases(lambda geometry: contiguous_kv(geometry, num_streams, kv_capacity))
        self._came: queue.SimpleQueue[Sequence[tuple[str, Event]]] = queue.SimpleQueue()
        settings = EngineSettings(num_streams, kv_capacity, 2048)
        self._engine = Engine(
            lambda: load(checkpoint, self.config, kv_dtype, backend, "fast")[0], leases, settings, self._came.put
        )
        self._engine.start()

    def run(self, prompts: Prompts, num_tokens: int) -> float:
        """Tokens a second of all prompts together."""
        arrivals = Arrivals(len(prompts))
        for index, prompt in enumerate(prompts):
            self._engine.submit(DecodeRequest(str(index), prompt, SamplingParams(), num_tokens))
        running = len(prompts)
        while running:
            for request_id, event in self._came.get():
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Token):
                    arrivals.add(int(request_id))
                running -= isinstance(event, Finished)
        return arrivals.tokens_per_s()

    def stop(self) -> None:
        """Ends its thread."""
        self._engine.stop(0)


async def run_service(address: str, prompts: Prompts, num_tokens: int) -> float:
    """Tokens a second of all prompts together, as one client sees them."""
    arrivals = Arrivals(len(prompts))

    async def follow(stub: Any, index: int) -> None:
        async for response in stub.Generate(token_request(prompts[index], num_tokens)):
            if response.WhichOneof("event") == "delta":
                arrivals.add(index, len(response.delta.token_ids))

    async with grpc.aio.insecure_channel(address) as channel:
        stub = decoder_pb2_grpc.DecoderStub(channel)
        await asyncio.gather(*(follow(stub, index) for index in range(len(prompts))))
    return arrivals.tokens_per_s()


def measure(arguments: argparse.Namespace, directory: Path) -> list[float]:
    """The service's share in each round."""
    capacity = arguments.prompt_tokens + arguments.tokens + 16
    rng = np.random.default_rng(5)
    shares = []
    with Processes(directory) as processes:
        manager = processes.start_manager(num_blocks=1024)
        flags = ("--max-seqs", str(arguments.streams), "--kv-capacity", str(capacity))
        decoder = processes.start_decoder(
            manager, *flags, *arguments.decoder_flags, model=arguments.model, backend=arguments.backend
        )
        engine = InProcess(arguments.model, arguments.backend, arguments.streams, capacity)
        for number in range(arguments.rounds + 1):
            sizes = (arguments.streams, arguments.prompt_tokens)
            prompts = rng.integers(3, min(engine.config.vocab_size, 5000), sizes).tolist()
            alone = engine.run(prompts, arguments.tokens)
            served = asyncio.run(run_service(decoder.address, prompts, arguments.tokens))
            if number == 0:  # it maps the weights into both processes
                continue
            shares.append(served / alone)
            result = {"round": number, "engine_tokens_per_s": round(alone, 1), "service_tokens_per_s": round(served, 1)}
            print(json.dumps(result | {"share": round(served / alone, 3)}), flush=True)
        engine.stop()
    return shares


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
