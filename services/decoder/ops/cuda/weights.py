"""Turns a checkpoint's tensors into weights in GPU memory, tiled as the kernels read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import mlx.core as mx
import numpy as np

from services.decoder.errors import CheckpointError
from services.decoder.ops.base import (
    AttentionShape,
    AttentionTensors,
    ExpertTensors,
    LinearTensors,
    MoeShape,
    MoeTensors,
    Tensor,
)
from services.decoder.ops.cuda import layout


@dataclass(frozen=True, eq=False)
class ArrayTensor:
    """A tensor that is an MLX array already: for benchmarks and tests, which make their weights where they use them."""

    name: str
    dtype: str
    array: mx.array

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return tuple(self.array.shape)

    def numpy(self) -> Any:
        """A copy on the host."""
        bits = self.array.view(mx.uint16) if self.dtype == "BF16" else self.array
        return np.array(bits)


@dataclass(frozen=True, eq=False)
class CudaLinear:
    """One layer's tiles and scales; both live as long as this."""

    tiles: mx.array
    scales: mx.array | None
    bits: int
    wide_scales: bool


_Linear = TypeVar("_Linear")  # what a set of kernels makes of a linear layer


@dataclass(frozen=True, eq=False)
class Attention(Generic[_Linear]):
    """Between a layer's input and its residual after attention."""

    q: _Linear
    k: _Linear
    v: _Linear
    o: _Linear
    input_norm: mx.array
    q_norm: mx.array | None
    k_norm: mx.array | None
    shape: AttentionShape


@dataclass(frozen=True, eq=False)
class Head(Generic[_Linear]):
    """The last norm and the projection to the vocabulary."""

    linear: _Linear
    norm: mx.array
    vocab_size: int
    rms_norm_eps: float


@dataclass(frozen=True, eq=False)
class CudaMoe:
    """A mixture with its norm and router."""

    router: CudaLinear
    gate_up: CudaLinear
    down: CudaLinear
    norm: mx.array
    shape: MoeShape
    width: int
    rms_norm_eps: float


def load_attention(
    tensors: AttentionTensors, shape: AttentionShape, load: Callable[[LinearTensors], _Linear]
) -> Attention[_Linear]:
    """Attention weights, with linear layers as `load` makes them."""
    return Attention(
        q=load(tensors.q_proj),
        k=load(tensors.k_proj),
        v=load(tensors.v_proj),
        o=load(tensors.o_proj),
        input_norm=load_vector(tensors.input_norm),
        q_norm=None if tensors.q_norm is None else load_vector(tensors.q_norm),
        k_norm=None if tensors.k_norm is None else load_vector(tensors.k_norm),
        shape=shape,
    )


def load_head(
    norm: Tensor, head: LinearTensors, rms_norm_eps: float, load: Callable[[LinearTensors], _Linear]
) -> Head[_Linear]:
    """The head's weights, with its linear layer as `load` makes it."""
    return Head(load(head), load_vector(norm), head.weight.shape[0], rms_norm_eps)


def load_moe(tensors: MoeTensors, shape: MoeShape, rms_norm_eps: float) -> CudaMoe:
    """Router and experts."""
    gate, up, down = (_stack(part) for part in (tensors.gate_proj, tensors.up_proj, tensors.down_proj))
    if (gate.bits, gate.group_size) != (up.bits, up.group_size):
        raise refusal(gate.name, "gate and up are quantised differently")
    return CudaMoe(
        router=load_linear(tensors.router),
        gate_up=_tile(_interleave(gate, up)),
        down=_tile(_flat(down)),
        norm=load_vector(tensors.norm),
        shape=shape,
        width=gate.weight.shape[1],
        rms_norm_eps=rms_norm_eps,
    )


def load_linear(tensors: LinearTensors) -> CudaLinear:
    """A layer of its own; rows are padded with zeros to whole tiles."""
    return _tile(_stack(tensors))


def load_vector(tensor: Tensor) -> mx.array:
    """A vector in float32, made by the GPU so that it is not in memory shared with the host."""
    vector = on_device(tensor).astype(mx.float32) * mx.array(1.0)
    mx.eval(vector)
    return vector


