"""The `cuda` backend behind `Ops`: the model's calls are recorded, and a step is two kernels, one that computes and one that commits.

The whole forward pass is one persistent kernel (kernels/step.cuh), because a launch costs more than a small step's stages do.
Nothing here imports CUDA before a GPU is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from services.decoder.batch import Batch
from services.decoder.errors import CheckpointError, EngineFailedError
from services.decoder.kv_view import KvView
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
from services.decoder.ops.cuda import source, table, weights
from services.decoder.ops.cuda.driver import CudaDriver
from services.decoder.ops.cuda.weights import CudaAttention, CudaHead, CudaLinear, CudaMoe
from services.decoder.sampler import Sampled, sample_rows

_Kernel = Callable[..., list[mx.array]]


class DevicePool(KvView, Protocol):
    """A K/V view whose bytes are in the memory of this process's GPU."""

    device_address: int  # of block 0


@dataclass(eq=False)
class CudaStep:
    """One step: its batch, and the model's calls so far."""

    batch: Batch
    pool: DevicePool
    calls: list[Any] = field(default_factory=list)
    launched: bool = False


@dataclass(eq=False)
class _Compiled:
    """Kernels and memory for one model."""

    geometry: source.Geometry
    small: _Kernel
    large: _Kernel
    commit: _Kernel
    rows: _Kernel
    buffers: table.Buffers
    table: mx.array
    keep: list[mx.array]  # what the table points to
    done: mx.array  # the last launch's; an input of the next, so that MLX keeps their order
    launches: int = 0


