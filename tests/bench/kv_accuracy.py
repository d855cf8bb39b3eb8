"""What rounding K/V costs: the demo model's held-out probes, one JSON line a K/V dtype.

    python -m tests.bench.kv_accuracy --probes 300 --kv-dtype bf16,int8

A probe is right if every token of its answer, the end included, is the most likely one after those before it. `kl` compares the
distributions of the answers' tokens with those of float32 K/V, in nats. Questions and answers go through the model in chunks, so that
attention reads rows from the pool and rows of its own step.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from clients.probes import TASKS, Probe, make_probe
from services.decoder.demo_model import checkpoint_dir
from services.decoder.demo_model.corpus import answer_text, question_text
from services.decoder.models import Model
from tests.bench.decode_step import make_bench_ops
from tests.decoder.model_driver import ModelDriver, load, make_pool

CHUNK = 16

Array = npt.NDArray[Any]


class Demo:
    """The bundled model on a backend."""

    def __init__(self, backend: str, precision: str, directory: Path) -> None:
        self._model: Model = load(checkpoint_dir(), make_bench_ops(backend, precision, None))
        self._tokenizer = Tokenizer.from_file(str(checkpoint_dir() / "tokenizer.json"))
        self._directory = directory

    def answer_logits(self, probes: list[Probe], kv_dtype: str, layout: str) -> Iterator[tuple[list[int], Array]]:
        """Of each probe: the answer's tokens, and the logits [answer, vocab_size] that each of them is chosen by."""
        pool = make_pool(self._directory, self._model.config, kv_dtype, num_blocks=256, layout=layout)
        for probe in probes:
            question = self._tokenizer.encode(question_text(probe.prompt)).ids
            answer = self._tokenizer.encode(answer_text(probe.answer)).ids
            yield answer, self._logits(pool, question + answer)[len(question) - 1 : -1]

    def _logits(self, pool: Any, tokens: list[int]) -> Array:
        driver = ModelDriver(self._model, pool, range(pool.num_blocks))
        rows = []
        for start in range(0, len(tokens), CHUNK):
            chunk = tokens[start : start + CHUNK]
            batch = driver.batch({"probe": chunk})
            object.__setattr__(batch, "sample_rows", np.arange(len(chunk), dtype=np.int32))
            step = self._model.begin(batch, pool)
            rows.append(self._model.logits(step))
            self._model.commit(step)
            driver.lengths["probe"] += len(chunk)
        return np.concatenate(rows)


def _log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def measure(demo: Demo, num_probes: int, kv_dtypes: list[str], layout: str) -> Iterator[dict[str, Any]]:
    """Accuracy by task in percent, and the divergence from float32 K/V."""
    probes = {
        task: [make_probe(task, random.Random(f"kv {task} {i}"), held_out=True) for i in range(num_probes)]
        for task in TASKS
    }
    exact = {
        task: [_log_softmax(logits) for _, logits in demo.answer_logits(probes[task], "f32", layout)] for task in TASKS
    }
    for kv_dtype in kv_dtypes:
        accuracy, divergences = {}, []
        for task in TASKS:
            right = 0
            for (answer, logits), expected in zip(
                demo.answer_logits(probes[task], kv_dtype, layout), exact[task], strict=True
            ):
                right += logits.argmax(axis=-1).tolist() == answer
                divergences.append((np.exp(expected) * (expected - _log_softmax(logits))).sum(axis=-1))
            accuracy[task] = round(100 * right / num_probes, 2)
        kl = np.concatenate(divergences)
        yield {
            "kv_dtype": kv_dtype,
            "accuracy": accuracy,
            "kl_mean": float(f"{kl.mean():.3g}"),
            "kl_p99": float(f"{np.quantile(kl, 0.99):.3g}"),
            "answer_tokens": len(kl),
        }


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=["native", "mlx"], default="native")
    parser.add_argument("--precision", choices=["fast", "exact"], default="exact", help="of the native backend")
    parser.add_argument("--probes", type=int, default=100, help="of each task")
    parser.add_argument("--kv-dtype", default="f32,bf16,int8", help="one or more of f32, bf16, f16 and int8")
    parser.add_argument("--kv-layout", choices=["hnd", "nhd"], default="hnd")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        demo = Demo(arguments.backend, arguments.precision, Path(directory))
        for result in measure(demo, arguments.probes, arguments.kv_dtype.split(","), arguments.kv_layout):
            print(json.dumps(result | {"backend": arguments.backend, "precision": arguments.precision}), flush=True)


if __name__ == "__main__":
    main()
