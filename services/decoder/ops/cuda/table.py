"""The table of addresses and the words of a step, as the kernels' `Table` and `Step` have them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from protos.pool_format import BlockShape
from services.decoder.batch import Batch
from services.decoder.ops.cuda.driver import CudaDriver
from services.decoder.sampler import RowSampling, uniform

Kernel = Callable[..., list[mx.array]]  # as mx.fast.cuda_kernel makes it

HEADER_WORDS = 32
SPLIT_KEYS = 256  # of attention: SPLIT_KEYS in attention.cuh
BARRIERS = 64
KV_KINDS = {"bf16": 16, "f16": 17, "f32": 32}  # KIND_* in plain.cuh


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


@dataclass(frozen=True)
class Built:
    """Kernels and memory for one model, from either set of kernels."""

    vocab_size: int
    small: Kernel
    large: Kernel
    commit: Kernel
    rows: Kernel
    buffers: Buffers
    table: mx.array
    keep: list[mx.array]  # what the table points to


def make_arrays(driver: CudaDriver, capacity: Capacity, sizes: dict[str, tuple[int, mx.Dtype]]) -> Buffers:
    """Allocates everything for steps up to `capacity`; `sizes` are the elements of each array of a set of kernels."""
    results_address, results = driver.pinned(1 + capacity.sample_rows)
    shared = {
        "barriers": (BARRIERS, mx.uint32),
        "launches": (64, mx.uint32),
        "step": (2 * capacity.words, mx.int32),
    }
    arrays = {name: mx.zeros((max(size, 64),), dtype) for name, (size, dtype) in (shared | sizes).items()}
    mx.eval(list(arrays.values()))
    words = np.zeros(capacity.words, np.int32)
    return Buffers(capacity, words, addresses([arrays["step"]])[0], results, results_address, arrays)


def compile_kernel(name: str, body: str, header: str, shared_bytes: int) -> Any:
    """A kernel of (table, previous) that writes `done`; MLX compiles it when it is first launched."""
    # MLX keeps what it compiled by the name alone, in the process and on disk: another text must have another name.
    digest = hashlib.blake2b((header + body).encode(), digest_size=8).hexdigest()
    return mx.fast.cuda_kernel(
        name=f"leasehold_{name}_{digest}",
        input_names=["table", "previous"],
        output_names=["done"],
        source=body,
        header=header,
        ensure_row_contiguous=False,
        shared_memory=shared_bytes,
    )


def needed(batch: Batch) -> Capacity:
    """What a batch needs of the buffers."""
    rows, samples = batch.num_tokens, len(batch.sample_rows)
    last = int(batch.positions.max()) if rows else 0
    words = HEADER_WORDS + 7 * rows + 3 * samples + batch.block_tables.size + 8
    return Capacity(rows, samples, last // SPLIT_KEYS + 1, words)


def fill_step(to: npt.NDArray[np.int32], batch: Batch, splits: int, pool: int, shape: BlockShape, kv_dtype: str) -> int:
    """Writes a batch as the kernels read it, with its splits and the pool's address in GPU memory; returns the number of words."""
    rows, samples, strides = batch.num_tokens, len(batch.sample_rows), shape.row_strides
    if rows == batch.num_seqs:  # every sequence decodes
        sequences = starts = np.arange(rows, dtype=np.int32)
        contexts = batch.context_lens
    else:
        sequences = np.repeat(np.arange(batch.num_seqs, dtype=np.int32), np.diff(batch.cu_seqlens))
        starts, contexts = batch.cu_seqlens[sequences], batch.context_lens[sequences]
    noise = np.zeros((2, samples), np.float32)  # temperatures, then the noise of a draw
    for index, row in enumerate(batch.sampling):
        if row.params.temperature > 0.0 and on_device(row):
            drawn = uniform(row.params.seed, row.sample_index, row.position)
            noise[:, index] = row.params.temperature, min(drawn, 1.0 - 2.0**-24)
    at = HEADER_WORDS
    offsets = [at, at + rows, at + 2 * rows, at + 3 * rows, at + 4 * rows, at + 5 * rows]
    for offset, array in zip(offsets, (batch.token_ids, batch.positions, sequences, starts, contexts), strict=False):
        to[offset : offset + rows] = array
    slots = to[offsets[5] : offsets[5] + 2 * rows].reshape(rows, 2)
    slots[:, 0], slots[:, 1] = np.divmod(batch.slot_mapping, shape.block_size)
    at = offsets[5] + 2 * rows
    offsets += [at, at + samples, at + 2 * samples, at + 3 * samples]
    to[at : at + samples] = batch.sample_rows
    to[at + samples : offsets[-1]] = noise.view(np.int32).reshape(-1)
    width = batch.block_tables.shape[1]
    words = offsets[-1] + batch.block_tables.size
    to[offsets[-1] : words].reshape(-1, width)[:] = batch.block_tables
    stride = shape.stride_bytes
    to[:25] = [
        *(rows, samples, words, width, shape.block_size, splits),
        *(_low(pool), _low(pool >> 32), _low(stride), _low(stride >> 32)),
        *offsets,
        *(KV_KINDS[kv_dtype], strides.layer, strides.value, strides.head, strides.token),
    ]
    return words


def _low(value: int) -> int:
    """The lowest 32 bits, as an int32 has them."""
    low = value & 0xFFFFFFFF
    return low - 2**32 if low >= 2**31 else low


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
