"""The plain kernels: float32 activations, any sizes, dense layers and biases; for float32 checkpoints and what the fast ones refuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from protos.pool_format import LAYOUTS
from services.decoder.ops.base import (
    AttentionShape,
    AttentionTensors,
    ExpertTensors,
    LinearTensors,
    MlpTensors,
    MoeShape,
    MoeTensors,
    Tensor,
)
from services.decoder.ops.cuda import source, weights
from services.decoder.ops.cuda.driver import CudaDriver
from services.decoder.ops.cuda.table import (
    KV_KINDS,
    Buffers,
    Built,
    Capacity,
    addresses,
    compile_kernel,
    make_arrays,
)
from services.decoder.ops.cuda.weights import Attention, Head, load_vector, on_device, refusal

_KINDS = {"F32": 32, "BF16": 16, "F16": 17}  # KIND_* in plain.cuh
_GROUP_SIZES = (32, 64, 128)
_MAX_HEAD_DIM = 256  # 32 * PLAIN_DIMS in plain_attention.cuh
_SHARED_BYTES = 1024  # SampleShared, rounded up


@dataclass(frozen=True, eq=False)
class PlainLinear:
    """One layer, or a stack of them: weights as the checkpoint has them, scales with biases as float32 pairs."""

    weight: mx.array
    groups: mx.array | None
    bias: mx.array | None
    kind: int
    group_size: int

    def words(self) -> list[mx.array | int | None]:
        """Its entries in the table."""
        return [self.weight, self.groups, self.bias, self.kind, self.group_size]


_NONE: list[mx.array | int | None] = [None] * 5  # in the place of a layer that is not there


PlainAttention = Attention[PlainLinear]
PlainHead = Head[PlainLinear]


@dataclass(frozen=True, eq=False)
class PlainMlp:
    """A dense layer, or a mixture: then with a router and its shape."""

    gate: PlainLinear
    up: PlainLinear
    down: PlainLinear
    norm: mx.array
    width: int
    router: PlainLinear | None = None
    shape: MoeShape | None = None


class PlainKernels:
    """See `ops.KernelSet`."""

    name = "f32"
    kv_dtypes: tuple[str, ...] = tuple(KV_KINDS)
    kv_layouts: tuple[str, ...] = LAYOUTS
    revision = source.kernel_revision(source.PLAIN_FILES)

    def load_embedding(self, table: LinearTensors) -> PlainLinear:
        """See `Ops`."""
        return load_linear(table)

    def load_attention(self, tensors: AttentionTensors, shape: AttentionShape) -> PlainAttention:
        """See `Ops`."""
        if shape.head_dim % 8 or shape.head_dim > _MAX_HEAD_DIM:
            why = f"head_dim is {shape.head_dim}, not a multiple of 8 up to {_MAX_HEAD_DIM}"
            raise refusal(tensors.q_proj.weight, why)
        return weights.load_attention(tensors, shape, load_linear)

    def load_mlp(self, tensors: MlpTensors, rms_norm_eps: float) -> PlainMlp:
        """See `Ops`."""
        gate, up, down = (load_linear(part) for part in (tensors.gate_proj, tensors.up_proj, tensors.down_proj))
        return PlainMlp(gate, up, down, load_vector(tensors.norm), tensors.gate_proj.weight.shape[0])

    def load_moe(self, tensors: MoeTensors, shape: MoeShape, rms_norm_eps: float) -> PlainMlp:
        """See `Ops`."""
        parts = (tensors.gate_proj, tensors.up_proj, tensors.down_proj)
        gate, up, down = (_load_experts(part) for part in parts)
        width = int(gate.weight.shape[-2])
        return PlainMlp(gate, up, down, load_vector(tensors.norm), width, load_linear(tensors.router), shape)

    def load_head(self, norm: Tensor, head: LinearTensors, rms_norm_eps: float) -> PlainHead:
        """See `Ops`."""
        return weights.load_head(norm, head, rms_norm_eps, load_linear)

    def check(self, program: tuple[Any, ...]) -> None:
        """Nothing is left to check: each layer was when it was loaded."""

    def build(self, driver: CudaDriver, program: tuple[Any, ...], capacity: Capacity) -> Built:
        """Kernels, buffers and the table for one model."""
        embedding, *calls, head = program
        layers: list[tuple[PlainAttention, PlainMlp]] = list(zip(calls[::2], calls[1::2], strict=True))
        sizes = _Sizes.of(layers, head)
        buffers = make_arrays(driver, capacity, sizes.arrays(capacity))
        shape = layers[0][0].shape
        inv_freq = mx.array(shape.rope_inv_freq.astype(np.float32)) * mx.array(1.0)
        order = _table_order(buffers, embedding, layers, head, sizes, inv_freq)
        table, keep = _make_table(order)
        step = compile_kernel("plain_step", source.PLAIN_BODY, source.plain_header(), _SHARED_BYTES)
        return Built(
            vocab_size=head.vocab_size,
            small=step,
            large=step,
            commit=compile_kernel("plain_commit", source.PLAIN_COMMIT_BODY, source.plain_header(), 0),
            rows=compile_kernel("plain_rows", source.PLAIN_ROWS_BODY, source.plain_header(), 0),
            buffers=buffers,
            table=table,
            keep=[*keep, inv_freq],
        )


@dataclass(frozen=True)
class _Sizes:
    """The sizes of a model that buffers depend on; widths and experts are the most of any layer."""

    num_layers: int
    hidden: int
    shape: AttentionShape
    vocab: int
    experts: int
    topk: int
    norm_topk: bool
    eps: float
    act: int  # elements of activations a row

    @classmethod
    def of(cls, layers: list[tuple[PlainAttention, PlainMlp]], head: PlainHead) -> _Sizes:
        """Of a loaded model; all mixtures have one shape, because the config has one."""
        moe = next((mlp.shape for _, mlp in layers if mlp.shape is not None), MoeShape(1, 1, True))
        act = max(mlp.width * (1 if mlp.shape is None else moe.num_experts_per_tok) for _, mlp in layers)
        attention = layers[0][0]
        return cls(
            num_layers=len(layers),
            hidden=int(attention.input_norm.size),
            shape=attention.shape,
            vocab=head.vocab_size,
            experts=moe.num_experts,
            topk=moe.num_experts_per_tok,
            norm_topk=moe.norm_topk_prob,
            eps=head.rms_norm_eps,
            act=act,
        )

    def arrays(self, capacity: Capacity) -> dict[str, tuple[int, mx.Dtype]]:
        """Elements of each buffer, and their type."""
        rows, samples = capacity.rows, capacity.sample_rows
        q_size = self.shape.num_heads * self.shape.head_dim
        kv_size = self.shape.num_kv_heads * self.shape.head_dim
        part = self.shape.num_heads * capacity.splits * (self.shape.head_dim + 2)
        return {
            "hidden": (rows * self.hidden, mx.float32),
            "normed": (max(rows, samples) * self.hidden, mx.float32),
            "qkv": (rows * (q_size + 2 * kv_size), mx.float32),
            "q": (rows * q_size, mx.float32),
            "kv": (self.num_layers * rows * 2 * kv_size, mx.float32),
            "attended": (rows * q_size, mx.float32),
            "parts": (min(rows, source.SMALL_ROWS) * part, mx.float32),
            "router": (rows * self.experts, mx.float32),
            "act": (rows * self.act, mx.float32),
            "wide": (rows * self.topk * self.hidden, mx.float32),
            "groups": (2 * rows * self.topk + 4 * self.experts + 2, mx.int32),
            "topk_weights": (rows * self.topk, mx.float32),
            "logits": (samples * self.vocab, mx.float32),
        }


def load_linear(tensors: LinearTensors) -> PlainLinear:
    """A layer of its own."""
    return _load((tensors,), stacked=False)


def _load_experts(tensors: ExpertTensors) -> PlainLinear:
    return _load(tensors, stacked=True) if isinstance(tensors, tuple) else _load((tensors,), stacked=False)


def _load(layers: tuple[LinearTensors, ...], *, stacked: bool) -> PlainLinear:
    first = layers[0]
    if any(
        (one.bits, one.group_size, one.weight.dtype) != (first.bits, first.group_size, first.weight.dtype)
        for one in layers
    ):
        raise refusal(first.weight, "experts of one layer differ in dtype or quantisation")

    def joined(name: str) -> mx.array:
        arrays = [on_device(getattr(one, name)) for one in layers]
        return mx.stack(arrays) if stacked else arrays[0]

    quantised = first.scales is not None and first.biases is not None
    if quantised and (first.bits not in (4, 8) or first.group_size not in _GROUP_SIZES):
        raise refusal(first.weight, f"weights have {first.bits} bits in groups of {first.group_size}")
    inputs = first.weight.shape[-1] * (32 // first.bits if quantised else 1)
    if inputs % 8:
        raise refusal(first.weight, f"its {inputs} inputs are not a multiple of 8")
    weight, groups = _owned(joined("weight")), None
    if quantised:
        pairs = [joined(name).astype(mx.float32) for name in ("scales", "biases")]
        groups = mx.contiguous(mx.stack(pairs, axis=-1))
        mx.eval(groups)
    kind = first.bits if quantised else _KINDS[first.weight.dtype]
    return PlainLinear(weight, groups, None if first.bias is None else load_vector(first.bias), kind, first.group_size)


def _owned(array: mx.array) -> mx.array:
    """The same bits in memory of the GPU alone: what the host wrote is in memory shared with it."""
    words = array if array.dtype == mx.uint32 else array.view(mx.uint32 if array.itemsize == 4 else mx.uint16)
    owned = words + mx.array(0, words.dtype)
    mx.eval(owned)
    return owned


def _table_order(
    buffers: Buffers,
    embedding: PlainLinear,
    layers: list[tuple[PlainAttention, PlainMlp]],
    head: PlainHead,
    sizes: _Sizes,
    inv_freq: mx.array,
) -> list[mx.array | int | float | None]:
    """PlainTable's entries in their order."""
    a, shape = buffers.arrays, sizes.shape
    names = ("hidden", "normed", "qkv", "q", "kv", "attended", "parts", "router", "act", "wide", "groups")
    order: list[mx.array | int | float | None] = [
        *(a["barriers"], a["launches"], a["step"], buffers.capacity.words),
        *(a[name] for name in (*names, "topk_weights", "logits")),
        *(buffers.results_address, inv_freq, head.norm),
        *(sizes.num_layers, sizes.hidden, shape.num_heads, shape.num_kv_heads, shape.head_dim, sizes.vocab),
        *(sizes.experts, sizes.topk, int(sizes.norm_topk), shape.window_tokens),
        *(float(sizes.eps), float(shape.scale), float(shape.rope_attention_factor)),
        *embedding.words(),
        *head.linear.words(),
    ]
    for attention, mlp in layers:
        for linear in (attention.q, attention.k, attention.v, attention.o):
            order += linear.words()
        order += _NONE if mlp.router is None else mlp.router.words()
        for linear in (mlp.gate, mlp.up, mlp.down):
            order += linear.words()
        order += [attention.input_norm, mlp.norm, attention.q_norm, attention.k_norm]
        order += [int(mlp.shape is not None), mlp.width]
    return order


def _make_table(order: list[mx.array | int | float | None]) -> tuple[mx.array, list[mx.array]]:
    arrays = [entry for entry in order if isinstance(entry, mx.array)]
    found = iter(addresses(list(arrays)))
    words = np.zeros(len(order), np.uint64)
    for index, entry in enumerate(order):
        if isinstance(entry, float):
            words[index] = np.float64(entry).view(np.uint64)
        else:
            words[index] = next(found) if isinstance(entry, mx.array) else entry or 0
    table = mx.array(words) + mx.array(0, mx.uint64)
    mx.eval(table)
    return table, arrays
