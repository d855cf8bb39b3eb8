"""The table of addresses and the words of a step, as the kernels' `Table` and `Step` have them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from services.decoder.batch import Batch
from services.decoder.ops.cuda.driver import CudaDriver
from services.decoder.ops.cuda.source import Geometry
from services.decoder.ops.cuda.weights import CudaAttention, CudaHead, CudaLinear, CudaMoe
from services.decoder.sampler import RowSampling, uniform

HEADER_WORDS = 32
SPLIT_KEYS = 256  # of attention: SPLIT_KEYS in attention.cuh
BARRIERS = 64

Layers = tuple[tuple[CudaAttention, CudaMoe], ...]


def addresses(arrays: list[mx.array | None]) -> list[int]:
    """Where arrays are in GPU memory; 0 for None. They stay there while they live and the host does not look into them."""
    kernel: Any = mx.fast.cuda_kernel(
        name="leasehold_address",
        input_names=["x"],
        output_names=["out"],
        source="    out[0] = (unsigned long long)x;\n",
        ensure_row_contiguous=False,
    )
    present = [array for array in arrays if array is not None]
    mx.eval(present)
    found = [
        kernel(inputs=[array], output_shapes=[(2,)], output_dtypes=[mx.uint64], grid=(1, 1, 1), threadgroup=(1, 1, 1))[
            0
        ][:1]
        for array in present
    ]
    values = iter(np.array(mx.concatenate(found)).tolist()) if found else iter(())
    return [0 if array is None else next(values) for array in arrays]


@dataclass(frozen=True)
class Capacity:
    """What the buffers hold: rows of a step, sample rows, splits of a context, words of a step's arrays."""

    rows: int
    sample_rows: int
    splits: int
    words: int

    def holds(self, other: Capacity) -> bool:
        """Whether a step of `other` fits."""
        return (
            self.rows >= other.rows
            and self.sample_rows >= other.sample_rows
            and self.splits >= other.splits
            and self.words >= other.words
        )

    def joined(self, other: Capacity) -> Capacity:
        """The least that holds both."""
        return Capacity(
            max(self.rows, other.rows),
            max(self.sample_rows, other.sample_rows),
            max(self.splits, other.splits),
            max(self.words, other.words),
        )


@dataclass
class Buffers:
    """Scratch memory of the kernels, and host memory for a step's input and result."""

    capacity: Capacity
    words: npt.NDArray[np.int32]  # of the next step, on the host
    step_address: int  # of two slots for them in GPU memory
    results: npt.NDArray[np.int32]
    results_address: int
    arrays: dict[str, mx.array] = field(default_factory=dict)


