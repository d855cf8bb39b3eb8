"""Weights of the `mlx` backend: matrices as MLX arrays, quantised ones as the checkpoint packs them."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from services.decoder.ops.base import ExpertTensors, FloatArray, LinearTensors, Tensor

STORED_TYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}


def widen_tensor(tensor: Tensor) -> FloatArray:
    """A whole tensor in float32; exact."""
    stored: npt.NDArray[Any] = tensor.numpy()
    if tensor.dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def load_array(tensor: Tensor, dtype: mx.Dtype | None) -> mx.array:
    """A tensor as an MLX array, cast to dtype unless that is None."""
    array = mx.array(tensor.numpy())
    if tensor.dtype == "BF16":
        array = array.view(mx.bfloat16)
    if dtype is not None and array.dtype != dtype:
        array = array.astype(dtype)
    mx.eval(array)
    return array


class Linear:
    """x @ weight.T (+ bias) for a weight [..., out_features, in_features], in the activations' dtype."""

    def __init__(self, tensors: LinearTensors, dtype: mx.Dtype) -> None:
        # Scales and biases of the quantisation groups.
        self.groups: tuple[mx.array, mx.array] | None = None
        if tensors.scales is not None and tensors.biases is not None:
            self.groups = (load_array(tensors.scales, dtype), load_array(tensors.biases, dtype))
        self.weight = load_array(tensors.weight, None if self.groups is not None else dtype)
        self.bias = None if tensors.bias is None else load_array(tensors.bias, dtype)
        self.group_size = tensors.group_size
        self.bits = tensors.bits

    def __call__(self, x: mx.array) -> mx.array:
        """[T, in_features] to [T, out_features]."""
        if self.groups is None:
            y = x @ self.weight.T
        else:
            y = mx.quantized_matmul(
                x, self.weight, *self.groups, transpose=True, group_size=self.group_size, bits=self.bits
            )
        return y if self.bias is None else y + self.bias

    def rows(self, ids: mx.array) -> mx.array:
        """Some rows of the weight, [len(ids), in_features]."""
        if self.groups is None:
            return self.weight[ids]
        scales, biases = self.groups
        return mx.dequantize(self.weight[ids], scales[ids], biases[ids], group_size=self.group_size, bits=self.bits)


class Experts:
    """One linear layer [out_features, in_features] for each expert, stacked."""

    def __init__(self, tensors: ExpertTensors, dtype: mx.Dtype) -> None:
        if not isinstance(tensors, tuple):
            stack = Linear(tensors, dtype)
            self._weight, self._groups = stack.weight, stack.groups
        else:
            parts = [Linear(part, dtype) for part in tensors]
            self._weight = mx.stack([part.weight for part in parts])
            groups = [part.groups for part in parts if part.groups is not None]
            self._groups = (mx.stack([g[0] for g in groups]), mx.stack([g[1] for g in groups])) if groups else None
            mx.eval(self._weight, self._groups)
        first = tensors[0] if isinstance(tensors, tuple) else tensors
        self._group_size, self._bits = first.group_size, first.bits

    def __call__(self, x: mx.array, expert_ids: mx.array, sorted_ids: bool) -> mx.array:
        """x [..., 1, in_features] through the experts of expert_ids [...]: [..., 1, out_features]."""
        if self._groups is None:
            return mx.gather_mm(x, self._weight.swapaxes(-1, -2), rhs_indices=expert_ids, sorted_indices=sorted_ids)
        return mx.gather_qmm(
            x,
            self._weight,
            *self._groups,
            rhs_indices=expert_ids,
            transpose=True,
            group_size=self._group_size,
            bits=self._bits,
            sorted_indices=sorted_ids,
        )