class CudaOps:
    """See `Ops`. Takes Qwen3-MoE's structure, bf16 K/V, and 4- or 8-bit or bf16 weights; refuses the rest when it loads."""

    backend = "cuda"
    batch_invariant = True

    def __init__(self, device: int = 0) -> None:
        self._driver = CudaDriver(device)
        self._compiled: _Compiled | None = None
        self._program: tuple[Any, ...] = ()

    @property
    def numerics_id(self) -> str:
        """See `Ops`."""
        return f"cuda-bf16-sm90-{source.kernel_revision()}"

    def load_embedding(self, table: LinearTensors) -> CudaLinear:
        """See `Ops`."""
        return weights.load_linear(table)

    def load_attention(self, tensors: AttentionTensors, shape: AttentionShape) -> CudaAttention:
        """See `Ops`."""
        return weights.load_attention(tensors, shape)

    def load_mlp(self, tensors: MlpTensors, rms_norm_eps: float) -> Handle:
        """Refused: this backend has no dense layers yet."""
        raise weights.refusal(tensors.gate_proj.weight, "a layer is dense")

    def load_moe(self, tensors: MoeTensors, shape: MoeShape, rms_norm_eps: float) -> CudaMoe:
        """See `Ops`."""
        return weights.load_moe(tensors, shape, rms_norm_eps)

    def load_head(self, norm: Tensor, head: LinearTensors, rms_norm_eps: float) -> CudaHead:
        """See `Ops`."""
        return CudaHead(weights.load_linear(head), weights.load_vector(norm), head.weight.shape[0], rms_norm_eps)

    def begin_step(self, batch: Batch, kv: KvView) -> CudaStep:
        """See `Ops`; the pool must be in GPU memory."""
        if not hasattr(kv, "device_address"):
            raise EngineFailedError(
                "the cuda backend needs a pool in GPU memory; start the manager with --pool-memory cuda"
            )
        if kv.kv_dtype != "bf16":
            raise EngineFailedError(
                f"--kv-dtype: the cuda backend takes bf16 K/V, not {kv.kv_dtype}; use --backend mlx"
            )
        if kv.shape.layout != "hnd":
            raise EngineFailedError(
                f"--kv-layout: the cuda backend takes hnd, not {kv.shape.layout}; use --backend mlx"
            )
        return CudaStep(batch, cast(DevicePool, kv))

    def embed(self, embedding: CudaLinear, step: CudaStep) -> CudaStep:
        """Recorded."""
        step.calls.append(embedding)
        return step

    def norm_qkv_rope(
        self, attention: CudaAttention, hidden: CudaStep, step: CudaStep
    ) -> tuple[CudaStep, CudaStep, CudaStep]:
        """Recorded."""
        step.calls.append(attention)
        return step, step, step

    def attention(
        self, attention: CudaAttention, layer: int, q: Handle, k: Handle, v: Handle, step: CudaStep
    ) -> CudaStep:
        """Part of the recorded layer."""
        return step

    def out_proj_residual(self, attention: CudaAttention, attended: CudaStep, hidden: Handle) -> CudaStep:
        """Part of the recorded layer."""
        return attended

    def dense_mlp(self, mlp: Handle, hidden: Handle) -> Handle:
        """Never called: `load_mlp` refuses."""
        raise NotImplementedError

    def moe(self, moe: CudaMoe, hidden: CudaStep) -> CudaStep:
        """Recorded."""
        hidden.calls.append(moe)
        return hidden

    def head_and_sample(self, head: CudaHead, hidden: CudaStep, step: CudaStep) -> Sampled:
        """See `Ops`: runs the recorded step. Rows with filters, penalties or reports are drawn on the host."""
        compiled = self._launch(head, step)
        count = len(step.batch.sample_rows)
        if not count:
            return Sampled(np.empty(0, np.int32), [], [])
        mx.eval(compiled.done)
        token_ids = compiled.buffers.results[1 : 1 + count].copy()
        if (token_ids < 0).any():
            raise EngineFailedError(f"the model's logits are not finite in sample row {int(np.argmin(token_ids))}")
        logprobs: list[float | None] = [None] * count
        top: list[Any] = [()] * count
        others = [index for index, row in enumerate(step.batch.sampling) if not table.on_device(row)]
        if others:
            sampled = sample_rows(
                self._logits(compiled, count)[others], [step.batch.sampling[index] for index in others]
            )
            for at, index in enumerate(others):
                token_ids[index] = sampled.token_ids[at]
                logprobs[index], top[index] = sampled.logprobs[at], sampled.top[at]
        return Sampled(token_ids, logprobs, top)

    def logits(self, head: CudaHead, hidden: CudaStep, step: CudaStep) -> npt.NDArray[np.float32]:
        """See `Ops`."""
        compiled = self._launch(head, step)
        return self._logits(compiled, len(step.batch.sample_rows))

    def commit(self, step: CudaStep) -> None:
        """See `Ops`; returns when the rows are in the pool, because what follows may give blocks away."""
        compiled = self._compiled
        if compiled is None or not step.launched:
            raise EngineFailedError("a step was committed before it ran")
        (compiled.done,) = compiled.commit(**self._call(compiled, (1,), mx.int32))
        mx.eval(compiled.done)

    def scratch(self, name: str) -> npt.NDArray[Any]:
        """A copy of one of the kernels' buffers after the last step, for tests and benchmarks."""
        compiled = self._compiled
        if compiled is None:
            raise EngineFailedError("no step has run")
        mx.eval(compiled.done)
        # A copy: an array that the host looks into moves, and the kernels know it by its address.
        return np.array(mx.contiguous(compiled.buffers.arrays[name] * 1))

    def _call(self, compiled: _Compiled, shape: tuple[int, ...], dtype: mx.Dtype) -> dict[str, Any]:
        threads = source.THREADS_PER_BLOCK
        return {
            "inputs": [compiled.table, compiled.done],
            "output_shapes": [shape],
            "output_dtypes": [dtype],
            "grid": (self._driver.multiprocessors * threads, 1, 1),
            "threadgroup": (threads, 1, 1),
        }

    def _logits(self, compiled: _Compiled, count: int) -> npt.NDArray[np.float32]:
        shape = (count, compiled.geometry.vocab_size)
        return np.array(compiled.rows(**self._call(compiled, shape, mx.float32))[0])

    def _launch(self, head: CudaHead, step: CudaStep) -> _Compiled:
        compiled = self._prepared(head, step)
        buffers = compiled.buffers
        shape = step.pool.shape
        count = table.fill_step(
            buffers.words, step.batch, step.pool.device_address, shape.stride_bytes, shape.block_size
        )
        # The slot's last reader, the step before the last, is over: its commit was waited for.
        slot = buffers.step_address + compiled.launches % 2 * buffers.capacity.words * 4
        self._driver.copy_to_device(slot, buffers.words[:count])
        kernel = compiled.small if step.batch.num_tokens <= source.SMALL_ROWS else compiled.large
        (compiled.done,) = kernel(**self._call(compiled, (1,), mx.int32))
        compiled.launches += 1
        step.launched = True
        mx.async_eval(compiled.done)  # type: ignore[no-untyped-call]
        return compiled

    def _prepared(self, head: CudaHead, step: CudaStep) -> _Compiled:
        program = (*step.calls, head)
        wanted = table.needed(step.batch)
        compiled = self._compiled
        # Weights compare by identity.
        if compiled is not None and program == self._program and compiled.buffers.capacity.holds(wanted):
            return compiled
        if compiled is not None:
            mx.eval(compiled.done)  # nothing in flight reads the old buffers
            wanted = compiled.buffers.capacity.joined(wanted)
        self._compiled = self._compile(program, wanted)
        self._program = program
        return self._compiled

    def _compile(self, program: tuple[Any, ...], wanted: table.Capacity) -> _Compiled:
        embedding, *calls, head = program
        layers = tuple(zip(calls[::2], calls[1::2], strict=True))
        geometry = geometry_of(embedding, layers, head)
        capacity = table.Capacity(
            _round_up(wanted.rows, 32),
            _round_up(wanted.sample_rows, 32),
            _round_up(wanted.splits, 8),
            _round_up(wanted.words, 4096),
        )
        buffers = table.make_buffers(self._driver, geometry, capacity)
        shape: AttentionShape = layers[0][0].shape
        inv_freq = mx.array(shape.rope_inv_freq.astype(np.float32)) * mx.array(1.0)
        addresses, keep = table.make_table(buffers, embedding, layers, head, inv_freq)
        small, large, commit, rows = _kernels(geometry, self._driver.max_shared_bytes)
        done = mx.zeros((1,), mx.int32)
        return _Compiled(geometry, small, large, commit, rows, buffers, addresses, [*keep, inv_freq], done)


def geometry_of(embedding: CudaLinear, layers: table.Layers, head: CudaHead) -> source.Geometry:
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


def _kernels(geometry: source.Geometry, shared_bytes: int) -> tuple[_Kernel, _Kernel, _Kernel, _Kernel]:
    header = source.header(geometry)

    def build(name: str, body: str, shared: int) -> Any:
        return mx.fast.cuda_kernel(
            name=f"leasehold_{name}",
            input_names=["table", "previous"],
            output_names=["done"],
            source=body,
            header=header,
            ensure_row_contiguous=False,
            shared_memory=shared,
        )

    wanted = source.shared_bytes(geometry)
    if wanted > shared_bytes:
        raise EngineFailedError(
            f"the cuda backend needs {wanted} bytes of shared memory a block; this GPU has {shared_bytes}"
        )
    return (
        build("small_step", source.SMALL_BODY, wanted),
        build("large_step", source.LARGE_BODY, wanted),
        build("commit", source.COMMIT_BODY, 0),
        build("rows", source.ROWS_BODY, 0),
    )


def _round_up(value: int, to: int) -> int:
    return max(to, -(-value // to) * to)
