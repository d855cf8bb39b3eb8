"""Attention of the `mlx` backend: blocks are gathered through NumPy, and MLX attends to the copy.

On a Linux CPU, MLX cannot wrap host memory without a copy, so it must never be given the pool as an array: it would copy
it whole. A row's scores are computed over keys padded to a multiple of TILE_TOKENS from position 0, so its bits depend on
its query and on the K/V of its own sequence up to itself, and on neither block size, chunks nor company.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from services.decoder.batch import Batch
from services.decoder.kv_view import KvView
from services.decoder.ops.base import AttentionShape

TILE_TOKENS = 64
# Bounds the scores that are in memory at once; has no influence on the bits.
_MAX_SCORES = 1 << 24


@dataclass(frozen=True)
class SequenceGroup:
    """Sequences of a step with the same number of new rows and of tiles, attended to in one go."""

    rows: npt.NDArray[np.int64]  # [S, n], rows of the batch
    positions: npt.NDArray[np.int32]  # [S, n]
    context_lens: npt.NDArray[np.int32]  # [S]
    block_ids: npt.NDArray[np.int32]  # [S, width]; the first is repeated where a sequence has fewer
    num_tiles: int


def plan_groups(batch: Batch, block_size: int) -> Sequence[SequenceGroup]:
    """Groups a batch for `attend`. Table entries past the context are not looked at."""
    new_lens = np.diff(batch.cu_seqlens)
    members: dict[tuple[int, int], list[int]] = {}
    for index, (context, new) in enumerate(zip(batch.context_lens.tolist(), new_lens.tolist(), strict=True)):
        if new:
            members.setdefault((new, -(-(context + new) // TILE_TOKENS)), []).append(index)
    groups = []
    for (new, num_tiles), indices in members.items():
        context_lens = batch.context_lens[indices]
        used = -(-context_lens // block_size)
        width = int(used.max())
        table = batch.block_tables[indices, :width]
        # A sequence shorter than its group reads some block of its own again, and never its padding.
        table = np.where(np.arange(width) < used[:, None], table, table[:, :1])
        table[used == 0] = batch.block_tables[indices[int(used.argmax())], 0] if width else 0
        rows = batch.cu_seqlens[indices].astype(np.int64)[:, None] + np.arange(new)
        groups.append(SequenceGroup(rows, batch.positions[rows], context_lens, table, num_tiles))
    return groups


class GatheredAttention:
    """Attention of a whole mixed batch; keeps its buffer from step to step."""

    def __init__(self) -> None:
        self._buffer = np.empty(0, np.uint8)

    def attend(
        self,
        q: mx.array,
        k: npt.NDArray[Any],
        v: npt.NDArray[Any],
        groups: Sequence[SequenceGroup],
        kv: KvView,
        layer: int,
        shape: AttentionShape,
    ) -> mx.array:
        """q [T, num_heads, head_dim]; k, v [T, num_kv_heads, head_dim] as gather gives them. Returns [T, heads * dim]."""
        parts: list[mx.array] = []
        rows_of_parts: list[npt.NDArray[np.int64]] = []
        for group in groups:
            context = _as_mlx(self._context(group, k, v, kv, layer), kv.kv_dtype).astype(q.dtype)
            most = max(1, _MAX_SCORES // (len(group.rows) * shape.num_heads * context.shape[3]))
            for start in range(0, group.rows.shape[1], most):
                rows, positions = group.rows[:, start : start + most], group.positions[:, start : start + most]
                length = (int(positions.max()) // TILE_TOKENS + 1) * TILE_TOKENS
                parts.append(_attend(q[mx.array(rows)], positions, context[:, :, :, :length], shape))
                rows_of_parts.append(rows.ravel())
        if not parts:
            return mx.zeros((0, shape.num_heads * shape.head_dim), q.dtype)
        if len(parts) == 1:
            return parts[0]
        back = np.argsort(np.concatenate(rows_of_parts))
        return mx.concatenate(parts)[mx.array(back)]

    def _context(
        self, group: SequenceGroup, k: npt.NDArray[Any], v: npt.NDArray[Any], kv: KvView, layer: int
    ) -> npt.NDArray[Any]:
        """K/V [S, 2, num_kv_heads, length, head_dim] as gathered: context, the step's own rows, zeros."""
        num_seqs, width = group.block_ids.shape
        heads, dim = kv.shape.num_kv_heads, kv.shape.head_dim
        block_size, most = kv.shape.block_size, int(group.context_lens.max())
        taken = min(block_size, most)
        length = max(group.num_tiles * TILE_TOKENS, width * taken)
        stored = self._take((num_seqs, 2, heads, length, dim), k.dtype)
        if most:
            past = kv.gather(group.block_ids.ravel(), layer, taken).reshape(num_seqs, width, 2, heads, taken, dim)
            target = stored[:, :, :, : width * taken].reshape(num_seqs, 2, heads, width, taken, dim, copy=False)
            target[...] = past.transpose(0, 2, 3, 1, 4, 5)
        own = np.stack((k[group.rows], v[group.rows]), axis=1)  # [S, 2, n, heads, dim]
        for index, context_len in enumerate(group.context_lens.tolist()):
            # Whatever lies past the context, garbage or NaN, is gone before anything is computed with it.
            stored[index, :, :, context_len:] = 0
            stored[index, :, :, context_len : context_len + own.shape[2]] = own[index].swapaxes(1, 2)
        return stored[:, :, :, : group.num_tiles * TILE_TOKENS]

    def _take(self, dims: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        num_bytes = int(np.prod(dims)) * dtype.itemsize
        if num_bytes > self._buffer.size:
            self._buffer = np.empty(max(num_bytes, 2 * self._buffer.size), np.uint8)
        return self._buffer[:num_bytes].view(dtype).reshape(dims)


def _as_mlx(stored: npt.NDArray[Any], kv_dtype: str) -> mx.array:
    """A copy of gathered K/V as MLX's own array."""
    array = mx.array(stored)
    return array.view(mx.bfloat16) if kv_dtype == "bf16" else array


def _attend(q: mx.array, positions: npt.NDArray[np.int32], context: mx.array, shape: AttentionShape) -> mx.array:
    """q [S, n, num_heads, head_dim] over context [S, 2, num_kv_heads, length, head_dim]: [S * n, num_heads * head_dim]."""
    key_at = np.arange(context.shape[3], dtype=np.int32)
    query_at = positions[:, :, None]
    visible = key_at <= query_at  # [S, n, length]
    if shape.window_tokens:
        visible &= key_at > query_at - shape.window_tokens
    attended = mx.fast.scaled_dot_product_attention(
        q.transpose(0, 2, 1, 3), context[:, 0], context[:, 1], scale=shape.scale, mask=mx.array(visible[:, None])
    )
    return attended.transpose(0, 2, 1, 3).reshape(-1, shape.num_heads * shape.head_dim)
