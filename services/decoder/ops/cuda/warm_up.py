"""Runs every kernel of serving once, before a worker says that it is ready: MLX compiles a kernel when it is first launched."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from protos.pool_format import BlockShape
from services.decoder.batch import Batch
from services.decoder.gpu_pool import GpuPool
from services.decoder.model_config import ModelConfig
from services.decoder.models import Model
from services.decoder.ops.cuda.loading import kernel_cache_dir
from services.decoder.ops.cuda.source import SMALL_ROWS
from services.decoder.ops.cuda.table import addresses
from services.decoder.request import SamplingParams
from services.decoder.sampler import RowSampling

_BLOCK_SIZE = 16
_SCRATCH_BLOCKS = 4  # what is in them means nothing, so that all sequences share them


def warm_up(
    model: Model,
    config: ModelConfig,
    kv_dtype: str,
    max_seqs: int,
    kv_capacity: int,
    max_num_batched_tokens: int,
    progress: Callable[[str, float], None],
) -> None:
    """Compiles all kernels, and takes the memory of the largest step; on the engine's thread, before there is a pool.

    `progress(what, seconds)` is told of each part when it is over. Raises EngineFailedError for K/V that the kernels do not take.
    """
    progress(f"compiled kernels are kept in {kernel_cache_dir()}", 0.0)
    pool = _ScratchPool(config, kv_dtype)
    last = max(kv_capacity - 1, 0)
    prefill = max(1, min(max_num_batched_tokens, kv_capacity))
    rows = min(max_seqs, SMALL_ROWS)
    steps = {
        "a step of one token": _batch([1], [0], False),
        f"{rows} tokens at the end of the longest context": _batch([1] * rows, [last] * rows, False),
        f"a prompt of {prefill} tokens": _batch([prefill], [kv_capacity - prefill], False),
        f"{max_seqs} sequences in one step": _batch([1] * max_seqs, [last] * max_seqs, False),
        "logits on the host": _batch([1], [0], True),
    }
    for what, batch in steps.items():
        started = time.monotonic()
        step = model.begin(batch, pool.pool)
        model.forward(step)
        model.commit(step)
        progress(what, time.monotonic() - started)


class _ScratchPool:
    """A few blocks of zeros in GPU memory, gone with this object."""

    def __init__(self, config: ModelConfig, kv_dtype: str) -> None:
        sizes = (config.num_hidden_layers, config.num_key_value_heads, _BLOCK_SIZE, config.head_dim)
        shape = BlockShape.of(kv_dtype, "hnd", *sizes)
        self._memory = mx.zeros((_SCRATCH_BLOCKS * shape.stride_bytes // 2,), mx.uint16)
        self.pool = GpuPool(addresses([self._memory])[0], _SCRATCH_BLOCKS, shape, kv_dtype)


def _batch(counts: Sequence[int], contexts: Sequence[int], reports: bool) -> Batch:
    """Sequences of these tokens over these contexts, each sampled once; `reports` asks for logprobs."""
    ends = np.cumsum(counts)
    positions = np.concatenate([np.arange(start, start + n) for n, start in zip(counts, contexts, strict=True)])
    width = -(-int(positions.max() + 1) // _BLOCK_SIZE)
    tables = np.tile(np.arange(width, dtype=np.int32) % _SCRATCH_BLOCKS, (len(counts), 1))
    row = RowSampling(SamplingParams(), 0, 0, 1 if reports else None)
    return Batch(
        token_ids=np.zeros(len(positions), np.int32),
        positions=positions.astype(np.int32),
        cu_seqlens=np.concatenate(([0], ends)).astype(np.int32),
        context_lens=np.array(contexts, np.int32),
        block_tables=tables,
        slot_mapping=positions.astype(np.int64) % (_SCRATCH_BLOCKS * _BLOCK_SIZE),
        sample_rows=(ends - 1).astype(np.int32),
        sampling=[row] * len(counts),
    )
