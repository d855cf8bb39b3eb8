"""The fast kernels: bf16 on tensor cores, a step in one persistent kernel compiled for one geometry of Qwen3-MoE."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from protos.pool_format import LAYOUTS
from services.decoder.errors import CheckpointError, EngineFailedError
from services.decoder.ops.base import (
    AttentionShape,
    AttentionTensors,
    Handle,
    LinearTensors,
    MlpTensors,
    MoeShape,
    MoeTensors,
    Tensor,
)
from services.decoder.ops.cuda import source, weights
from services.decoder.ops.cuda.driver import CudaDriver
from services.decoder.ops.cuda.table import Buffers, Built, Capacity, addresses, compile_kernel, make_arrays
from services.decoder.ops.cuda.weights import Attention, CudaLinear, CudaMoe, Head

CudaAttention = Attention[CudaLinear]
CudaHead = Head[CudaLinear]
Layers = tuple[tuple[CudaAttention, CudaMoe], ...]


class FastKernels:
    """See `ops.KernelSet`. Takes Qwen3-MoE's structure without biases, bf16 K/V, and 4- or 8-bit or bf16 weights."""

    name = "bf16"
    kv_dtypes: tuple[str, ...] = ("bf16",)
    kv_layouts: tuple[str, ...] = LAYOUTS
    revision = source.kernel_revision(source.FAST_FILES)

    def load_embedding(self, table: LinearTensors) -> CudaLinear:
        """See `Ops`."""
        return weights.load_linear(table)

    def load_attention(self, tensors: AttentionTensors, shape: AttentionShape) -> CudaAttention:
        """See `Ops`."""
        if (tensors.q_norm is None) != (tensors.k_norm is None):
            raise weights.refusal(tensors.q_proj.weight, "only one of q and k has a norm")
        return weights.load_attention(tensors, shape, weights.load_linear)

    def load_mlp(self, tensors: MlpTensors, rms_norm_eps: float) -> Handle:
        """Refused."""
        raise weights.refusal(tensors.gate_proj.weight, "a layer is dense")

    def load_moe(self, tensors: MoeTensors, shape: MoeShape, rms_norm_eps: float) -> CudaMoe:
        """See `Ops`."""
        return weights.load_moe(tensors, shape, rms_norm_eps)

    def load_head(self, norm: Tensor, head: LinearTensors, rms_norm_eps: float) -> CudaHead:
        """See `Ops`."""
        return weights.load_head(norm, head, rms_norm_eps, weights.load_linear)

    def check(self, program: tuple[Any, ...]) -> None:
        """Raises CheckpointError when the kernels do not take this geometry."""
        geometry_of(*_parts(program))

    def build(self, driver: CudaDriver, program: tuple[Any, ...], capacity: Capacity) -> Built:
        """Kernels, buffers and the table for one model."""
        embedding, layers, head = _parts(program)
        geometry = geometry_of(embedding, layers, head)
        wanted, available = source.shared_bytes(geometry), driver.max_shared_bytes
        if wanted > available:
            raise EngineFailedError(
                f"the cuda backend needs {wanted} bytes of shared memory a block; this GPU has {available}"
            )
        buffers = make_arrays(driver, capacity, _buffer_sizes(geometry, capacity))
        shape: AttentionShape = layers[0][0].shape
        inv_freq = mx.array(shape.rope_inv_freq.astype(np.float32)) * mx.array(1.0)
        table, keep = _make_table(buffers, embedding, layers, head, inv_freq)
        header = source.header(geometry)
        return Built(
            vocab_size=head.vocab_size,
            small=compile_kernel("small_step", source.SMALL_BODY, header, wanted),
            large=compile_kernel("large_step", source.LARGE_BODY, header, wanted),
            commit=compile_kernel("commit", source.COMMIT_BODY, header, 0),
            rows=compile_kernel("rows", source.ROWS_BODY, header, 0),
            buffers=buffers,
            table=table,
            keep=[*keep, inv_freq],
        )


def _parts(program: tuple[Any, ...]) -> tuple[CudaLinear, Layers, CudaHead]:
    embedding, *calls, head = program
    return embedding, tuple(zip(calls[::2], calls[1::2], strict=True)), head


