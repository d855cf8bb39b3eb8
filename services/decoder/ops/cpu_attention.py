"""Attention over gathered blocks, on the host.

Keys are taken in tiles of TILE_TOKENS at fixed absolute positions, every product is a matrix-vector product of one fixed shape,
and tiles are added in the order of their positions. So the bits of a row depend on its query and on the K/V of its sequence up
to itself, and on nothing else: not on block size, chunks, or company.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from services.decoder.batch import Batch
from services.decoder.kv_view import KvView
from services.decoder.ops.base import AttentionShape
from services.decoder.ops.blas import FloatArray

TILE_TOKENS = 64
# Bounds the scores that are in memory at once; has no influence on the bits.
_MAX_SCORES = 1 << 21


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


class HostAttention:
    """Attention of a whole mixed batch; keeps its buffer from step to step."""

    def __init__(self) -> None:
        self._buffer = np.empty(0, np.float32)

    def attend(
        self,
        q: FloatArray,
        k: npt.NDArray[Any],
        v: npt.NDArray[Any],
        groups: Sequence[SequenceGroup],
        kv: KvView,
        layer: int,
        shape: AttentionShape,
    ) -> FloatArray:
        """q [T, num_heads, head_dim]; k, v [T, num_kv_heads, head_dim] as the pool stores them. Returns [T, heads * dim]."""
        out = np.empty((len(q), shape.num_heads * shape.head_dim), np.float32)
        for group in groups:
            context = self._context(group, k, v, kv, layer)
            step = max(1, _MAX_SCORES // (len(group.rows) * shape.num_heads * group.num_tiles * TILE_TOKENS))
            step = min(step, TILE_TOKENS)  # few rows share their last tile, and later tiles are work for nothing
            for start in range(0, group.rows.shape[1], step):
                rows, positions = group.rows[:, start : start + step], group.positions[:, start : start + step]
                num_tiles = int(positions.max()) // TILE_TOKENS + 1
                out[rows] = _attend_tiles(q[rows], positions, context[:, :, :, :num_tiles], shape)
        return out

    def _context(
        self, group: SequenceGroup, k: npt.NDArray[Any], v: npt.NDArray[Any], kv: KvView, layer: int
    ) -> FloatArray:
        """K/V [S, 2, num_kv_heads, num_tiles, TILE_TOKENS, head_dim] in float32: context, the step's own rows, zeros."""
        num_seqs, width = group.block_ids.shape
        heads, dim = kv.shape.num_kv_heads, kv.shape.head_dim
        block_size, most = kv.shape.block_size, int(group.context_lens.max())
        taken = min(block_size, most)
        length = max(group.num_tiles * TILE_TOKENS, width * taken)
        buffer = self._take(num_seqs * 2 * heads * length * dim).reshape(num_seqs, 2, heads, length, dim)
        stored: npt.NDArray[Any] = buffer.view(np.uint32) if kv.kv_dtype == "bf16" else buffer
        if most:
            past = kv.gather(group.block_ids.ravel(), layer, taken).reshape(num_seqs, width, 2, heads, taken, dim)
            target = stored[:, :, :, : width * taken].reshape(num_seqs, 2, heads, width, taken, dim, copy=False)
            target[...] = past.transpose(0, 2, 3, 1, 4, 5)
        # Whatever lies past the context, garbage or NaN, is gone before anything is computed with it.
        for index, context_len in enumerate(group.context_lens.tolist()):
            stored[index, :, :, context_len:] = 0
        own = np.stack((k[group.rows], v[group.rows]), axis=1)  # [S, 2, n, heads, dim]
        for index, context_len in enumerate(group.context_lens.tolist()):
            stored[index, :, :, context_len : context_len + own.shape[2]] = own[index].swapaxes(1, 2)
        if kv.kv_dtype == "bf16":
            stored <<= 16
        tiles = buffer[:, :, :, : group.num_tiles * TILE_TOKENS]
        return tiles.reshape(num_seqs, 2, heads, group.num_tiles, TILE_TOKENS, dim, copy=False)

    def _take(self, num_elements: int) -> FloatArray:
        if num_elements > self._buffer.size:
            self._buffer = np.empty(max(num_elements, 2 * self._buffer.size), np.float32)
        return self._buffer[:num_elements]


def _attend_tiles(
    q: FloatArray, positions: npt.NDArray[np.int32], context: FloatArray, shape: AttentionShape
) -> FloatArray:
    """q [S, n, num_heads, head_dim] over the tiles of `context`; returns [S, n, num_heads * head_dim]."""
    num_seqs, num_rows = positions.shape
    num_kv_heads, dim = shape.num_kv_heads, shape.head_dim
    num_tiles = context.shape[3]
    heads_per_kv = shape.num_heads // num_kv_heads
    keys, values = context[:, 0, None, :, None], context[:, 1, None, :, None]  # [S, 1, Hkv, 1, tiles, TILE, dim]
    scaled = (q * np.float32(shape.scale)).reshape(num_seqs, num_rows, num_kv_heads, heads_per_kv, 1, dim, 1)
    scores = np.matmul(keys, scaled)[..., 0]  # [S, n, Hkv, heads_per_kv, tiles, TILE]
    at = np.arange(num_tiles * TILE_TOKENS, dtype=np.int32).reshape(num_tiles, TILE_TOKENS)
    query_at = positions[:, :, None, None]
    hidden = at > query_at
    if shape.window_tokens:
        hidden |= at <= query_at - shape.window_tokens
    np.copyto(scores, -np.inf, where=hidden[:, :, None, None])
    scores -= scores.max(axis=(-2, -1), keepdims=True)
    weights = np.exp(scores, out=scores)
    sums = weights.sum(axis=-1)  # [..., tiles]
    parts = np.matmul(weights[..., None, :], values)[..., 0, :]  # [..., tiles, dim]
    total, attended = sums[..., 0], parts[..., 0, :]
    for tile in range(1, num_tiles):
        total = total + sums[..., tile]
        attended = attended + parts[..., tile, :]
    mean: FloatArray = attended / total[..., None]
    return mean.reshape(num_seqs, num_rows, shape.num_heads * dim)
