"""The `mlx` backend: the reference. On a CPU, MLX does the norms, rotations, softmax, roundings and dequantising, and the host's
BLAS the products, because MLX's CPU wheel is 20 to 60 times slower at those (see ops/blas.py). Activations are float32.
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
from services.decoder.kv_view import KvView
from services.decoder.ops.base import (
    AttentionShape,
    AttentionTensors,
    LinearTensors,
    MlpTensors,
    MoeShape,
    MoeTensors,
    Tensor,
)
from services.decoder.ops.blas import FloatArray, blas_name, numpy_name
from services.decoder.ops.cpu_attention import HostAttention, SequenceGroup, plan_groups
from services.decoder.ops.mlx_weights import Budget, Linear, load_experts, widen_tensor
from services.decoder.ops.rope_table import RopeTable
from services.decoder.sampler import Sampled, sample_rows

KERNEL_REVISION = 1  # counts up when bits change
DEFAULT_RESIDENT_BYTES = 2 << 30

_KV_TYPES = {"bf16": mx.bfloat16, "f16": mx.float16, "f32": mx.float32}


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
    gate_proj: Sequence[Linear]
    up_proj: Sequence[Linear]
    down_proj: Sequence[Linear]
    shape: MoeShape


@dataclass(frozen=True, eq=False)
class _Head:
    norm: mx.array
    eps: float
    linear: Linear


@dataclass(eq=False)
class _Step:
    batch: Batch
    kv: KvView
    groups: Sequence[SequenceGroup]
    rotations: dict[int, tuple[mx.array, mx.array]] = field(default_factory=dict)  # by the id of a rope table
    # K and V rows of each layer so far, [T, num_kv_heads, head_dim] as the pool stores them
    rows: dict[int, tuple[npt.NDArray[Any], npt.NDArray[Any]]] = field(default_factory=dict)


class MlxOps:
    """See `ops.base.Ops`. `resident_bytes` bounds the float32 copies of weights and has no influence on the bits."""

    def __init__(self, resident_bytes: int = DEFAULT_RESIDENT_BYTES) -> None:
        self._budget = Budget(resident_bytes)
        self._attention = HostAttention()
        self._ropes: dict[tuple[bytes, float], RopeTable] = {}
        device = mx.default_device().type.name
        parts = (f"mlx-{version('mlx')}-{device}", numpy_name(), blas_name(), f"r{KERNEL_REVISION}")
        self._numerics_id = "-".join(parts)

    @property
    def backend(self) -> str:
        """Its name on the command line."""
        return "mlx"

    @property
    def numerics_id(self) -> str:
        """MLX's version and device, NumPy's and its BLAS's with their instruction sets, and this file's revision."""
        return self._numerics_id

    @property
    def batch_invariant(self) -> bool:
        """Every product is of one row, and every reduction within one row."""
        return True

    def load_embedding(self, table: LinearTensors) -> Linear:
        """See `Ops`."""
        return Linear(table, self._budget)

    def load_attention(self, tensors: AttentionTensors, shape: AttentionShape) -> _Attention:
        """See `Ops`."""
        budget = self._budget
        qk_norm = None
        if tensors.q_norm is not None and tensors.k_norm is not None:
            norms = (widen_tensor(tensors.q_norm), widen_tensor(tensors.k_norm))
            qk_norm = mx.array(np.repeat(np.stack(norms), (shape.num_heads, shape.num_kv_heads), axis=0))
        key = (shape.rope_inv_freq.tobytes(), shape.rope_attention_factor)
        rope = self._ropes.setdefault(key, RopeTable(shape.rope_inv_freq, shape.rope_attention_factor))
        return _Attention(
            input_norm=_norm(tensors.input_norm),
            q_proj=Linear(tensors.q_proj, budget),
            k_proj=Linear(tensors.k_proj, budget),
            v_proj=Linear(tensors.v_proj, budget),
            o_proj=Linear(tensors.o_proj, budget),
            qk_norm=qk_norm,
            shape=shape,
            rope=rope,
        )

    def load_mlp(self, tensors: MlpTensors, rms_norm_eps: float) -> _Mlp:
        """See `Ops`."""
        linears = (Linear(part, self._budget) for part in (tensors.gate_proj, tensors.up_proj, tensors.down_proj))
        return _Mlp(_norm(tensors.norm), rms_norm_eps, *linears)

    def load_moe(self, tensors: MoeTensors, shape: MoeShape, rms_norm_eps: float) -> _Moe:
        """See `Ops`."""
        return _Moe(
            norm=_norm(tensors.norm),
            eps=rms_norm_eps,
            router=Linear(tensors.router, self._budget),
            gate_proj=load_experts(tensors.gate_proj, self._budget),
            up_proj=load_experts(tensors.up_proj, self._budget),
            down_proj=load_experts(tensors.down_proj, self._budget),
            shape=shape,
        )

    def load_head(self, norm: Tensor, head: LinearTensors, rms_norm_eps: float) -> _Head:
        """See `Ops`."""
        return _Head(_norm(norm), rms_norm_eps, Linear(head, self._budget))

    def begin_step(self, batch: Batch, kv: KvView) -> _Step:
        """See `Ops`."""
        return _Step(batch, kv, plan_groups(batch, kv.shape.block_size))

    def embed(self, embedding: Linear, step: _Step) -> mx.array:
        """See `Ops`."""
        return mx.array(embedding.weight_rows(step.batch.token_ids))

    def norm_qkv_rope(
        self, attention: _Attention, hidden: mx.array, step: _Step
    ) -> tuple[FloatArray, npt.NDArray[Any], npt.NDArray[Any]]:
        """See `Ops`."""
        shape = attention.shape
        rows = _host(mx.fast.rms_norm(hidden, attention.input_norm, shape.rms_norm_eps))
        qk = np.concatenate((attention.q_proj(rows), attention.k_proj(rows)), axis=1)
        qk_heads = mx.array(qk).reshape(len(rows), shape.num_heads + shape.num_kv_heads, shape.head_dim)
        if attention.qk_norm is not None:
            qk_heads = mx.fast.rms_norm(qk_heads, None, shape.rms_norm_eps) * attention.qk_norm
        turned = _rotate(qk_heads, *self._rotation(attention, step))
        v = mx.array(attention.v_proj(rows)).reshape(len(rows), shape.num_kv_heads, shape.head_dim)
        q, k = turned[:, : shape.num_heads], turned[:, shape.num_heads :]
        stored = [_stored(array, step.kv.kv_dtype) for array in (k, v)]
        mx.eval(q, *stored)
        return _host(q), _host(stored[0]), _host(stored[1])

    def attention(
        self,
        attention: _Attention,
        layer: int,
        q: FloatArray,
        k: npt.NDArray[Any],
        v: npt.NDArray[Any],
        step: _Step,
    ) -> FloatArray:
        """See `Ops`."""
        step.rows[layer] = (k, v)
        return self._attention.attend(q, k, v, step.groups, step.kv, layer, attention.shape)

    def out_proj_residual(self, attention: _Attention, attended: FloatArray, hidden: mx.array) -> mx.array:
        """See `Ops`."""
        return hidden + mx.array(attention.o_proj(attended))

    def dense_mlp(self, mlp: _Mlp, hidden: mx.array) -> mx.array:
        """See `Ops`."""
        rows = _host(mx.fast.rms_norm(hidden, mlp.norm, mlp.eps))
        return hidden + mx.array(mlp.down_proj(_silu_times(mlp.gate_proj(rows), mlp.up_proj(rows))))

    def moe(self, moe: _Moe, hidden: mx.array) -> mx.array:
        """See `Ops`."""
        rows = _host(mx.fast.rms_norm(hidden, moe.norm, moe.eps))
        expert_ids, topk_weights = _route(moe, rows)
        # Token-expert pairs by expert, so that an expert's weights pass through the cache once.
        order = np.argsort(expert_ids.ravel(), kind="stable")
        pair_rows = rows[order // moe.shape.num_experts_per_tok]
        counts = np.bincount(expert_ids.ravel(), minlength=moe.shape.num_experts)
        outputs = np.empty((len(order), hidden.shape[1]), np.float32)
        stop = 0
        for expert in np.flatnonzero(counts).tolist():
            start, stop = stop, stop + int(counts[expert])
            taken = pair_rows[start:stop]
            inner = _silu_times(moe.gate_proj[expert](taken), moe.up_proj[expert](taken))
            outputs[order[start:stop]] = moe.down_proj[expert](inner)
        by_slot = outputs.reshape(*expert_ids.shape, -1)
        # By falling weight: the order of the sum is the row's own.
        mixed = by_slot[:, 0] * topk_weights[:, :1]
        for slot in range(1, moe.shape.num_experts_per_tok):
            mixed += by_slot[:, slot] * topk_weights[:, slot : slot + 1]
        return hidden + mx.array(mixed)

    def head_and_sample(self, head: _Head, hidden: mx.array, step: _Step) -> Sampled:
        """See `Ops`."""
        return sample_rows(self.logits(head, hidden, step), step.batch.sampling)

    def logits(self, head: _Head, hidden: mx.array, step: _Step) -> FloatArray:
        """See `Ops`."""
        sampled = _host(hidden)[step.batch.sample_rows]
        return head.linear(_host(mx.fast.rms_norm(mx.array(sampled), head.norm, head.eps)))

    def commit(self, step: _Step) -> None:
        """See `Ops`."""
        block_size = step.kv.shape.block_size
        slots = step.batch.slot_mapping
        if not len(slots):
            return
        # [num_layers, 2, num_kv_heads, T, head_dim], as a block has it
        rows = np.stack([np.stack(step.rows[layer]) for layer in sorted(step.rows)]).swapaxes(2, 3)
        # Runs of rows that follow one another in one block.
        breaks = np.flatnonzero((np.diff(slots) != 1) | (slots[1:] % block_size == 0)) + 1
        for start, stop in zip([0, *breaks.tolist()], [*breaks.tolist(), len(slots)], strict=True):
            block_id, offset = divmod(int(slots[start]), block_size)
            step.kv.block(block_id)[:, :, :, offset : offset + stop - start] = rows[:, :, :, start:stop]

    def _rotation(self, attention: _Attention, step: _Step) -> tuple[mx.array, mx.array]:
        key = id(attention.rope)
        if key not in step.rotations:
            cos, sin = attention.rope.rows(step.batch.positions)
            step.rotations[key] = (mx.array(cos[:, None]), mx.array(sin[:, None]))
        return step.rotations[key]


def _norm(tensor: Tensor) -> mx.array:
    return mx.array(widen_tensor(tensor))


def _host(array: mx.array) -> npt.NDArray[Any]:
    """Evaluates an array and views it, without a copy."""
    return np.asarray(array)


def _rotate(heads: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Rotates the pairs (i, i + head_dim / 2) of [T, heads, head_dim]; cos and sin are [T, 1, head_dim / 2]."""
    first, second = mx.split(heads, 2, axis=-1)
    return mx.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _stored(rows: mx.array, kv_dtype: str) -> mx.array:
    """Rounds to the K/V dtype; bf16 comes as uint16."""
    rounded = rows.astype(_KV_TYPES[kv_dtype])
    return rounded.view(mx.uint16) if kv_dtype == "bf16" else rounded


def _silu_times(gate: FloatArray, up: FloatArray) -> FloatArray:
    """silu(gate) * up, in place in `gate`."""
    with np.errstate(over="ignore"):  # exp overflows to inf below -88, where silu is 0
        weight = np.exp(-gate)
    weight += 1.0
    gate /= weight
    gate *= up
    return gate


def _route(moe: _Moe, rows: FloatArray) -> tuple[npt.NDArray[np.int64], FloatArray]:
    """expert_ids and topk_weights, [T, num_experts_per_tok], by falling weight; of equals the lowest id first."""
    weights = _host(mx.softmax(mx.array(moe.router(rows)), axis=-1, precise=True))
    expert_ids = np.argsort(-weights, axis=1, kind="stable")[:, : moe.shape.num_experts_per_tok]
    topk_weights = np.take_along_axis(weights, expert_ids, axis=1)
    if moe.shape.norm_topk_prob:
        total = topk_weights[:, 0].copy()
        for slot in range(1, moe.shape.num_experts_per_tok):
            total += topk_weights[:, slot]
        topk_weights /= total[:, None]
    return expert_ids, topk_weights
