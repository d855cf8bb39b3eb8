"""One step of the native backend: its arrays by address, and the operations recorded so far."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from services.decoder.batch import Batch
from services.decoder.kv_view import KvView
from services.decoder.ops.native import layout
from services.decoder.ops.native.layout import RecordedOp, Step
from services.decoder.ops.native.weights import Weights

_KV_FORMATS = {
    "bf16": layout.FORMAT_BF16,
    "f16": layout.FORMAT_F16,
    "f32": layout.FORMAT_F32,
    "int8": layout.FORMAT_I8,
}


@dataclass(eq=False, slots=True)
class Hidden:
    """What the operations up to a point of a step compute. It is overwritten by the next operation."""

    step: NativeStep
    after: int  # operations


@dataclass(frozen=True, eq=False)
class RecordedOps:
    """Code, layer and address of the weights of each operation, and the same for the kernels."""

    ops: list[tuple[int, int, int]]
    array: ctypes.Array[RecordedOp]


class NativeStep:
    """`spare_rows` holds buffers for K/V rows that no step uses; the step takes one, and gives it back at its end."""

    def __init__(self, batch: Batch, kv: KvView, spare_rows: list[npt.NDArray[np.uint8]]) -> None:
        self.batch = batch
        self.has_run = False
        self._ops: list[tuple[int, int, int]] = []
        self._weights: list[Weights] = []  # alive until the operations have run
        self._spare_rows = spare_rows
        shape, strides = kv.shape, kv.shape.row_strides
        num_rows = shape.num_layers * 2 * batch.num_tokens * shape.num_kv_heads
        self._own_rows = _take(
            spare_rows, num_rows * (shape.scale_bytes + shape.row_bytes)
        )  # scales first, as in a block
        # The struct holds addresses only; the arrays must live as long as the step.
        self._arrays: dict[str, npt.NDArray[Any]] = {
            "token_ids": _int32(batch.token_ids),
            "positions": _int32(batch.positions),
            "cu_seqlens": _int32(batch.cu_seqlens),
            "context_lens": _int32(batch.context_lens),
            "blocks": _context_addresses(batch, kv),
            "own_scales": self._own_rows,
            "own_rows": self._own_rows[num_rows * shape.scale_bytes :],
            "commit_blocks": kv.addresses((batch.slot_mapping // shape.block_size).astype(np.int32)),
            "commit_offsets": np.ascontiguousarray(batch.slot_mapping % shape.block_size, np.int64),
        }
        self.struct = Step(
            num_tokens=batch.num_tokens,
            num_seqs=batch.num_seqs,
            table_width=batch.block_tables.shape[1],
            block_size=shape.block_size,
            layer_stride=strides.layer,
            value_stride=strides.value,
            head_stride=strides.head,
            token_stride=strides.token,
            row_bytes=shape.row_bytes,
            rows_offset=shape.rows_offset_bytes,
            kv_format=_KV_FORMATS[kv.kv_dtype],
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            **{name: array.ctypes.data for name, array in self._arrays.items()},
        )

    def record(self, code: int, weights: Weights, layer: int = 0, after: Hidden | None = None) -> Hidden:
        """Notes an operation on the result of the one before; raises RuntimeError when `after` is not that result."""
        if self.has_run or (after is not None and (after.step is not self or after.after != len(self._ops))):
            raise RuntimeError(
                "the native backend runs a step's operations in one chain, each on the last one's result"
            )
        self._ops.append((code, layer, weights.address))
        self._weights.append(weights)
        return Hidden(self, len(self._ops))

    def recorded(self, last: RecordedOps | None) -> RecordedOps:
        """The operations so far, for the kernels: those of the last step again where they are the same, as they mostly are."""
        if last is not None and last.ops == self._ops:
            return last
        return RecordedOps(self._ops, (RecordedOp * len(self._ops))(*(RecordedOp(*op) for op in self._ops)))

    def end(self) -> None:
        """Gives the buffer of K/V rows back; nothing of the step may be used any more."""
        self._spare_rows.append(self._own_rows)


def _take(spare: list[npt.NDArray[np.uint8]], num_bytes: int) -> npt.NDArray[np.uint8]:
    """The buffer last given back when it is large enough, else a new one in its place."""
    buffer = spare.pop() if spare else None
    return buffer if buffer is not None and buffer.nbytes >= num_bytes else np.empty(num_bytes, np.uint8)


def _int32(array: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    return np.ascontiguousarray(array, np.int32)


def _context_addresses(batch: Batch, kv: KvView) -> npt.NDArray[np.uint64]:
    """[S, width]; only entries that hold context are looked at, the rest of a table means nothing."""
    tables = batch.block_tables
    num_used = -(-batch.context_lens // kv.shape.block_size)
    used = np.arange(tables.shape[1]) < num_used[:, None]
    addresses = np.zeros(tables.shape, np.uint64)
    addresses[used] = kv.addresses(np.ascontiguousarray(tables[used], np.int32))
    return addresses
