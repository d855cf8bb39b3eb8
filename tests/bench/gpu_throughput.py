"""Tokens a second of the engine in one process, leases from a manager included: `python -m tests.bench.gpu_throughput MODEL MANAGER`.

What the same requests reach through gRPC is measured against it (gpu_services.py).
"""

from __future__ import annotations

import asyncio
import json
import queue
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from clients.kv_manager import KvManagerClient
from services.decoder.cuda_model import warm_up
from services.decoder.engine import Engine, EngineSettings, LoadedModel
from services.decoder.gpu_pool import map_gpu_pool
from services.decoder.loaded_model import load
from services.decoder.loader import open_checkpoint
from services.decoder.model_config import read_model_config
from services.decoder.request import DecodeRequest, Event, Failed, Finished, SamplingParams
from services.decoder.session import ManagerLeases, WorkerSettings

NUM_STREAMS, NUM_PROMPT, NUM_TOKENS = 32, 64, 256
ROUNDS = 4  # the first is not counted
SETTINGS = EngineSettings(max_seqs=NUM_STREAMS, kv_capacity=2048, max_num_batched_tokens=2048)


def prompts(round_number: int, vocab_size: int) -> list[list[int]]:
    """Of one round: different in each, so that nothing is found in the cache, and the same through gRPC."""
    rng = random.Random(round_number)
    return [[rng.randrange(vocab_size) for _ in range(NUM_PROMPT)] for _ in range(NUM_STREAMS)]


async def _measure(model_dir: Path, manager: str) -> None:
    checkpoint = open_checkpoint(model_dir)
    config = read_model_config(checkpoint)
    ended: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def emit(events: Sequence[tuple[str, Event]]) -> None:
        for _, event in events:
            if isinstance(event, (Finished, Failed)):
                ended.put(event)

    def build() -> LoadedModel:
        loaded, _ = load(checkpoint, config, "bf16", "cuda", "fast")
        warm_up(loaded.model, config, "bf16", SETTINGS)
        return loaded

    worker = WorkerSettings("in-process", SETTINGS.max_seqs, SETTINGS.kv_capacity, "cuda")
    leases = ManagerLeases(
        KvManagerClient(manager), worker, lambda pool: map_gpu_pool(Path(pool.kv_path), "in-process", "bf16")
    )
    await leases.hold_lock()
    engine = Engine(build, leases, SETTINGS, emit)
    await asyncio.to_thread(engine.start)
    await leases.open()
    rates = []
    for number in range(ROUNDS):
        started = time.perf_counter()
        for index, prompt in enumerate(prompts(number, config.vocab_size)):
            sampling = SamplingParams(temperature=1.0, seed=index)
            engine.submit(DecodeRequest(f"{number}-{index}", prompt, sampling, NUM_TOKENS))
        for _ in range(NUM_STREAMS):
            event = await asyncio.to_thread(ended.get)
            if isinstance(event, Failed):
                raise event.error
        rates.append(NUM_STREAMS * NUM_TOKENS / (time.perf_counter() - started))
    await asyncio.to_thread(engine.stop, 0.0)
    await leases.close()
    print(json.dumps({"tokens_per_s": statistics.median(rates[1:]), "all": rates}))


if __name__ == "__main__":
    asyncio.run(_measure(Path(sys.argv[1]), sys.argv[2]))
