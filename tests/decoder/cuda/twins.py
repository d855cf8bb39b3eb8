"""NumPy twins of the kernels' stages, in float64. Shapes: T rows of a step, H query heads, K heads of keys and values, D head_dim."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from services.decoder.ops.base import AttentionShape, ExpertTensors, LinearTensors, MoeShape, Tensor

Array = npt.NDArray[Any]


def values(tensor: Tensor) -> Array:
    """A whole tensor in float64."""
    stored = tensor.numpy()
    if tensor.dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return stored.astype(np.float64)


def weights(tensors: LinearTensors) -> Array:
    """The matrix `[..., outputs, inputs]` that a layer stands for."""
    if tensors.scales is None or tensors.biases is None:
        return values(tensors.weight)
    words = tensors.weight.numpy()
    shifts = np.arange(0, 32, tensors.bits, dtype=np.uint32)
    numbers = (words[..., None] >> shifts & np.uint32(2**tensors.bits - 1)).reshape(*words.shape[:-1], -1)
    scales, biases = (np.repeat(values(part), tensors.group_size, -1) for part in (tensors.scales, tensors.biases))
    return numbers * scales + biases


def stack(tensors: ExpertTensors) -> Array:
    """The matrices `[experts, outputs, inputs]` of a mixture."""
    return np.stack([weights(one) for one in tensors]) if isinstance(tensors, tuple) else weights(tensors)


def linear(tensors: LinearTensors, x: Array) -> Array:
    """x `[T, inputs]` to `[T, outputs]`."""
    y = x @ weights(tensors).T
    return y if tensors.bias is None else y + values(tensors.bias)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Over the last axis."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def heads(qkv: Array, norms: tuple[Array | None, Array | None], positions: Array, shape: AttentionShape) -> list[Array]:
    """q `[T, H, D]`, k and v `[T, K, D]` of projections `[T, (H + 2 K) D]`: q and k normed and rotated."""
    dim = shape.head_dim
    parts = np.split(qkv.reshape(len(qkv), -1, dim), [shape.num_heads, shape.num_heads + shape.num_kv_heads], axis=1)
    angles = positions[:, None] * shape.rope_inv_freq.astype(np.float64)
    cos, sin = (shape.rope_attention_factor * f(angles)[:, None] for f in (np.cos, np.sin))
    for index, norm in enumerate(norms):
        x = parts[index] if norm is None else rms_norm(parts[index], norm, shape.rms_norm_eps)
        low, high = x[..., : dim // 2], x[..., dim // 2 :]
        parts[index] = np.concatenate([low * cos - high * sin, high * cos + low * sin], -1)
    return parts


def attention(q: Array, keys: Array, values: Array, shape: AttentionShape) -> Array:
    """One row's `[H, D]`: q `[H, D]` over the keys and values `[n, K, D]` of its n last tokens, itself the last."""
    if shape.window_tokens:
        keys, values = keys[-shape.window_tokens :], values[-shape.window_tokens :]
    group = shape.num_heads // shape.num_kv_heads
    scores = np.einsum("kgd,nkd->kgn", q.reshape(shape.num_kv_heads, group, -1), keys) * shape.scale
    chances = np.exp(scores - scores.max(-1, keepdims=True))
    chances /= chances.sum(-1, keepdims=True)
    return np.einsum("kgn,nkd->kgd", chances, values).reshape(q.shape)


def route(logits: Array, shape: MoeShape) -> tuple[Array, Array]:
    """Experts and their weights `[T, num_experts_per_tok]`, the best first, of equals the lowest."""
    chances = np.exp(logits - logits.max(-1, keepdims=True))
    chances /= chances.sum(-1, keepdims=True)
    chosen = np.argsort(-chances, axis=-1, kind="stable")[:, : shape.num_experts_per_tok]
    found = np.take_along_axis(chances, chosen, -1)
    return chosen, found / found.sum(-1, keepdims=True) if shape.norm_topk_prob else found


def gated(gate: Array, up: Array, x: Array) -> Array:
    """silu(gate x) * up x, `[T, width]`."""
    inner = x @ gate.T
    return inner / (1 + np.exp(-inner)) * (x @ up.T)
