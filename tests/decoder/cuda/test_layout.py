"""The tile layout, read back as the kernels read it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from services.decoder.ops.cuda import layout


def weight_at(words: Any, bits: int, units: int, row: int, k: int) -> int:
    """The twin of `weight_at` in step.cuh: the quantised value, or the bits of a bf16."""
    tile, half, g = row // 16, row % 16 // 8, row % 8
    unit, span, t, j = k // 64, k % 64 // 32, k % 32 // 8, k % 8
    base, lane = (tile * units + unit) * bits * 32, g * 4 + t
    if bits == 16:
        word = int(words[base + (span * 2 + half) * 128 + lane * 4 + (j & 3)])
        return word & 0xFFFF if j < 4 else word >> 16
    if bits == 4:
        return int(words[base + lane * 4 + span * 2 + half]) >> (4 * j) & 15
    return int(words[base + span * 128 + lane * 4 + half * 2 + j // 4]) >> (8 * (j & 3)) & 255


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("array", [np.asarray, mx.array], ids=["numpy", "mlx"])
def test_quantised_weights_are_found_where_the_kernels_look(bits: int, array: Any) -> None:
    rng = np.random.default_rng(bits)
    rows, inputs = 48, 192
    words = rng.integers(0, 2**32, (rows, inputs * bits // 32), np.uint32)
    tiled = np.array(layout.tile_words(array(words), bits))
    shifts = np.arange(32 // bits, dtype=np.uint32) * bits
    values = (words[:, :, None] >> shifts & (2**bits - 1)).reshape(rows, inputs)
    for row, k in zip(rng.integers(0, rows, 200).tolist(), rng.integers(0, inputs, 200).tolist(), strict=True):
        assert weight_at(tiled, bits, inputs // 64, row, k) == values[row, k]


@pytest.mark.parametrize("array", [np.asarray, mx.array], ids=["numpy", "mlx"])
def test_bf16_weights_are_found_where_the_kernels_look(array: Any) -> None:
    rng = np.random.default_rng(16)
    values = rng.integers(0, 2**16, (32, 128), np.uint16)
    tiled = np.array(layout.tile_words(layout.shuffle_pairs(array(values)), 16))
    for row, k in zip(rng.integers(0, 32, 200).tolist(), rng.integers(0, 128, 200).tolist(), strict=True):
        assert weight_at(tiled, 16, 2, row, k) == values[row, k]


@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("array", [np.asarray, mx.array], ids=["numpy", "mlx"])
def test_scales_lie_beside_their_tiles(group_size: int, array: Any) -> None:
    rng = np.random.default_rng(group_size)
    scales, biases = (rng.integers(0, 2**16, (32, 4), np.uint16) for _ in range(2))
    tiled = np.array(layout.tile_scales(layout.pair_scales(array(scales), array(biases)), group_size))
    units = 4 * group_size // 64
    for row in range(32):
        for unit in range(units):
            pair = int(tiled[((row // 16) * units + unit) * 16 + row % 16])
            group = unit * 64 // group_size
            assert (pair & 0xFFFF, pair >> 16) == (scales[row, group], biases[row, group])


def test_a_tile_of_gate_and_up_holds_eight_rows_of_each() -> None:
    gate, up = (np.arange(2 * 24 * 3).reshape(2, 24, 3) + offset for offset in (0, 1000))
    joined = layout.interleave(gate, up)
    assert np.array_equal(np.array(layout.interleave(mx.array(gate), mx.array(up))), joined)
    for expert in range(2):
        for row in range(24):
            at = (expert * 3 + row // 8) * 16 + row % 8
            assert np.array_equal(joined[at], gate[expert, row])
            assert np.array_equal(joined[at + 8], up[expert, row])


def test_columns_are_shuffled_as_nibbles_come_out_of_a_word() -> None:
    inputs = np.arange(32).reshape(2, 16)
    assert layout.shuffle_columns(inputs)[0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
