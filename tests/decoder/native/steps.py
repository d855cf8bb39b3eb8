"""Steps for kernel tests: T tokens of one sequence, or of several, without a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from services.decoder.batch import Batch
from services.decoder.kv_view import ContiguousKv
from services.decoder.ops.native import NativeOps
from services.decoder.request import SamplingParams
from services.decoder.sampler import RowSampling
from tests.decoder.native.tensors import ArrayTensor, float_linear

Array = npt.NDArray[Any]
GREEDY = RowSampling(SamplingParams(), 0, 0, None)


def make_batch(
    new_lens: Sequence[int],
    context_lens: Sequence[int] | None = None,
    tables: Array | None = None,
    block_size: int = 1 << 16,
    sample_rows: Sequence[int] | None = None,
) -> Batch:
    """Sequence s has new_lens[s] rows after context_lens[s] tokens; row r has token id r."""
    context = np.array(context_lens if context_lens is not None else [0] * len(new_lens), np.int32)
    cu_seqlens = np.concatenate(([0], np.cumsum(new_lens))).astype(np.int32)
    tables = np.arange(len(new_lens), dtype=np.int32)[:, None] if tables is None else tables
    seqs = np.repeat(np.arange(len(new_lens)), new_lens)
    positions = np.arange(cu_seqlens[-1]) - cu_seqlens[seqs] + context[seqs]
    blocks = tables[seqs, positions // block_size].astype(np.int64) if len(seqs) else np.empty(0, np.int64)
    rows = np.arange(cu_seqlens[-1]) if sample_rows is None else np.array(sample_rows)
    return Batch(
        token_ids=np.arange(cu_seqlens[-1], dtype=np.int32),
        positions=positions.astype(np.int32),
        cu_seqlens=cu_seqlens,
        context_lens=context,
        block_tables=tables,
        slot_mapping=blocks * block_size + positions % block_size,
        sample_rows=rows.astype(np.int32),
        sampling=[GREEDY] * len(rows),
    )


def make_kv(num_seqs: int, **shape: Any) -> ContiguousKv:
    """One cache for each sequence."""
    sizes = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 8, "kv_dtype": "f32", "kv_capacity": 1 << 16} | shape
    kv = ContiguousKv(**sizes, max_seqs=max(num_seqs, 1))
    for _ in range(num_seqs):
        kv.take()
    return kv


def ones(size: int) -> ArrayTensor:
    """A norm's weight that changes nothing."""
    return ArrayTensor("norm", "F32", np.ones(size, np.float32))


def start(ops: NativeOps, hidden: Array, batch: Batch | None = None, kv: ContiguousKv | None = None) -> tuple[Any, Any]:
    """A step whose hidden state is the given rows: they are the embedding of tokens 0, 1, 2 ..."""
    batch = make_batch([len(hidden)]) if batch is None else batch
    kv = make_kv(batch.num_seqs) if kv is None else kv
    step = ops.begin_step(batch, kv)
    table = hidden if len(hidden) else np.zeros((1, hidden.shape[1]), np.float32)
    return step, ops.embed(ops.load_embedding(float_linear("embed", table)[0]), step)


def rms_norm(x: Array, weight: Array | float = 1.0, eps: float = 1e-6) -> Array:
    """In float64."""
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight
