"""Token parity through the whole service: with mlx-lm, between block sizes, and across every cut of a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from mlx_lm.utils import load_model  # noqa: E402

from clients.decoder import DecoderClient  # noqa: E402
from protos import decoder_pb2 as pb  # noqa: E402
from services.decoder.request_parser import TENANT_METADATA_KEY  # noqa: E402
from tests.decoder.tiny_models import TinyConfig, random_tiny_config, write_tiny_checkpoint  # noqa: E402
from tests.e2e.followed import Pace, follow, token_request  # noqa: E402
from tests.e2e.processes import Decoder, Processes  # noqa: E402
from tests.e2e.streams import TIMEOUT_S, Received, receive, receive_rest, stub_of  # noqa: E402

NUM_TOKENS = 64
NUM_PROMPTS = 16
KV_DTYPES = ("f32", "bf16", "f16", "int8")
# 24 random configurations: every third float32, 4-bit, 8-bit. The first of each kind run always.
MATRIX = [(seed, (0, 4, 8)[seed % 3]) for seed in range(24)]


def _mlx_lm_greedy(model: Any, prompt: Sequence[int]) -> list[int]:
    cache = make_prompt_cache(model)
    tokens, output = mx.array([prompt]), []
    for _ in range(NUM_TOKENS):
        logits = model(tokens, cache=cache)
        output.append(int(mx.argmax(logits[0, -1]).item()))
        tokens = mx.array([output[-1:]])
    return output


def _ragged_prompts(rng: np.random.Generator, vocab_size: int, longest: int) -> list[list[int]]:
    lengths = rng.integers(1, longest + 1, NUM_PROMPTS)
    return [rng.integers(0, vocab_size, int(length)).tolist() for length in lengths]


async def _greedy_as_they_arrive(decoder: Decoder, prompts: Sequence[Sequence[int]], gaps: Sequence[int]) -> list[Any]:
    """Every prompt's tokens. Each starts so many tokens, over all streams, after the one before it."""
    pace = Pace()
    starts = np.cumsum([0, *gaps]).tolist()
    async with DecoderClient(decoder.address) as client:
        followed = await asyncio.gather(
            *(
                follow(client, token_request(prompt, NUM_TOKENS), pace=pace, start_at=start)
                for prompt, start in zip(prompts, starts, strict=True)
            )
        )
    return [stream.token_ids for stream in followed]


@pytest.mark.parametrize(
    ("seed", "bits"), [pytest.param(*case, marks=() if case in MATRIX[:3] else pytest.mark.slow) for case in MATRIX]
)
async def test_greedy_streams_that_arrive_at_different_steps_equal_mlx_lm(
    processes: Processes, tmp_path: Path, seed: int, bits: int
) -> None:
    rng = np.random.default_rng(2000 + seed)
    config = random_tiny_config(rng, bits)
    model = write_tiny_checkpoint(tmp_path / "model", config, seed)
    prompts = _ragged_prompts(rng, config.vocab_size, 90)
    max_seqs = int(rng.integers(5, 20))
    manager = processes.start_manager("--block-size", str(rng.choice([8, 16, 32])), num_blocks=512)
    decoder = processes.start_decoder(
        manager,
        *("--kv-dtype", "f32", "--max-seqs", str(max_seqs)),
        *("--max-num-batched-tokens", str(rng.integers(max_seqs, 80))),  # long prompts go in chunks
        model=model,
    )
    gaps = rng.integers(0, 50, NUM_PROMPTS - 1).tolist()  # less than a stream makes, so that every start comes
    outputs = await _greedy_as_they_arrive(decoder, prompts, gaps)
    reference, _ = load_model(model)
    for index, prompt in enumerate(prompts):
        assert outputs[index] == _mlx_lm_greedy(reference, prompt), (config, index)
    manager.wait_all_free()


