"""What must hold of the kernels on a GPU, as lines to print: the tests and the benchmark both run it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from protos.pool_format import ELEMENT_BYTES, BlockShape
from services.decoder.gpu_pool import GpuPool
from services.decoder.loader import open_checkpoint
from services.decoder.model_config import read_model_config
from services.decoder.ops.cuda.loading import load
from services.decoder.ops.cuda.table import addresses
from services.decoder.ops.cuda.warm_up import warm_up
from services.decoder.request import SamplingParams
from services.decoder.sampler import RowSampling, sample_rows
from tests.decoder.cuda.runner import Stream, run_logits, run_step
from tests.decoder.numpy_reference import NumpyQwen3Moe

_NUM_TOKENS = 400
_NUM_BLOCKS = 512
Array = np.ndarray[Any, Any]


def run(directory: Path, precision: str = "bf16") -> Iterator[tuple[str, bool]]:
    """Each check of a checkpoint: what it found, and whether it holds."""
    bench = _Bench(directory, precision)
    wanted = NumpyQwen3Moe(directory).logits(bench.tokens)
    got = bench.by_chunks([1] * _NUM_TOKENS)
    ours = _errors(got, wanted)
    if precision == "bf16":
        ratio = float(np.median(ours) / np.median(_errors(_mlx_lm_logits(directory, bench.tokens), wanted)))
        words = f"error against float64: median {np.median(ours):.2e}, {ratio:.2f} times mlx-lm's in bf16 (at most 1.2)"
        yield words, ratio <= 1.2
    else:
        yield f"error against float64: median {np.median(ours):.2e} (at most 1e-5)", float(np.median(ours)) <= 1e-5
    agree = float((got.argmax(1) == wanted.argmax(1)).mean())
    yield f"the best token is float64's in {agree:.1%} of {_NUM_TOKENS} positions", agree > 0.97
    for chunks in ([32] * 12 + [16], [400], [100, 300], [33] * 12 + [4], [64, 1, 1, 1, 200, 7, 126], [7] * 57 + [1]):
        ends = np.cumsum(chunks) - 1
        same = bool((bench.by_chunks(chunks, scattered=True) == got[ends]).all())
        yield f"prefill in chunks of {chunks[:5]} over scattered blocks: the bits of token by token", same
    yield "alone or among 31 others: the same bits", bool((bench.among_others(299) == got[299]).all())
    yield "decodes and prefills mixed in one step: the bits of each alone", bench.mixed(got)
    yield from bench.sampling(got)


def warm(directory: Path, precision: str, progress: Callable[[str, float], None]) -> None:
    """Warms a checkpoint's model up as the service does."""
    checkpoint = open_checkpoint(directory)
    config = read_model_config(checkpoint)
    warm_up(load(checkpoint, config, precision)[0], config, precision, 32, 2048, 512, progress)


class _Bench:
    """A model of the checkpoint over a pool in GPU memory."""

    def __init__(self, directory: Path, precision: str) -> None:
        checkpoint = open_checkpoint(directory)
        config = read_model_config(checkpoint)
        self._model, _ = load(checkpoint, config, precision)
        layers, heads, element = config.num_hidden_layers, config.num_key_value_heads, ELEMENT_BYTES[precision]
        shape = BlockShape(layers, heads, 16, config.head_dim, element)
        self._memory = mx.zeros((_NUM_BLOCKS * shape.stride_bytes // 2,), mx.uint16)
        mx.eval(self._memory)
        self._pool = GpuPool(addresses([self._memory])[0], _NUM_BLOCKS, shape, precision)
        self._rng = np.random.default_rng(0)
        self._vocab = config.vocab_size
        self.tokens = self._draw(_NUM_TOKENS)

    def by_chunks(self, chunks: list[int], scattered: bool = False) -> Array:
        """The logits after each chunk of the tokens. Without `scattered` they stay in blocks 1 to 26."""
        blocks = self._rng.permutation(np.arange(30, 90))[:26].tolist() if scattered else list(range(1, 27))
        stream, found = Stream([], blocks), []
        for count in chunks:
            stream.token_ids = self.tokens[: stream.num_computed + count]
            found.append(run_logits(self._model, self._pool, [(stream, count)])[0])
        return np.stack(found)

    def among_others(self, position: int) -> Array:
        """The logits at a position, computed in one step with 31 other streams."""
        others = [
            Stream(self._draw(int(n)), list(range(90 + i * 8, 98 + i * 8))) for i, n in enumerate(self._lengths(31))
        ]
        for other in others:
            while other.num_computed < len(other.token_ids) - 1:
                run_logits(self._model, self._pool, [(other, min(32, len(other.token_ids) - 1 - other.num_computed))])
        chunks = [(other, 1) for other in others]
        chunks.insert(13, (self._at(position), 1))
        logits: Array = run_logits(self._model, self._pool, chunks)[13]
        return logits

    def mixed(self, wanted: Array) -> bool:
        """Two prefills and two decodes in one step."""
        first, second = (Stream(self.tokens[:n], list(range(at, at + 16))) for n, at in ((200, 400), (97, 416)))
        chunks = [(self._at(299), 1), (first, 200), (self._at(63), 1), (second, 97)]
        return bool((run_logits(self._model, self._pool, chunks) == wanted[[299, 199, 63, 96]]).all())

    def sampling(self, logits: Array) -> Iterator[tuple[str, bool]]:
        """Tokens of the kernel against those of the host's sampler."""
        settings = {
            "greedy": [SamplingParams()],
            "at a temperature": [SamplingParams(temperature=t, seed=s) for t in (0.7, 1.0, 1.5) for s in range(20)],
            "with filters, on the host": [
                SamplingParams(temperature=1.0, top_k=20, top_p=0.9, seed=s) for s in range(5)
            ],
        }
        for name, params in settings.items():
            same = 0
            for one in params:
                stream = self._at(31, one)
                run_step(self._model, self._pool, [(stream, 1)])
                row = RowSampling(one, 0, 32, None)
                same += stream.token_ids[-1] == sample_rows(logits[31:32], [row]).token_ids[0]
            yield f"drawn {name}: {same} of {len(params)} as the host's sampler", same >= 0.95 * len(params)

    def _at(self, position: int, params: SamplingParams | None = None) -> Stream:
        return Stream(self.tokens[: position + 1], list(range(1, 27)), position, params or SamplingParams())

    def _draw(self, count: int) -> list[int]:
        tokens: list[int] = self._rng.integers(3, self._vocab, count).tolist()
        return tokens

    def _lengths(self, count: int) -> list[int]:
        lengths: list[int] = self._rng.integers(2, 100, count).tolist()
        return lengths


def _errors(got: Array, wanted: Array) -> Array:
    errors: Array = np.linalg.norm(got - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    return errors


def _mlx_lm_logits(directory: Path, tokens: list[int]) -> Array:
    from mlx_lm.utils import load_model

    with mx.stream(mx.cpu):  # on the GPU, MLX compiles its quantised products for minutes
        model, _ = load_model(directory)
        model.set_dtype(mx.bfloat16)
        return np.array(model(mx.array([tokens]))[0].astype(mx.float32)).astype(np.float64)
