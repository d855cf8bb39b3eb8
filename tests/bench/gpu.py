"""Checks, times and prints everything of the `cuda` backend on one GPU: `python -m tests.bench.gpu`, or `make gpu`.

Without a GPU it says what it skipped, and why. The weights of the timed model are random, in Qwen3-30B-A3B's geometry, made on the
GPU; mlx-lm runs beside it with weights of the same shapes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from services.decoder.ops.cuda.driver import CudaDriver, CudaError
from tests.bench.gpu_models import GEOMETRY, TimedModel, mlx_lm_model, random_model
from tests.decoder.cuda import checks, parity, stage_checks

# Step in ms at context 64, and at 1,024, as measured on another H100 with llama.cpp 0.3.36's Q4_0 and flash attention.
_LLAMA_CPP = {1: (3.3, 3.4), 4: (5.8, 6.1), 8: (7.9, 8.3), 16: (14.7, 15.6), 32: (24.6, 26.2)}
_WANTED = {1: 3.0, 4: 4.3, 8: 5.5, 16: 8.0, 32: 11.0}
_WANTED_PREFILL = 18_000
_MODEL = Path(__file__).parents[2] / "services/decoder/demo_model/checkpoint"


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--check-only", action="store_true", help="no timings")
    parser.add_argument("--memory-check", action="store_true", help="little work, for compute-sanitizer; no timings")
    parser.add_argument("--time-only", action="store_true", help="no checks")
    parser.add_argument(
        "--no-mlx-lm", action="store_true", help="mlx-lm's first quantised product compiles for a minute"
    )
    args = parser.parse_args()
    try:
        driver = CudaDriver()
    except CudaError as error:
        print(f"skipped: kernels, parity, batch invariance, speed: {error}")
        return
    print(f"{driver.name}, {driver.multiprocessors} multiprocessors, MLX {mx.__version__}")
    failed = [line for line in _checks(args) if not _say(line)]
    if not args.check_only and not args.memory_check:
        bandwidth = _read_bandwidth(driver)
        print(f"read bandwidth: {bandwidth / 1e9:.0f} GB/s")
        _time_all(random_model(args.layers), bandwidth, None if args.no_mlx_lm else mlx_lm_model(args.layers))
    if failed:
        raise SystemExit(f"{len(failed)} checks failed")


def _checks(args: argparse.Namespace) -> Iterator[tuple[str, bool]]:
    if args.time_only:
        return
    yield from stage_checks.run(small=args.memory_check)
    if args.memory_check:
        return
    for precision in ("bf16", "f32"):
        print(f"the bundled model in {precision}", flush=True)
        checks.warm(
            _MODEL, precision, lambda what, took_s: print(f"       warm-up: {what}: {took_s:.1f} s", flush=True)
        )
        yield from checks.run(_MODEL, precision)
    print("the parity matrix in float32", flush=True)
    yield from parity.run()


def _say(line: tuple[str, bool]) -> bool:
    words, holds = line
    print(f"{'ok    ' if holds else 'FAILED'} {words}", flush=True)
    return holds


def _time_all(model: TimedModel, bandwidth: float, other: Callable[[int], float] | None) -> None:
    print("batch context  step ms  wanted  /llama.cpp  /mlx-lm  experts  share of read bandwidth")
    for batch, (short, long) in _LLAMA_CPP.items():
        mlx_lm_ms = other(batch) if other is not None else None
        for context, llama_ms in ((64, short), (1024, long)):
            step_ms = model.decode_ms(batch, context)
            distinct = model.distinct_experts(batch)
            share = GEOMETRY.step_bytes(batch, context, distinct, model.num_layers) / (step_ms / 1e3) / bandwidth
            wanted = _WANTED[batch] * (1.0 if context == 64 else 1.15)
            ratio = f"{step_ms / mlx_lm_ms:7.2f}" if mlx_lm_ms is not None and context == 64 else "      -"
            print(
                f"{batch:5d} {context:7d} {step_ms:8.2f} {wanted:7.2f} {step_ms / llama_ms:11.2f}  {ratio}  {distinct:7d}"
                f"  {share:.0%}",
                flush=True,
            )
    for tokens in (512, 2048):
        rate = model.prefill_rate(tokens)
        print(f"prefill of {tokens} tokens: {rate:.0f} tokens/s (wanted {_WANTED_PREFILL})", flush=True)


def _read_bandwidth(driver: CudaDriver) -> float:
    """Bytes a second of a kernel that only reads 4 GiB."""
    source = """
        const uint4* from = reinterpret_cast<const uint4*>(x);
        unsigned sum = 0;
        #pragma unroll 8
        for (size_t i = blockIdx.x * 1024 + threadIdx.x; i < (size_t(4) << 30) / 16; i += size_t(gridDim.x) * 1024) {
            uint4 v = from[i];
            sum += v.x ^ v.y ^ v.z ^ v.w;
        }
        if (sum == 12345) y[0] = sum;
    """
    kernel: Any = mx.fast.cuda_kernel(name="leasehold_read", input_names=["x"], output_names=["y"], source=source)
    array = mx.random.randint(0, 255, (1 << 30,)).astype(mx.uint32)
    mx.eval(array)
    grid = (driver.multiprocessors * 2 * 1024, 1, 1)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        mx.eval(
            kernel(inputs=[array], output_shapes=[(4,)], output_dtypes=[mx.uint32], grid=grid, threadgroup=(1024, 1, 1))
        )
        times.append(time.perf_counter() - start)
    return float((4 << 30) / statistics.median(times[2:]))


if __name__ == "__main__":
    main()
