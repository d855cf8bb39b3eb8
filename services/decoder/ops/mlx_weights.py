"""Weights of the `mlx` backend on the host: as the checkpoint has them, float32 when they are used.

Those that fit the budget stay in float32; the others are widened chunk by chunk at each use, to the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from services.decoder.ops.base import ExpertTensors, IntArray, LinearTensors, Tensor
from services.decoder.ops.blas import FloatArray, chunk_rows, rows_by_matrix

# How much is widened at once: enough that MLX's cost for each call does not show. Has no influence on the bits.
_SLAB_BYTES = 1 << 20


class Budget:
    """Bytes of float32 weights that may stay in memory."""

    def __init__(self, num_bytes: int) -> None:
        self._left = num_bytes
        self._kept: dict[str, FloatArray] = {}

    def resident(self, name: str, num_elements: int, make: Callable[[], FloatArray]) -> FloatArray | None:
        """The matrix when it may stay; under one name it is made once, such as an embedding that is the head as well."""
        if name not in self._kept:
            if 4 * num_elements > self._left:
                return None
            self._kept[name] = make()
            self._left -= 4 * num_elements
        return self._kept[name]


def widen(stored: npt.NDArray[Any], dtype: str) -> FloatArray:
    """float32 of stored numbers, exact; without a copy where they are float32."""
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=False)


def widen_tensor(tensor: Tensor) -> FloatArray:
    """A whole tensor in float32."""
    return widen(tensor.numpy(), tensor.dtype)


class Linear:
    """x @ weight.T (+ bias), for one [out_features, in_features] of a layer, or one expert's."""

    def __init__(self, tensors: LinearTensors, budget: Budget, expert: int | None = None) -> None:
        self._tensors = tensors
        self._expert = expert
        out_features, packed = tensors.weight.shape[-2:]
        self.out_features: int = out_features
        self.in_features: int = packed * 32 // tensors.bits if tensors.scales is not None else packed
        self._chunk_rows = chunk_rows(self.out_features, self.in_features)
        self._bias = None if tensors.bias is None else self._of_expert(widen_tensor(tensors.bias))
        self._resident: FloatArray | None = None
        self._resident = budget.resident(
            f"{tensors.weight.name}/{expert}",
            self.out_features * self.in_features,
            lambda: np.ascontiguousarray(self.weight_rows(slice(None))),
        )
        self._slab_rows = self.out_features
        if self._resident is None:
            chunks = max(1, _SLAB_BYTES // (4 * self.in_features * self._chunk_rows))
            self._slab_rows = chunks * self._chunk_rows

    def __call__(self, rows: FloatArray) -> FloatArray:
        """[T, in_features] to [T, out_features]; a row's bits depend on that row alone."""
        out = np.empty((len(rows), self.out_features), np.float32)
        for slab_start in range(0, self.out_features, self._slab_rows):
            slab = self.weight_rows(slice(slab_start, slab_start + self._slab_rows))
            for start in range(0, len(slab), self._chunk_rows):
                chunk = slab[start : start + self._chunk_rows]
                first = slab_start + start
                rows_by_matrix(rows, chunk, out[:, first : first + len(chunk)])
        if self._bias is not None:
            out += self._bias
        return out

    def weight_rows(self, which: slice | IntArray) -> FloatArray:
        """Some rows of the weight in float32."""
        if self._resident is not None:
            return self._resident[which]
        tensors = self._tensors
        weight = self._of_expert(tensors.weight.numpy())[which]
        if tensors.scales is None or tensors.biases is None:
            return widen(weight, tensors.weight.dtype)
        scales, biases = (
            mx.array(widen(self._of_expert(tensor.numpy())[which], tensor.dtype))
            for tensor in (tensors.scales, tensors.biases)
        )
        wide = mx.dequantize(mx.array(weight), scales, biases, tensors.group_size, tensors.bits)
        return np.asarray(wide)

    def _of_expert(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return array if self._expert is None else array[self._expert]


def load_experts(tensors: ExpertTensors, budget: Budget) -> Sequence[Linear]:
    """One Linear for each expert, from a stack or from single layers."""
    if isinstance(tensors, tuple):
        return [Linear(expert, budget) for expert in tensors]
    return [Linear(tensors, budget, expert) for expert in range(tensors.weight.shape[0])]
