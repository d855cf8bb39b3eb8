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
from tests.e2e.followed import Followed, follow
from tests.e2e.processes import Processes


@dataclass(frozen=True)
class Expected:
    """One request's whole stream."""

    token_ids: list[int]
    text: str
    reason: FinishReason
    stop_string: str


def write_model(directory: Path) -> Path:
    """A small model with a tokenizer, whose random weights make every token depend on all before it."""
    config = TinyConfig(vocab_size=VOCAB_SIZE, num_experts=4, max_position_embeddings=256)
    return write_tiny_checkpoint(directory, config, seed=1, tokenizer=True)


async def undisturbed(directory: Path, serving: Serving) -> list[Expected]:
    """The stream of each of `requests()`."""
    with Processes(directory) as processes:
        flags = ("--kv-dtype", KV_DTYPE, "--max-num-batched-tokens", "512")
        decoder = await asyncio.to_thread(
            lambda: processes.start_decoder(None, *flags, model=serving.model, backend=serving.backend)
        )
        async with DecoderClient(decoder.address) as client:
            streams: list[Followed] = await asyncio.gather(*(follow(client, request) for request in requests()))
    return [_expected(stream) for stream in streams]


def _expected(stream: Followed) -> Expected:
    assert stream.finished is not None
    return Expected(stream.token_ids, stream.text, stream.finished.reason, stream.finished.stop_string)
