"""The services on one GPU, end to end through real processes: `python -m tests.bench.gpu_services`, or `make gpu`.

Checksums and copies by kernels; what a killed process still writes; token parity with mlx-lm in float32; a decoder, and then the manager,
killed with 16 streams; tokens a second through gRPC. Without a GPU it says what it skipped. `--only` chooses parts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from services.cuda_memory import CudaDevice, CudaError, SharedGpuMemory

_NUM_STREAMS, _NUM_TOKENS = 16, 200
_GPU = ("--pool-memory", "cuda")
_START_S = 500.0  # a fresh machine compiles kernels
_UNDISTURBED = "undisturbed"  # a tenant of its own: the disturbed streams find nothing of it
_WANTED_SHARE = 0.9
Line = tuple[str, bool]


def memory(_: Path, __: int) -> Iterator[Line]:
    """Checksums and copies in GPU memory."""
    stride, num_bytes = 1 << 21, 48 * 2 * 4 * 16 * 128 * 2
    pool = SharedGpuMemory(CudaDevice(), 70 * stride)
    rng = random.Random(0)
    data = [rng.randbytes(num_bytes) for _ in range(70)]
    for block, block_bytes in enumerate(data):
        pool.write(block * stride, block_bytes)
    offsets = [block * stride for block in range(70)]
    wanted = [zlib.crc32(block) for block in data]
    pool.checksums(offsets[:1], num_bytes)  # makes the tables
    started = time.perf_counter()
    found = pool.checksums(offsets, num_bytes)
    took_s = time.perf_counter() - started
    yield f"CRC-32 of 70 blocks of {num_bytes} bytes: zlib's, {70 * num_bytes / took_s / 1e9:.0f} GB/s", found == wanted
    small = [
        pool.checksums(offsets[:2], size) == [zlib.crc32(block[:size]) for block in data[:2]] for size in (4, 1020)
    ]
    yield "CRC-32 of blocks of 4 and 1020 bytes: zlib's", all(small)
    pool.copy_rows(3 * 256, stride + 3 * 256, 7 * 256, 16 * 256, 384)
    copied = bytearray(data[1])
    for row in range(384):
        start = row * 16 * 256 + 3 * 256
        copied[start : start + 7 * 256] = data[0][start : start + 7 * 256]
    yield "a fork's partial block: 7 of 16 tokens copied, nothing else", pool.read(stride, num_bytes) == bytes(copied)
    pool.close()


def death(_: Path, __: int) -> Iterator[Line]:
    """What comes after a kill."""
    from tests.bench import gpu_death

    yield from gpu_death.run()


def parity(directory: Path, _: int) -> Iterator[Line]:
    """Greedy streams through gRPC in float32 against mlx-lm on the host's cores."""
    import numpy as np

    from tests.decoder.tiny_models import random_tiny_config, write_tiny_checkpoint
    from tests.e2e.processes import DEMO_MODEL

    models: list[tuple[str, Path]] = [("the bundled model", DEMO_MODEL)]
    for seed, bits in ((0, 0), (1, 4), (2, 8)):
        config = random_tiny_config(np.random.default_rng(2000 + seed), bits)
        name = f"a random model, {bits or 32} bits"
        models.append((name, write_tiny_checkpoint(directory / f"tiny-{seed}", config, seed)))
    for index, (name, model) in enumerate(models):
        yield _parity_of(name, model, directory / f"parity-{index}")


def _parity_of(name: str, model: Path, directory: Path) -> Line:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    with _processes(directory) as processes:
        manager = processes.start_manager(*_GPU, num_blocks=512)
        decoder = _decoder(processes, manager, "one", model, "--precision", "exact", "--kv-dtype", "f32")
        vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
        rng = random.Random(7)
        prompts = [[rng.randrange(vocab_size) for _ in range(rng.randint(1, 60))] for _ in range(_NUM_STREAMS)]
        streams = asyncio.run(_all([decoder.address], [_request(prompt, 48, None) for prompt in prompts], ""))
        with mx.stream(mx.cpu):
            reference, _ = load_model(model)
            same = sum(
                stream.token_ids == _greedy(reference, prompt, 48)
                for stream, prompt in zip(streams, prompts, strict=True)
            )
        return f"{name}: {same} of {len(prompts)} greedy streams of 48 tokens through gRPC are mlx-lm's", same == len(
            prompts
        )


