"""The `mlx` backend: the reference, in MLX's own operations throughout.

On a CPU activations are float32, whatever the checkpoint's dtype: MLX's CPU wheel has no bf16 experts, and is several times slower
in bf16 than in float32. On a GPU they have the dtype of the checkpoint's norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from services.decoder.batch import Batch
from services.decoder.int8_rows import dequantise, quantise
from services.decoder.kv_view import KvView
from services.decoder.ops.base import (
    AttentionShape,
    AttentionTensors,
    FloatArray,
    LinearTensors,
    MlpTensors,
    MoeShape,
    MoeTensors,
    Tensor,
)
from services.decoder.ops.gathered_attention import GatheredAttention, SequenceGroup, plan_groups
from services.decoder.ops.mlx_weights import STORED_TYPES, Experts, Linear, load_array, widen_tensor
from services.decoder.ops.rope_table import RopeTable
from services.decoder.sampler import Sampled, sample_rows

KERNEL_REVISION = 3  # counts up when bits change, those of the sampler too
# From this many token-expert pairs on, pairs are sorted by expert, so that an expert's weights are read once.
_SORT_PAIRS = 64

# What MLX rounds K/V to; the bytes of int8 come after.
_KV_TYPES = {"bf16": mx.bfloat16, "f16": mx.float16, "f32": mx.float32, "int8": mx.float32}


@dataclass(frozen=True, eq=False)
class _Attention:
    input_norm: mx.array  # [hidden]
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    qk_norm: mx.array | None  # [num_heads + num_kv_heads, head_dim]
    shape: AttentionShape
    rope: RopeTable


@dataclass(frozen=True, eq=False)
class _Mlp:
    norm: mx.array
    eps: float
    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear


@dataclass(frozen=True, eq=False)
class _Moe:
    norm: mx.array
    eps: float
    router: Linear
    gate_proj: Experts
    up_proj: Experts
    down_proj: Experts
    shape: MoeShape


@dataclass(frozen=True, eq=False)
class _Head:
    norm: mx.array
    eps: float
    linear: Linear


@dataclass(frozen=True, eq=False)
class _Rows:
    """K or V of the step's own tokens, rounded to the pool's dtype."""

    stored: npt.NDArray[Any]  # [T, num_kv_heads, head_dim], as a block has them
    scales: npt.NDArray[np.float32] | None = None  # [T, num_kv_heads], of int8

    @property
    def readable(self) -> npt.NDArray[Any]:
        """As `KvView.gather` gives them: what attention reads."""
        return self.stored if self.scales is None else dequantise(self.stored, self.scales)


@dataclass(eq=False)
class _Step:
    batch: Batch
    kv: KvView
    groups: Sequence[SequenceGroup]
    rotations: dict[int, tuple[mx.array, mx.array]] = field(default_factory=dict)  # by the id of a rope table
    rows: dict[int, tuple[_Rows, _Rows]] = field(default_factory=dict)  # K and V of each layer so far


class MlxOps:
    """See `ops.base.Ops`."""

    def __init__(self) -> None:
        self._on_cpu = mx.default_device().type == mx.DeviceType.cpu
        self._attention = GatheredAttention()
        self._ropes: dict[tuple[bytes, float], RopeTable] = {}
        self._numerics_id = f"mlx-{version('mlx')}-{mx.default_device().type.name}-r{KERNEL_REVISION}"

    @property
    def backend(self) -> str:
        """Its name on the command line."""
        return "mlx"

    @property
    def numerics_id(self) -> str:
        """MLX's version and device, and this file's revision."""
        return self._numerics_id

    @property
    def batch_invariant(self) -> bool:
        """On a CPU: MLX's reductions there run along a row, in one order. On a GPU it picks kernels by the number of rows."""
        return self._on_cpu

    def load_embedding(self, table: LinearTensors) -> Linear:
        """See `Ops`."""
        return Linear(table, self._dtype_of(table.scales or table.weight))

    def load_attention(self, tensors: AttentionTensors, shape: AttentionShape) -> _Attention:
        """See `Ops`."""
        dtype = self._dtype_of(tensors.input_norm)
        qk_norm = None
        if tensors.q_norm is not None and tensors.k_norm is not None:
            norms = (widen_tensor(tensors.q_norm), widen_tensor(tensors.k_norm))
            repeated = np.repeat(np.stack(norms), (shape.num_heads, shape.num_kv_heads), axis=0)
            qk_norm = mx.array(repeated).astype(dtype)
        key = (shape.rope_inv_freq.tobytes(), shape.rope_attention_factor)
        rope = self._ropes.setdefault(key, RopeTable(shape.rope_inv_freq, shape.rope_attention_factor))
        return _Attention(
            input_norm=load_array(tensors.input_norm, dtype),
            q_proj=Linear(tensors.q_proj, dtype),
            k_proj=Linear(tensors.k_proj, dtype),
            v_proj=Linear(tensors.v_proj, dtype),
            o_proj=Linear(tensors.o_proj, dtype),
            qk_norm=qk_norm,
            shape=shape,
            rope=rope,
        )

    def load_mlp(self, tensors: MlpTensors, rms_norm_eps: float) -> _Mlp:
        """See `Ops`."""
        dtype = self._dtype_of(tensors.norm)
        linears = (Linear(part, dtype) for part in (tensors.gate_proj, tensors.up_proj, tensors.down_proj))
        return _Mlp(load_array(tensors.norm, dtype), rms_norm_eps, *linears)

    def load_moe(self, tensors: MoeTensors, shape: MoeShape, rms_norm_eps: float) -> _Moe:
        """See `Ops`."""
        dtype = self._dtype_of(tensors.norm)
        return _Moe(
            norm=load_array(tensors.norm, dtype),
            eps=rms_norm_eps,
            router=Linear(tensors.router, dtype),
            gate_proj=Experts(tensors.gate_proj, dtype),
            up_proj=Experts(tensors.up_proj, dtype),
            down_proj=Experts(tensors.down_proj, dtype),
            shape=shape,
        )

    def load_head(self, norm: Tensor, head: LinearTensors, rms_norm_eps: float) -> _Head:
        """See `Ops`."""
        dtype = self._dtype_of(norm)
        return _Head(load_array(norm, dtype), rms_norm_eps, Linear(head, dtype))

    def begin_step(self, batch: Batch, kv: KvView) -> _Step:
        """See `Ops`."""
        return _Step(batch, kv, plan_groups(batch, kv.shape.block_size))

    def embed(self, embedding: Linear, step: _Step) -> mx.array:
        """See `Ops`."""
        return embedding.rows(mx.array(step.batch.token_ids))

    def norm_qkv_rope(self, attention: _Attention, hidden: mx.array, step: _Step) -> tuple[mx.array, _Rows, _Rows]:
        """See `Ops`."""
        shape = attention.shape
        num_rows = hidden.shape[0]
        rows = mx.fast.rms_norm(hidden, attention.input_norm, shape.rms_norm_eps)
        qk = mx.concatenate([attention.q_proj(rows), attention.k_proj(rows)], axis=-1)
        qk_heads = qk.reshape(num_rows, shape.num_heads + shape.num_kv_heads, shape.head_dim)
        if attention.qk_norm is not None:
            qk_heads = mx.fast.rms_norm(qk_heads, None, shape.rms_norm_eps) * attention.qk_norm
        turned = _rotate(qk_heads, *self._rotation(attention, step))
        v = attention.v_proj(rows).reshape(num_rows, shape.num_kv_heads, shape.head_dim)
        q, k = turned[:, : shape.num_heads], turned[:, shape.num_heads :]
        rounded = [_rounded(array, step.kv.kv_dtype) for array in (k, v)]
        mx.eval(q, *rounded)
        keys, values = (_rows(array, step.kv.kv_dtype) for array in rounded)
        return q, keys, values

    def attention(
        self,
        attention: _Attention,
        layer: int,
        q: mx.array,
        k: _Rows,
        v: _Rows,
        step: _Step,
    ) -> mx.array:
        """See `Ops`."""
        step.rows[layer] = (k, v)
        return self._attention.attend(q, k.readable, v.readable, step.groups, step.kv, layer, attention.shape)

    def out_proj_residual(self, attention: _Attention, attended: mx.array, hidden: mx.array) -> mx.array:
        """See `Ops`."""
        return hidden + attention.o_proj(attended)

    def dense_mlp(self, mlp: _Mlp, hidden: mx.array) -> mx.array:
        """See `Ops`."""
        rows = mx.fast.rms_norm(hidden, mlp.norm, mlp.eps)
        return hidden + mlp.down_proj(_silu(mlp.gate_proj(rows)) * mlp.up_proj(rows))

    def moe(self, moe: _Moe, hidden: mx.array) -> mx.array:
        """See `Ops`."""
        rows = mx.fast.rms_norm(hidden, moe.norm, moe.eps)
        expert_ids, topk_weights = _route(moe, rows)
        pairs, back = rows[:, None, None], None  # [T, 1, 1, hidden]
        if expert_ids.size >= _SORT_PAIRS:
            order = mx.argsort(expert_ids.flatten())
            back = mx.argsort(order)
            pairs = rows[order // moe.shape.num_experts_per_tok][:, None]
            expert_ids = expert_ids.flatten()[order]
        sorted_ids = back is not None
        gate = moe.gate_proj(pairs, expert_ids, sorted_ids)
        up = moe.up_proj(pairs, expert_ids, sorted_ids)
        outputs = moe.down_proj(_silu(gate) * up, expert_ids, sorted_ids)
        if back is not None:
            outputs = outputs[back]
        by_slot = outputs.reshape(*topk_weights.shape, -1)  # [T, num_experts_per_tok, hidden]
        # By falling weight: the order of the sum is the row's own.
        return hidden + (topk_weights[:, None].astype(by_slot.dtype) @ by_slot)[:, 0]

    def head_and_sample(self, head: _Head, hidden: mx.array, step: _Step) -> Sampled:
        """See `Ops`."""
        return sample_rows(self.logits(head, hidden, step), step.batch.sampling)

    def logits(self, head: _Head, hidden: mx.array, step: _Step) -> FloatArray:
        """See `Ops`."""
        if not len(step.batch.sample_rows):  # MLX divides by zero in a product of no rows
            return np.empty((0, head.linear.weight.shape[0]), np.float32)
        rows = mx.fast.rms_norm(hidden[mx.array(step.batch.sample_rows)], head.norm, head.eps)
        return np.asarray(head.linear(rows).astype(mx.float32))

    def commit(self, step: _Step) -> None:
        """See `Ops`."""
        block_size = step.kv.shape.block_size
        slots = step.batch.slot_mapping
        if not len(slots):
            return
        # [num_layers, 2, num_kv_heads, T, head_dim], as a block has it
        by_layer = [step.rows[layer] for layer in sorted(step.rows)]
        rows = np.stack([np.stack([k.stored, v.stored]) for k, v in by_layer]).swapaxes(2, 3)
        if step.kv.shape.scale_bytes:
            scales = np.array([[k.scales, v.scales] for k, v in by_layer], np.float32).swapaxes(2, 3)
        # Runs of rows that follow one another in one block.
        breaks = np.flatnonzero((np.diff(slots) != 1) | (slots[1:] % block_size == 0)) + 1
        for start, stop in zip([0, *breaks.tolist()], [*breaks.tolist(), len(slots)], strict=True):
            block_id, offset = divmod(int(slots[start]), block_size)
            step.kv.block(block_id)[:, :, :, offset : offset + stop - start] = rows[:, :, :, start:stop]
            if step.kv.shape.scale_bytes:
                step.kv.scales(block_id)[:, :, :, offset : offset + stop - start] = scales[:, :, :, start:stop]

    def _dtype_of(self, tensor: Tensor) -> mx.Dtype:
        """The activations' dtype, where the tensor is one that has the checkpoint's."""
        return mx.float32 if self._on_cpu else STORED_TYPES[tensor.dtype]

    def _rotation(self, attention: _Attention, step: _Step) -> tuple[mx.array, mx.array]:
        key = id(attention.rope)
        if key not in step.rotations:
            cos, sin = attention.rope.rows(step.batch.positions)
            step.rotations[key] = (mx.array(cos[:, None]), mx.array(sin[:, None]))
        return step.rotations[key]


def _rotate(heads: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Rotates the pairs (i, i + head_dim / 2) of [T, heads, head_dim]; cos and sin are [T, 1, head_dim / 2]."""
    first, second = mx.split(heads, 2, axis=-1)
    return mx.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _rounded(rows: mx.array, kv_dtype: str) -> mx.array:
    """Rounds to the K/V dtype, where that is one of MLX's; bf16 comes as uint16."""
    rounded = rows.astype(_KV_TYPES[kv_dtype])
    return rounded.view(mx.uint16) if kv_dtype == "bf16" else rounded


def _rows(rounded: mx.array, kv_dtype: str) -> _Rows:
    """Through NumPy, for int8 too: so that a host's bits are those of the native kernels."""
    rows = np.asarray(rounded)
    return _Rows(*quantise(rows)) if kv_dtype == "int8" else _Rows(rows)


def _silu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(x)


def _route(moe: _Moe, rows: mx.array) -> tuple[mx.array, mx.array]:
    """expert_ids and topk_weights, [T, num_experts_per_tok], by falling weight; of equals the lowest id first."""
    weights = mx.softmax(moe.router(rows), axis=-1, precise=True).astype(mx.float32)
    expert_ids = mx.argsort(-weights, axis=-1)[:, : moe.shape.num_experts_per_tok]
    topk_weights = mx.take_along_axis(weights, expert_ids, axis=-1)
    if moe.shape.norm_topk_prob:
        topk_weights = topk_weights / topk_weights.sum(axis=-1, keepdims=True)
    return expert_ids, topk_weights
