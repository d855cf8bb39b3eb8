"""Rows of K/V as bytes with a scale: what `--kv-dtype int8` stores of a token's K or V of one head."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

LARGEST = 127


def quantise(rows: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Elements [..., head_dim] and scales [...] of rows: scale = max |x| / 127, element = x / scale, ties to even.

    A row that is not finite gets the scale NaN, so that whatever reads it shows that something went wrong.
    """
    peaks = np.abs(rows).max(axis=-1)
    finite = np.isfinite(peaks)
    scales = np.where(finite, peaks / np.float32(LARGEST), np.float32(np.nan))
    usable = finite & (scales > 0)  # of the smallest numbers a 127th is zero
    codes = np.zeros_like(rows)
    np.divide(rows, scales[..., None], out=codes, where=usable[..., None])
    return np.clip(np.rint(codes), -LARGEST, LARGEST).astype(np.int8), scales


def dequantise(elements: npt.NDArray[np.int8], scales: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """What the rows stand for, in float32: scale × element."""
    widened = elements.astype(np.float32)
    widened *= scales[..., None]
    return widened