def _greedy(model: Any, prompt: Sequence[int], num_tokens: int) -> list[int]:
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    cache, tokens, output = make_prompt_cache(model), mx.array([prompt]), []
    for _ in range(num_tokens):
        token: Any = mx.argmax(model(tokens, cache=cache)[0, -1]).item()
        output.append(int(token))
        tokens = mx.array([output[-1:]])
    return output


def kills(directory: Path, _: int) -> Iterator[Line]:
    """kill -9 of a decoder, and of the manager, each with 16 streams on it; the bundled model, fast kernels."""
    from tests.e2e.processes import DEMO_MODEL

    with _processes(directory / "kills") as processes:
        manager = processes.start_manager(*_GPU, num_blocks=2048)
        flags = ("--precision", "fast", "--max-num-batched-tokens", "256")
        decoders = [_decoder(processes, manager, name, DEMO_MODEL, *flags, wait=False) for name in ("one", "two")]
        for decoder in decoders:
            decoder.wait_serving(_START_S)
        rng = random.Random(1)
        requests = [
            _request([rng.randrange(700) for _ in range(rng.randint(1, 300))], _NUM_TOKENS, i if i % 2 else None)
            for i in range(2 * _NUM_STREAMS)
        ]
        addresses = [decoder.address for decoder in decoders]
        wanted = [stream.token_ids for stream in asyncio.run(_all(addresses[1:], requests, _UNDISTURBED))]

        found = asyncio.run(_all(addresses, requests, "decoder", decoders[0].kill))
        yield _verdict("kill -9 of a decoder with 16 streams", found, wanted, manager)

        def kill_manager() -> None:
            manager.kill()
            again = processes.start_manager(*_GPU, num_blocks=2048, listen=manager.address, pool_dir=manager.pool_dir)
            managers.append(again)

        managers: list[Any] = []
        found = asyncio.run(_all(addresses[1:], requests[:_NUM_STREAMS], "manager", kill_manager))
        same = [stream.token_ids for stream in found] == wanted[:_NUM_STREAMS]
        yield f"kill -9 of the manager with {_NUM_STREAMS} streams: {'all' if same else 'NOT all'} token-exact", same
        came_back = bool(managers[0].events("the GPU memory is back"))
        yield "the next manager got the memory back from a decoder", came_back
        found = asyncio.run(_all(addresses[1:], requests, "decoder"))
        yield _verdict("the same requests again, after the manager's restart", found, wanted, managers[0], all_hit=True)


def _verdict(what: str, found: list[Any], wanted: list[list[int]], manager: Any, all_hit: bool = False) -> Line:
    same = sum(stream.token_ids == tokens for stream, tokens in zip(found, wanted, strict=True))
    resumed = [stream for stream in found if stream.resumed]
    hits = [stream.finished.num_cached_tokens for stream in (found if all_hit else resumed)]
    corrupt = manager.stats().num_corrupt
    line = (
        f"{what}: {same} of {len(found)} streams token-exact, {len(resumed)} resumed elsewhere; prefix hits of {sum(hits)} tokens"
        f" in {sum(hit > 0 for hit in hits)} streams, {corrupt} corrupt blocks"
    )
    enough = len(resumed) >= _NUM_STREAMS // 2 or all_hit
    return line, same == len(found) and enough and sum(hits) > 0 and corrupt == 0


