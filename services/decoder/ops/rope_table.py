"""Cosines and sines of rotary embeddings, by position."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from services.decoder.ops.base import FloatArray, IntArray

_GROWTH_POSITIONS = 1024


class RopeTable:
    """Rows of cos and sin, each computed once, in float64; so a row never depends on the step that asks for it."""

    def __init__(self, inv_freq: npt.NDArray[np.float32], attention_factor: float) -> None:
        self._inv_freq = inv_freq.astype(np.float64)
        self._attention_factor = attention_factor
        self._cos = np.empty((0, len(inv_freq)), np.float32)
        self._sin = np.empty((0, len(inv_freq)), np.float32)

    def rows(self, positions: IntArray) -> tuple[FloatArray, FloatArray]:
        """cos and sin [T, head_dim / 2] of the positions [T], times the attention factor."""
        needed = int(positions.max(initial=-1)) + 1
        while len(self._cos) < needed:
            start = len(self._cos)
            angles = np.arange(start, start + _GROWTH_POSITIONS)[:, None] * self._inv_freq
            self._cos = np.concatenate((self._cos, np.float32(self._attention_factor * np.cos(angles))))
            self._sin = np.concatenate((self._sin, np.float32(self._attention_factor * np.sin(angles))))
        return self._cos[positions], self._sin[positions]
