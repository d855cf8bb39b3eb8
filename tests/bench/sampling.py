"""How long sampling takes over a large vocabulary, in C and in NumPy: one JSON line a kind of request.

python -m tests.bench.sampling --vocab 151936 --rows 16
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from services.decoder.ops.native import NativeOps
from services.decoder.ops.native.sampling import sample
from services.decoder.request import SamplingParams
from services.decoder.sampler import RowSampling, sample_rows
from tests.bench.machine import describe_cpu

KINDS: Mapping[str, tuple[dict[str, Any], int | None]] = {
    "greedy": ({}, None),
    "greedy, 5 logprobs": ({}, 5),
    "temperature 1": ({"temperature": 1.0}, None),
    "temperature 0.8, top_k 50, top_p 0.95": ({"temperature": 0.8, "top_k": 50, "top_p": 0.95}, None),
    "temperature 1, top_p 0.95": ({"temperature": 1.0, "top_p": 0.95}, None),
    "temperature 1, min_p 0.05": ({"temperature": 1.0, "min_p": 0.05}, None),
}


def median_ms(work: Callable[[], object], num_runs: int) -> float:
    """The median time of one run, after one that does not count."""
    times = []
    for _ in range(num_runs + 1):
        began = time.perf_counter()
        work()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times[1:])


def main() -> None:
    """Prints milliseconds a row, beside each other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=151_936, metavar="N")
    parser.add_argument("--rows", type=int, default=16, help="rows of a step")
    parser.add_argument("--runs", type=int, default=9, help="timed runs of each")
    parser.add_argument("--threads", type=int, help="of the native backend (default: the cores available)")
    arguments = parser.parse_args()
    print(json.dumps(describe_cpu()), file=sys.stderr)
    ops = NativeOps(threads=arguments.threads)
    logits = np.random.default_rng(1).normal(0, 3, (arguments.rows, arguments.vocab)).astype(np.float32)
    for kind, (params, num_logprobs) in KINDS.items():
        rows = [RowSampling(SamplingParams(**params, seed=i), 0, 7, num_logprobs) for i in range(arguments.rows)]
        native = median_ms(lambda rows=rows: sample(ops._lib, ops._context, logits, rows), arguments.runs)
        reference = median_ms(lambda rows=rows: sample_rows(logits, rows), max(1, arguments.runs // 3))
        result = {"kind": kind, "rows": arguments.rows, "native_ms_a_row": round(native / arguments.rows, 4)}
        print(json.dumps(result | {"numpy_ms_a_row": round(reference / arguments.rows, 3)}), flush=True)


if __name__ == "__main__":
    main()
