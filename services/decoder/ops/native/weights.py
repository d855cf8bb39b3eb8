"""Checkpoint tensors as the kernels see them: pointers into the mapped files, and small vectors widened to float32."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from services.decoder.errors import CheckpointError
from services.decoder.ops.base import ExpertTensors, LinearTensors, Tensor
from services.decoder.ops.native import layout
from services.decoder.ops.native.layout import Matrix

_FLOAT_FORMATS = {"F32": layout.FORMAT_F32, "F16": layout.FORMAT_F16, "BF16": layout.FORMAT_BF16}
_QUANTISED_FORMATS = {4: layout.FORMAT_Q4, 8: layout.FORMAT_Q8}
_GROUP_SIZES = (32, 64, 128)


@dataclass
class Kept:
    """What must stay alive as long as a handle: arrays whose addresses the kernels hold."""

    arrays: list[Any] = field(default_factory=list)

    def address(self, array: npt.NDArray[Any]) -> int:
        """The address of an array, kept alive."""
        self.arrays.append(array)
        return array.ctypes.data

    def vector(self, tensor: Tensor | None) -> int | None:
        """The address of a tensor in float32, for the small ones that every step reads."""
        return None if tensor is None else self.address(widen(tensor.numpy(), tensor.dtype))

    def matrix(self, tensors: LinearTensors) -> Matrix:
        """One linear layer."""
        return self.matrices((tensors,))[0]

    def matrices(self, tensors: ExpertTensors) -> ctypes.Array[Matrix]:
        """One linear layer for each expert, in one array; they must be of one kind."""
        parts = tensors if isinstance(tensors, tuple) else (tensors,)
        made = [self._matrix(part, index) for part in parts for index in range(_stack_size(part))]
        kinds = {(m.format, m.scale_format, m.group_size, m.rows, m.cols) for m in made}
        if len(kinds) != 1:
            raise CheckpointError(
                f"{parts[0].weight.name}: the experts of one layer differ in dtype, quantisation or shape; "
                "the native backend needs them alike, use --backend mlx"
            )
        array = (Matrix * len(made))(*made)
        self.arrays.append(array)
        return array

    def _matrix(self, tensors: LinearTensors, expert: int) -> Matrix:
        weight = _of_expert(tensors.weight, expert)
        matrix = Matrix(weight=self.address(weight), rows=weight.shape[0], row_bytes=weight.strides[0])
        if tensors.scales is None or tensors.biases is None:
            matrix.format = _FLOAT_FORMATS[tensors.weight.dtype]
            matrix.cols = weight.shape[1]
        else:
            _check_quantisation(tensors)
            scales, biases = _of_expert(tensors.scales, expert), _of_expert(tensors.biases, expert)
            matrix.format = _QUANTISED_FORMATS[tensors.bits]
            matrix.cols = weight.shape[1] * 32 // tensors.bits
            matrix.scales, matrix.biases = self.address(scales), self.address(biases)
            matrix.scale_row_bytes = scales.strides[0]
            matrix.scale_format = _FLOAT_FORMATS[tensors.scales.dtype]
            matrix.group_size = tensors.group_size
        if matrix.cols > layout.MAX_COLS:
            raise CheckpointError(
                f"{tensors.weight.name}: {matrix.cols} columns are more than the native backend's {layout.MAX_COLS}; "
                "use --backend mlx"
            )
        if tensors.bias is not None:
            bias = widen(tensors.bias.numpy(), tensors.bias.dtype)
            matrix.out_bias = self.address(bias if bias.ndim == 1 else bias[expert])
        return matrix


@dataclass(eq=False)
class Weights:
    """A handle: a struct that the kernels read, and what its pointers point to."""

    struct: Any
    kept: Kept
    address: int = field(init=False)

    def __post_init__(self) -> None:
        self.address = ctypes.addressof(self.struct)


def widen(stored: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """A float32 copy of stored numbers; exact."""
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return np.array(stored, np.float32)


def _stack_size(tensors: LinearTensors) -> int:
    return tensors.weight.shape[0] if len(tensors.weight.shape) == 3 else 1


def _of_expert(tensor: Tensor, expert: int) -> npt.NDArray[Any]:
    array = tensor.numpy()
    return array[expert] if array.ndim == 3 else array


def _check_quantisation(tensors: LinearTensors) -> None:
    name = tensors.weight.name
    if tensors.bits not in _QUANTISED_FORMATS or tensors.group_size not in _GROUP_SIZES:
        raise CheckpointError(
            f"{name}: {tensors.bits} bits in groups of {tensors.group_size} have no native kernel, "
            "which take 4 or 8 bits in groups of 32, 64 or 128; use --backend mlx"
        )
    scales, biases = tensors.scales, tensors.biases
    if scales is not None and biases is not None and scales.dtype != biases.dtype:
        raise CheckpointError(f"{name}: scales are {scales.dtype}, but biases {biases.dtype}; convert the model again")