def make_buffers(driver: CudaDriver, geometry: Geometry, capacity: Capacity) -> Buffers:
    """Allocates everything for steps up to `capacity`."""
    results_address, results = driver.pinned(1 + capacity.sample_rows)
    rows, g = capacity.rows, geometry
    q_rows, kv_rows = g.num_heads * g.head_dim, g.num_kv_heads * g.head_dim
    part = 8 * g.head_dim + 16
    assignments = rows * g.num_experts_per_tok
    large = rows > 32
    sizes = {
        "barriers": (BARRIERS, mx.uint32),
        "launches": (64, mx.uint32),
        "step": (2 * capacity.words, mx.int32),
        "hidden": (rows * g.hidden_size, mx.float32),
        "normed": (rows * g.hidden_size, mx.bfloat16),
        "squares": (rows * g.hidden_size // 16, mx.float32),
        "qkv": (rows * (q_rows + 2 * kv_rows), mx.float32),
        "q": (rows * q_rows, mx.bfloat16),
        "kv": (g.num_layers * rows * 2 * kv_rows, mx.bfloat16),
        "attended": (rows * q_rows, mx.bfloat16),
        "parts": (min(rows, 32) * g.num_kv_heads * capacity.splits * part, mx.float32),
        "arrivals": (rows * g.num_kv_heads, mx.uint32),
        "router": (rows * g.num_experts, mx.float32),
        "act": (assignments * g.moe_intermediate_size, mx.bfloat16),
        "wide": (assignments * g.hidden_size if large else 64, mx.float32),
        "groups": (4 * assignments + 8 * g.num_experts + 1024, mx.int32),
        "topk_weights": (assignments, mx.float32),
        "inverse": (rows, mx.float32),
        "logits": (capacity.sample_rows * g.vocab_size, mx.float32),
    }
    arrays = {name: mx.zeros((max(size, 64),), dtype) for name, (size, dtype) in sizes.items()}
    mx.eval(list(arrays.values()))
    words = np.zeros(capacity.words, np.int32)
    return Buffers(capacity, words, addresses([arrays["step"]])[0], results, results_address, arrays)


def make_table(
    buffers: Buffers, embedding: CudaLinear, layers: Layers, head: CudaHead, inv_freq: mx.array
) -> tuple[mx.array, list[mx.array]]:
    """The table in GPU memory, and the arrays that must live as long as it."""
    a = buffers.arrays
    order: list[mx.array | int | None] = [
        *(a["barriers"], a["launches"], a["step"], buffers.capacity.words),
        *(a[name] for name in ("hidden", "normed", "squares", "qkv", "q", "kv", "attended", "parts")),
        *(a[name] for name in ("arrivals", "router", "act", "wide", "groups", "topk_weights", "logits", "inverse")),
        *(buffers.results_address, inv_freq, head.norm),
        *_linear(embedding),
        *_linear(head.linear),
    ]
    for attention, moe in layers:
        for linear in (attention.q, attention.k, attention.v, attention.o, moe.router, moe.gate_up, moe.down):
            order.extend(_linear(linear))
        order.extend((attention.input_norm, moe.norm, attention.q_norm, attention.k_norm))
    arrays = [entry for entry in order if isinstance(entry, mx.array)]
    found = iter(addresses(list(arrays)))
    words = [next(found) if isinstance(entry, mx.array) else entry or 0 for entry in order]
    table = mx.array(np.array(words, np.uint64)) + mx.array(0, mx.uint64)
    mx.eval(table)
    return table, arrays


def _linear(linear: CudaLinear) -> tuple[mx.array, mx.array | None, int]:
    return linear.tiles, linear.scales, linear.bits


def needed(batch: Batch) -> Capacity:
    """What a batch needs of the buffers."""
    rows, samples = batch.num_tokens, len(batch.sample_rows)
    last = int(batch.positions.max()) if rows else 0
    words = HEADER_WORDS + 7 * rows + 3 * samples + batch.block_tables.size + 8
    return Capacity(rows, samples, last // SPLIT_KEYS + 1, words)


def fill_step(to: npt.NDArray[np.int32], batch: Batch, pool: int, stride: int, block_size: int) -> int:
    """Writes a batch as the kernels read it; returns the number of words."""
    counts = np.diff(batch.cu_seqlens)
    sequences = np.repeat(np.arange(batch.num_seqs, dtype=np.int32), counts)
    slots = np.stack((batch.slot_mapping // block_size, batch.slot_mapping % block_size), axis=1).astype(np.int32)
    temperatures = np.zeros(len(batch.sample_rows), np.float32)
    noise = np.zeros(len(batch.sample_rows), np.float32)
    for index, row in enumerate(batch.sampling):
        if row.params.temperature > 0.0 and on_device(row):
            temperatures[index] = row.params.temperature
            noise[index] = min(uniform(row.params.seed, row.sample_index, row.position), 1.0 - 2.0**-24)
    arrays = (
        batch.token_ids,
        batch.positions,
        sequences,
        batch.cu_seqlens[:-1][sequences],
        batch.context_lens[sequences],
        slots,
        batch.sample_rows,
        temperatures.view(np.int32),
        noise.view(np.int32),
        batch.block_tables,
    )
    at = HEADER_WORDS
    for index, array in enumerate(arrays):
        to[10 + index] = at
        to[at : at + array.size] = array.reshape(-1)
        at += array.size
    last = int(batch.positions.max()) if batch.num_tokens else 0
    to[:10] = (
        *(
            batch.num_tokens,
            len(batch.sample_rows),
            at,
            batch.block_tables.shape[1],
            block_size,
            last // SPLIT_KEYS + 1,
        ),
        *np.array([pool, stride], np.uint64).view(np.int32),
    )
    return at


def on_device(row: RowSampling) -> bool:
    """Whether the kernel draws a row's token by itself: no filter, penalty or report is asked for."""
    params = row.params
    plain = (
        params.presence_penalty == 0.0
        and params.frequency_penalty == 0.0
        and params.repetition_penalty == 1.0
        and not params.logit_bias
        and not row.banned_token_ids
        and row.num_logprobs is None
    )
    unfiltered = params.top_k == 0 and params.top_p >= 1.0 and params.min_p == 0.0
    return plain and (unfiltered or params.temperature == 0.0)
