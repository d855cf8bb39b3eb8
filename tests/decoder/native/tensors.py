"""Tensors and weights for kernel tests, with the float64 matrix that they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from services.decoder.ops.base import LinearTensors

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class ArrayTensor:
    """A `Tensor` in memory."""

    name: str
    dtype: str
    array: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """As the array's."""
        return self.array.shape

    def numpy(self) -> Array:
        """The array itself."""
        return self.array


def to_bf16(values: Array) -> Array:
    """Bits of the nearest bf16, ties to even."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def of_bf16(bits: Array) -> Array:
    """float32 of bf16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_int8(rows: Array) -> tuple[Array, Array]:
    """Bytes and float32 scales of rows of K or V, as `--kv-dtype int8` stores them."""
    rows = rows.astype(np.float32)
    scales = np.abs(rows).max(axis=-1) / np.float32(127)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.where(scales[..., None] > 0, np.rint(rows / scales[..., None]), 0)
    return np.clip(np.nan_to_num(codes), -127, 127).astype(np.int8), scales


def of_int8(codes: Array, scales: Array) -> Array:
    """float32 of bytes and scales."""
    return codes.astype(np.float32) * scales[..., None]


def tensor(name: str, values: Array, dtype: str) -> tuple[ArrayTensor, Array]:
    """A tensor of that type, and its exact values in float64."""
    if dtype == "BF16":
        bits = to_bf16(values)
        return ArrayTensor(name, dtype, bits), of_bf16(bits).astype(np.float64)
    stored = values.astype(np.float16 if dtype == "F16" else np.float32)
    return ArrayTensor(name, dtype, stored), stored.astype(np.float64)


def float_linear(name: str, values: Array, dtype: str = "F32") -> tuple[LinearTensors, Array]:
    """An unquantised linear layer, or a stack."""
    weight, exact = tensor(f"{name}.weight", values, dtype)
    return LinearTensors(weight), exact


def quantised_linear(
    name: str,
    shape: tuple[int, ...],
    bits: int,
    group_size: int,
    rng: np.random.Generator,
    scale_dtype: str = "BF16",
    extreme: bool = False,
) -> tuple[LinearTensors, Array]:
    """A random linear layer in MLX's affine format; `extreme` has only the smallest and largest codes."""
    groups = (*shape[:-1], shape[-1] // group_size)
    top = 2**bits - 1
    codes = rng.choice([0, top], shape) if extreme else rng.integers(0, top + 1, shape)
    spread = rng.uniform(0.5, 1.5, groups) * 2 / top / np.sqrt(shape[-1])
    scales, exact_scales = tensor(f"{name}.scales", spread * rng.choice([-1, 1], groups), scale_dtype)
    biases, exact_biases = tensor(f"{name}.biases", -exact_scales * top * rng.uniform(0.3, 0.7, groups), scale_dtype)
    per_word = 32 // bits
    words = codes.astype(np.uint32).reshape(*shape[:-1], shape[-1] // per_word, per_word)
    packed = np.bitwise_or.reduce(words << (np.arange(per_word, dtype=np.uint32) * np.uint32(bits)), axis=-1)
    weight = ArrayTensor(f"{name}.weight", "U32", packed.astype(np.uint32))
    exact = codes * np.repeat(exact_scales, group_size, -1) + np.repeat(exact_biases, group_size, -1)
    return LinearTensors(weight, scales, biases, bits, group_size), exact


def quantise_activations(x: Array) -> Array:
    """What `fast` makes of rows of activations: bytes with a scale for each 64 columns, in float64."""
    rows, cols = x.shape
    padded = np.zeros((rows, -(-cols // 64) * 64), np.float32)
    padded[:, :cols] = x
    groups = padded.reshape(rows, -1, 64)
    peak = np.abs(groups).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.where(peak > 0, np.float32(127) / peak, np.float32(0))
    codes = np.rint(groups * inverse)
    return (codes * (peak / np.float32(127)).astype(np.float64)).reshape(rows, -1)[:, :cols]
