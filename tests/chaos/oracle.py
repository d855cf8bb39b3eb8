"""What every request gives undisturbed: computed once, by one decoder that nobody touches and that has no pool."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from clients.decoder import DecoderClient
from clients.events import FinishReason
from tests.chaos.host import KV_DTYPE, Serving
from tests.chaos.plan import VOCAB_SIZE, requests
from tests.decoder.tiny_models import TinyConfig, write_tiny_checkpoint
from tests.e2e.followed import Followed, Sample, follow
from tests.e2e.processes import Processes


@dataclass(frozen=True)
class Expected:
    """One sample of a request, whole."""

    token_ids: list[int]
    text: str
    reason: FinishReason
    stop_string: str


def write_model(directory: Path) -> Path:
    """A small model with a tokenizer, whose random weights make every token depend on all before it."""
    config = TinyConfig(vocab_size=VOCAB_SIZE, num_experts=4, max_position_embeddings=256)
    return write_tiny_checkpoint(directory, config, seed=1, tokenizer=True)


async def undisturbed(directory: Path, serving: Serving) -> list[list[Expected]]:
    """The samples of each of `requests()`."""
    with Processes(directory) as processes:
        flags = ("--kv-dtype", KV_DTYPE, "--max-num-batched-tokens", "512")
        # Started here and not on a thread: whoever cancels this finds it among the processes to end.
        decoder = processes.start_decoder(None, *flags, model=serving.model, backend=serving.backend, wait=False)
        await asyncio.to_thread(decoder.wait_serving)
        async with DecoderClient(decoder.address) as client:
            streams: list[Followed] = await asyncio.gather(*(follow(client, request) for request in requests()))
    return [[_expected(stream.samples[index]) for index in sorted(stream.samples)] for stream in streams]


def _expected(sample: Sample) -> Expected:
    assert sample.finished is not None
    return Expected(sample.token_ids, sample.text, sample.finished.reason, sample.finished.stop_string)