@pytest.mark.parametrize(
    "kv_dtype", ["bf16", pytest.param("f32", marks=pytest.mark.slow), pytest.param("int8", marks=pytest.mark.slow)]
)
async def test_rows_s8_s13_block_sizes_8_16_32_and_no_paged_agree_token_for_token_in_either_layout(
    processes: Processes, tmp_path: Path, kv_dtype: str
) -> None:
    rng = np.random.default_rng(31)
    config = TinyConfig()
    model = write_tiny_checkpoint(tmp_path / "model", config, 31)
    prompts = _ragged_prompts(rng, config.vocab_size, 70)
    gaps = rng.integers(0, 50, NUM_PROMPTS - 1).tolist()
    outputs: dict[str, list[Any]] = {}
    for block_size, layout in ((None, "nhd"), (8, "hnd"), (16, "nhd"), (32, "hnd")):
        manager = None
        if block_size is not None:
            manager = processes.start_manager("--block-size", str(block_size), num_blocks=512)
        flags = ("--kv-dtype", kv_dtype, "--kv-layout", layout, "--max-num-batched-tokens", "48")
        decoder = processes.start_decoder(manager, *flags, model=model)
        outputs[str(block_size)] = await _greedy_as_they_arrive(decoder, prompts, gaps)
        decoder.kill()
    assert outputs["8"] == outputs["16"] == outputs["32"] == outputs["None"]


def _cuts(rng: np.random.Generator, every: bool) -> list[int]:
    if every:
        return list(range(NUM_TOKENS + 1))
    # Around the ends of blocks, and anywhere.
    return sorted({0, 1, 15, 16, 17, 48, NUM_TOKENS - 1, NUM_TOKENS, *rng.integers(2, NUM_TOKENS, 4).tolist()})


def _resumed(whole: pb.GenerateRequest, started: pb.Started, outputs: Sequence[int]) -> pb.GenerateRequest:
    resume = pb.Resume(
        prompt_token_ids=started.prompt_token_ids,
        samples=[pb.SampleProgress(output_token_ids=outputs)],
        seed=started.seed,
        numerics_id=started.numerics_id,
        max_tokens=started.max_tokens,
    )
    return pb.GenerateRequest(resume=resume, sampling=whole.sampling, stop=whole.stop)


@pytest.mark.parametrize("every_cut", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
async def test_a_request_cut_anywhere_and_resumed_from_its_tokens_gives_the_same_tokens(
    processes: Processes, tmp_path: Path, kv_dtype: str, every_cut: bool
) -> None:
    """Greedy and sampled; both where the earlier K/V is found in the pool, and where all of it is computed anew."""
    rng = np.random.default_rng(47)
    config = TinyConfig()
    model = write_tiny_checkpoint(tmp_path / "model", config, 47)
    manager = processes.start_manager(num_blocks=512)
    flags = ("--kv-dtype", kv_dtype, "--max-num-batched-tokens", "40")
    decoder = processes.start_decoder(manager, *flags, model=model)
    async with stub_of(decoder.address) as stub:

        async def rest_of(request: pb.GenerateRequest, tenant: str) -> Received:
            # Tenants share no blocks: with one of its own, nothing of before is found.
            call = stub.Generate(request, timeout=TIMEOUT_S, metadata=((TENANT_METADATA_KEY, tenant),))
            return await receive_rest(call, [])

        for seed, length in ((None, 21), (11, 21), (12, 50)):
            prompt = rng.integers(0, config.vocab_size, length).tolist()
            request = token_request(prompt, NUM_TOKENS, seed=seed)
            whole = await receive(stub, request)
            cuts = _cuts(rng, every_cut)
            requests = [_resumed(request, whole.started, whole.token_ids[:cut]) for cut in cuts]
            found = await asyncio.gather(*(rest_of(request, "") for request in requests))
            anew = await asyncio.gather(*(rest_of(request, f"of-its-own-{i}") for i, request in enumerate(requests)))
            for cut, *rests in zip(cuts, found, anew, strict=True):
                assert [whole.token_ids[:cut] + rest.token_ids for rest in rests] == [whole.token_ids] * 2, (seed, cut)
            assert max(rest.finished.num_cached_tokens for rest in found) > 0
            assert max(rest.finished.num_cached_tokens for rest in anew) == 0
    manager.wait_all_free()
