"""How weights lie in GPU memory: tiles of 16 outputs by 64 inputs, in the order in which a warp's threads hold them.

Everything here works on NumPy and on MLX arrays alike, so that the layout is tested without a GPU.

A tile of 4-bit weights is 32 threads times 16 bytes: thread (g, t) has, for each half of 32 inputs, the words that hold inputs
8t to 8t + 7 of outputs g and g + 8. Of 8 bits, each half is 32 threads times 16 bytes. bf16 weights are reordered within each
run of eight as nibbles come out of a word: 0, 4, 1, 5, 2, 6, 3, 7.
"""

from __future__ import annotations

from typing import Any

import numpy as np

UNIT = 64  # inputs of a tile
TILE_ROWS = 16
SHUFFLE = (0, 4, 1, 5, 2, 6, 3, 7)


def padded_rows(rows: int) -> int:
    """Rows of a layer in whole tiles."""
    return -(-rows // TILE_ROWS) * TILE_ROWS


def tile_words(words: Any, bits: int) -> Any:
    """uint32 `[rows, inputs * bits / 32]` (of bf16: pairs, already shuffled) in tile order; rows are whole tiles."""
    rows, width = words.shape
    tiles = rows // TILE_ROWS
    if bits == 4:
        # row = half * 8 + g, word = (unit, span, t)
        return words.reshape(tiles, 2, 8, width // 8, 2, 4).transpose(0, 3, 2, 5, 4, 1).reshape(-1)
    if bits == 8:
        # word = (unit, span, t, which)
        return words.reshape(tiles, 2, 8, width // 16, 2, 4, 2).transpose(0, 3, 4, 2, 5, 1, 6).reshape(-1)
    if bits == 16:
        # word = (unit, span, t, pair)
        return words.reshape(tiles, 2, 8, width // 32, 2, 4, 4).transpose(0, 3, 4, 1, 2, 5, 6).reshape(-1)
    raise ValueError(f"{bits}-bit weights have no tile layout")


def shuffle_pairs(weights: Any) -> Any:
    """bf16 bits as uint16 `[rows, inputs]`, as uint32 pairs `[rows, inputs / 2]` in the shuffled order."""
    rows, inputs = weights.shape
    low, high = (weights.reshape(rows, inputs // 8, 2, 4)[:, :, half] for half in (0, 1))
    return (_widen(low) | (_widen(high) << 16)).reshape(rows, inputs // 2)


def pair_scales(scales: Any, biases: Any) -> Any:
    """bf16 bits as uint16 `[rows, groups]` twice, as uint32 `[rows, groups, 1]`: the scale low, the bias high."""
    pairs = _widen(scales) | (_widen(biases) << 16)
    return pairs.reshape(*pairs.shape, 1)


def tile_scales(pairs: Any, group_size: int) -> Any:
    """Scales with biases `[rows, groups, words]` in the order [tile row][unit][16][words]."""
    rows, _, words = pairs.shape
    if group_size > UNIT:
        times = group_size // UNIT
        pairs = pairs.repeat(times, 1) if isinstance(pairs, np.ndarray) else _repeat(pairs, times)
    return pairs.reshape(rows // TILE_ROWS, TILE_ROWS, -1, words).transpose(0, 2, 1, 3).reshape(-1)


def interleave(gate: Any, up: Any) -> Any:
    """`[experts, width, x]` twice as `[experts * 2 * width, x]`: a tile holds 8 rows of gate, then the same 8 of up."""
    experts, width, inner = gate.shape
    blocks = [part.reshape(experts, width // 8, 1, 8, inner) for part in (gate, up)]
    joined = np.concatenate(blocks, axis=2) if isinstance(gate, np.ndarray) else _concatenate(blocks)
    return joined.reshape(experts * width * 2, inner)


def shuffle_columns(inputs: Any) -> Any:
    """The twin of the kernels' `shuffled`: `[rows, inputs]` with each run of eight reordered."""
    rows, width = inputs.shape
    return inputs.reshape(rows, width // 8, 8)[:, :, list(SHUFFLE)].reshape(rows, width)


def _widen(bits: Any) -> Any:
    if isinstance(bits, np.ndarray):
        return bits.astype(np.uint32)
    import mlx.core as mx

    return bits.astype(mx.uint32)


def _concatenate(blocks: list[Any]) -> Any:
    import mlx.core as mx

    return mx.concatenate(blocks, axis=2)


def _repeat(pairs: Any, times: int) -> Any:
    import mlx.core as mx

    return mx.repeat(pairs, times, axis=1)