def throughput(directory: Path, num_layers: int) -> Iterator[Line]:
    """Through gRPC against in process, with random weights in Qwen3-30B-A3B's geometry."""
    from tests.bench.gpu_throughput import NUM_STREAMS, NUM_TOKENS, ROUNDS, SETTINGS, prompts

    model = directory / "random"
    _run("tests.bench.gpu_checkpoint", str(model), str(num_layers))
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    with _processes(directory / "throughput") as processes:
        manager = processes.start_manager(*_GPU, num_blocks=3 * 1024)
        alone = json.loads(_run("tests.bench.gpu_throughput", str(model), manager.address).splitlines()[-1])
        flags = ("--max-seqs", str(SETTINGS.max_seqs), "--kv-capacity", str(SETTINGS.kv_capacity))
        decoder = _decoder(processes, manager, "served", model, *flags)
        rates = []
        for number in range(ROUNDS):
            requests = [_request(prompt, NUM_TOKENS, index) for index, prompt in enumerate(prompts(number, vocab_size))]
            started = time.perf_counter()
            asyncio.run(_all([decoder.address], requests, str(number)))
            rates.append(NUM_STREAMS * NUM_TOKENS / (time.perf_counter() - started))
        served = statistics.median(rates[1:])
        warm = [event for event in decoder.events("warming up") if "took_s" in event]
        print(
            f"       warm-up of a decoder that finds its kernels compiled: {sum(event['took_s'] for event in warm):.1f} s"
        )
    share = served / alone["tokens_per_s"]
    line = (
        f"{NUM_STREAMS} streams of {NUM_TOKENS} tokens, {num_layers} layers: {served:.0f} tokens/s through gRPC,"
        f" {alone['tokens_per_s']:.0f} in process: {share:.1%} (wanted {_WANTED_SHARE:.0%})"
    )
    yield line, share >= _WANTED_SHARE


def _processes(directory: Path) -> Any:
    from tests.e2e.processes import Processes

    return Processes(directory)


def _decoder(processes: Any, manager: Any, worker_id: str, model: Path, *flags: str, wait: bool = True) -> Any:
    decoder = processes.start_decoder(manager, *flags, model=model, worker_id=worker_id, backend="cuda", wait=False)
    if wait:
        decoder.wait_serving(_START_S)
    return decoder


def _request(prompt: Sequence[int], num_tokens: int, seed: int | None) -> Any:
    from tests.e2e.followed import token_request

    return token_request(prompt, num_tokens, seed=seed)


async def _all(
    addresses: list[str], requests: list[Any], tenant: str, interrupt: Callable[[], None] | None = None
) -> list[Any]:
    """Every stream to its end; `interrupt` happens when a third of their tokens have come."""
    from clients.decoder import DecoderClient
    from tests.e2e.followed import Pace, follow

    pace = Pace()

    async def interrupt_later() -> None:
        await pace.reach(len(requests) * _NUM_TOKENS // 3)
        if interrupt is not None:
            await asyncio.to_thread(interrupt)

    async with DecoderClient(addresses) as client:
        streams = asyncio.gather(*(follow(client, request, tenant=tenant, pace=pace) for request in requests))
        if interrupt is not None:
            await interrupt_later()
        return list(await streams)


def _run(module: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{module} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


PARTS: dict[str, Callable[[Path, int], Iterator[Line]]] = {
    "memory": memory,
    "death": death,
    "parity": parity,
    "kills": kills,
    "throughput": throughput,
}


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=48, help="of the model of the throughput part (%(default)s)")
    parser.add_argument("--only", choices=PARTS, action="append", help="a part; may be repeated (all)")
    args = parser.parse_args()
    chosen = args.only or list(PARTS)
    try:
        device = CudaDevice()
    except CudaError as error:
        print(f"skipped: the services on a GPU ({', '.join(chosen)}): {error}")
        return
    print(f"the services on {device.name}", flush=True)
    os.environ["MLX_ENABLE_TF32"] = "0"
    failed = 0
    for part in chosen:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as directory:
            try:
                for words, holds in PARTS[part](Path(directory), args.layers):
                    print(f"{'ok    ' if holds else 'FAILED'} {words}", flush=True)
                    failed += not holds
            except Exception as error:  # the other parts are worth running
                print(f"FAILED {part}: {type(error).__name__}: {str(error)[-3000:]}", flush=True)
                failed += 1
        print(f"       {part} took {time.monotonic() - started:.0f} s", flush=True)
    if failed:
        raise SystemExit(f"{failed} checks failed")


if __name__ == "__main__":
    main()