def refusal(tensor: Tensor, why: str) -> CheckpointError:
    """What this backend does not take, and what does."""
    return CheckpointError(f"{tensor.name}: {why}, which the cuda backend does not take; use --backend mlx")


@dataclass(frozen=True, eq=False)
class _Parts:
    """Weights `[..., rows, words]` as uint32 (bf16: shuffled pairs), and scales with biases `[..., rows, groups, words]`."""

    weight: mx.array
    scales: mx.array | None
    bits: int
    group_size: int
    name: Tensor


def _stack(tensors: ExpertTensors) -> _Parts:
    layers = tensors if isinstance(tensors, tuple) else (tensors,)
    first = layers[0]
    if any((one.bits, one.group_size) != (first.bits, first.group_size) for one in layers):
        raise refusal(first.weight, "experts of one layer are quantised differently")
    if any(one.bias is not None for one in layers):
        raise refusal(first.weight, "a linear layer has a bias")

    def joined(name: str) -> mx.array:
        arrays = [on_device(getattr(one, name)) for one in layers]
        return arrays[0] if not isinstance(tensors, tuple) else mx.stack(arrays)

    if first.scales is None or first.biases is None:
        if first.weight.dtype != "BF16":
            raise refusal(first.weight, f"weights are {first.weight.dtype}")
        weight = joined("weight").view(mx.uint16)
        pairs = layout.shuffle_pairs(weight.reshape(-1, weight.shape[-1]))
        return _Parts(pairs.reshape(*weight.shape[:-1], -1), None, 16, 0, first.weight)
    if first.bits not in (4, 8) or first.group_size % layout.UNIT:
        raise refusal(first.weight, f"weights have {first.bits} bits in groups of {first.group_size}")
    scales, biases = joined("scales"), joined("biases")
    if first.scales.dtype == "BF16":
        pairs = layout.pair_scales(scales.view(mx.uint16), biases.view(mx.uint16))
    else:
        pairs = mx.stack([scales.astype(mx.float32), biases.astype(mx.float32)], axis=-1).view(mx.uint32)
    return _Parts(joined("weight"), pairs, first.bits, first.group_size, first.weight)


def _interleave(gate: _Parts, up: _Parts) -> _Parts:
    scales = None
    if gate.scales is not None and up.scales is not None:
        flat = [part.reshape(*part.shape[:2], -1) for part in (gate.scales, up.scales)]
        joined = layout.interleave(*flat)
        scales = joined.reshape(joined.shape[0], -1, gate.scales.shape[-1])
    return _Parts(layout.interleave(gate.weight, up.weight), scales, gate.bits, gate.group_size, gate.name)


def _flat(parts: _Parts) -> _Parts:
    scales = None if parts.scales is None else parts.scales.reshape(-1, *parts.scales.shape[-2:])
    weight = parts.weight.reshape(-1, parts.weight.shape[-1])
    return _Parts(weight, scales, parts.bits, parts.group_size, parts.name)


def _tile(parts: _Parts) -> CudaLinear:
    weight, scales = parts.weight, parts.scales
    missing = layout.padded_rows(weight.shape[0]) - weight.shape[0]
    if missing:
        weight = mx.pad(weight, [(0, missing), (0, 0)])
        scales = None if scales is None else mx.pad(scales, [(0, missing), (0, 0), (0, 0)])
    tiles = mx.contiguous(layout.tile_words(weight, parts.bits))
    wide = scales is not None and scales.shape[-1] == 2
    tiled = None if scales is None else mx.contiguous(layout.tile_scales(scales, parts.group_size))
    mx.eval([part for part in (tiles, tiled) if part is not None])
    return CudaLinear(tiles, tiled, parts.bits, wide)


def on_device(tensor: Tensor) -> mx.array:
    """A tensor as an array."""
    if isinstance(tensor, ArrayTensor):
        return tensor.array
    array = mx.array(tensor.numpy())
    return array.view(mx.bfloat16) if tensor.dtype == "BF16" else array