def geometry_of(embedding: CudaLinear, layers: Layers, head: CudaHead) -> source.Geometry:
    """What the kernels are compiled for; a CheckpointError where they do not fit."""
    attention, moe = layers[0]
    shape = attention.shape

    def widths(linears: list[CudaLinear]) -> int:
        return sum({linear.bits for linear in linears})

    everything = [embedding, head.linear]
    for one, mixture in layers:
        everything += [one.q, one.k, one.v, one.o, mixture.router, mixture.gate_up, mixture.down]
    quantised_scales = {linear.wide_scales for linear in everything if linear.scales is not None}
    if len(quantised_scales) > 1:
        raise CheckpointError(
            "scales are bf16 in some layers and not in others, which the cuda backend does not take; use --backend mlx"
        )
    geometry = source.Geometry(
        num_layers=len(layers),
        hidden_size=int(attention.input_norm.size),
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=head.vocab_size,
        num_experts=moe.shape.num_experts,
        num_experts_per_tok=moe.shape.num_experts_per_tok,
        moe_intermediate_size=moe.width,
        norm_topk_prob=moe.shape.norm_topk_prob,
        window_tokens=shape.window_tokens,
        rms_norm_eps=shape.rms_norm_eps,
        attention_scale=shape.scale,
        rope_attention_factor=shape.rope_attention_factor,
        attention_widths=widths([part for one, _ in layers for part in (one.q, one.k, one.v, one.o)]),
        router_widths=widths([one.router for _, one in layers]),
        expert_widths=widths([part for _, one in layers for part in (one.gate_up, one.down)]),
        head_widths=head.linear.bits,
        wide_scales=quantised_scales.pop() if quantised_scales else False,
    )
    problem = geometry.problem()
    if problem:
        raise CheckpointError(f"the cuda backend does not take this model: {problem}; use --backend mlx")
    return geometry


def _buffer_sizes(g: source.Geometry, capacity: Capacity) -> dict[str, tuple[int, mx.Dtype]]:
    """Elements of each buffer, and their type."""
    rows = capacity.rows
    q_rows, kv_rows = g.num_heads * g.head_dim, g.num_kv_heads * g.head_dim
    part = 8 * g.head_dim + 16
    assignments = rows * g.num_experts_per_tok
    large = rows > 32
    return {
        "hidden": (rows * g.hidden_size, mx.float32),
        "normed": (rows * g.hidden_size, mx.bfloat16),
        "squares": (rows * g.hidden_size // 16, mx.float32),
        "qkv": (rows * (q_rows + 2 * kv_rows), mx.float32),
        "q": (rows * q_rows, mx.bfloat16),
        "kv": (g.num_layers * rows * 2 * kv_rows, mx.bfloat16),
        "attended": (rows * q_rows, mx.bfloat16),
        "parts": (min(rows, 32) * g.num_kv_heads * capacity.splits * part, mx.float32),
        "arrivals": (rows * g.num_kv_heads, mx.uint32),
        "router": (rows * g.num_experts, mx.float32),
        "act": (assignments * g.moe_intermediate_size, mx.bfloat16),
        "wide": (assignments * g.hidden_size if large else 64, mx.float32),
        "groups": (4 * assignments + 8 * g.num_experts + 1024, mx.int32),
        "topk_weights": (assignments, mx.float32),
        "inverse": (rows, mx.float32),
        "logits": (capacity.sample_rows * g.vocab_size, mx.float32),
    }


def _make_table(
    buffers: Buffers, embedding: CudaLinear, layers: Layers, head: CudaHead, inv_freq: mx.array
) -> tuple[mx.array, list[mx.array]]:
    """The table in GPU memory, and the arrays that must live as long as it."""
    a = buffers.arrays
    order: list[mx.array | int | None] = [
        *(a["barriers"], a["launches"], a["step"], buffers.capacity.words),
        *(a[name] for name in ("hidden", "normed", "squares", "qkv", "q", "kv", "attended", "parts")),
        *(a[name] for name in ("arrivals", "router", "act", "wide", "groups", "topk_weights", "logits", "inverse")),
        *(buffers.results_address, inv_freq, head.norm),
        *_linear(embedding),
        *_linear(head.linear),
    ]
    for attention, moe in layers:
        for linear in (attention.q, attention.k, attention.v, attention.o, moe.router, moe.gate_up, moe.down):
            order.extend(_linear(linear))
        order.extend((attention.input_norm, moe.norm, attention.q_norm, attention.k_norm))
    arrays = [entry for entry in order if isinstance(entry, mx.array)]
    found = iter(addresses(list(arrays)))
    words = [next(found) if isinstance(entry, mx.array) else entry or 0 for entry in order]
    table = mx.array(np.array(words, np.uint64)) + mx.array(0, mx.uint64)
    mx.eval(table)
    return table, arrays


def _linear(linear: CudaLinear) -> tuple[mx.array, mx.array | None, int]:
    return linear.tiles, linear.scales, linear.bits
