"""`Ops` over the C kernels.

The operations of a step are recorded and run in one call, when something needs their result: the GIL is released once a
step, not once an operation, so that threads that serve streams and this one do not wait for one another.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from services.decoder.batch import Batch
from services.decoder.errors import CheckpointError, EngineFailedError
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
from services.decoder.ops.native import layout
from services.decoder.ops.native.layout import AttentionLayer, HeadLayer, Matrix, MoeLayer
from services.decoder.ops.native.lib import kernels
from services.decoder.ops.native.sampling import sample
from services.decoder.ops.native.step import Hidden, NativeStep, RecordedOps
from services.decoder.ops.native.threads import available_cores
from services.decoder.ops.native.weights import Kept, Weights
from services.decoder.sampler import Sampled

KERNEL_REVISION = 3  # counts up when bits change, those of the sampler too
PRECISIONS = ("exact", "fast")


@dataclass(eq=False, slots=True)
class _Projected:
    """q, k and v of one attention: computed together with the attention that takes them."""

    hidden: Hidden


class NativeOps:
    """See `ops.base.Ops`. `exact` keeps activations in float32; `fast` quantises them to bytes where weights are quantised.

    `isa` names a set of kernels for tests; empty takes the best that this processor can run.
    """

    def __init__(self, precision: str = "fast", threads: int | None = None, isa: str = "") -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
        self._lib = kernels()
        count = available_cores() if threads is None else threads
        context = self._lib.lh_context_new(isa.encode(), count, precision == "fast")
        if not context:
            raise OSError(f"no native kernels {isa!r} on this processor, or no memory for {count} threads")
        self._context = context
        weakref.finalize(self, self._lib.lh_context_free, context)
        self.isa: str = self._lib.lh_context_isa(context).decode()
        self.num_threads = count
        # All instruction sets compute the same bits, except that plain C has no fused multiply-add.
        rounding = "plain" if self.isa == "plain" else "fma"
        self._numerics_id = f"native-{precision}-{rounding}-r{KERNEL_REVISION}"
        self._inv_freqs: dict[bytes, npt.NDArray[np.float32]] = {}
        self._hidden_size = 0
        self._spare_rows: list[npt.NDArray[np.uint8]] = []
        self._recorded: RecordedOps | None = None
        self._spare_logits: npt.NDArray[np.float32] = np.empty(0, np.float32)

    @property
    def backend(self) -> str:
        """Its name on the command line."""
        return "native"

    @property
    def numerics_id(self) -> str:
        """Precision, whether products are fused, and this file's revision."""
        return self._numerics_id

    @property
    def batch_invariant(self) -> bool:
        """Every sum runs in an order that is fixed by absolute position."""
        return True

    def load_embedding(self, table: LinearTensors) -> Weights:
        """See `Ops`."""
        kept = Kept()
        matrix = kept.matrix(table)
        self._hidden_size = matrix.cols
        return Weights(matrix, kept)

    def load_attention(self, tensors: AttentionTensors, shape: AttentionShape) -> Weights:
        """See `Ops`."""
        if shape.head_dim > layout.MAX_HEAD_DIM or shape.head_dim % 2:
            raise CheckpointError(
                f"head_dim {shape.head_dim} is odd or above the native backend's {layout.MAX_HEAD_DIM}; "
                "use --backend mlx"
            )
        kept = Kept()
        inv_freq = np.ascontiguousarray(shape.rope_inv_freq, np.float32)
        inv_freq = self._inv_freqs.setdefault(inv_freq.tobytes(), inv_freq)
        layer = AttentionLayer(
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            hidden_size=tensors.input_norm.shape[0],
            window=shape.window_tokens,
            eps=shape.rms_norm_eps,
            scale=shape.scale,
            input_norm=kept.vector(tensors.input_norm),
            q_norm=kept.vector(tensors.q_norm),
            k_norm=kept.vector(tensors.k_norm),
            rope_inv_freq=kept.address(inv_freq),
            rope_factor=shape.rope_attention_factor,
            q=kept.matrix(tensors.q_proj),
            k=kept.matrix(tensors.k_proj),
            v=kept.matrix(tensors.v_proj),
            o=kept.matrix(tensors.o_proj),
        )
        return Weights(layer, kept)

    def load_mlp(self, tensors: MlpTensors, rms_norm_eps: float) -> Weights:
        """See `Ops`. One expert, which every token takes."""
        one = MoeShape(num_experts=1, num_experts_per_tok=1, norm_topk_prob=True)
        experts = ((tensors.gate_proj,), (tensors.up_proj,), (tensors.down_proj,))
        return self._load_experts(tensors.norm, None, experts, one, rms_norm_eps)

    def load_moe(self, tensors: MoeTensors, shape: MoeShape, rms_norm_eps: float) -> Weights:
        """See `Ops`."""
        experts = (tensors.gate_proj, tensors.up_proj, tensors.down_proj)
        return self._load_experts(tensors.norm, tensors.router, experts, shape, rms_norm_eps)

    def _load_experts(
        self, norm: Tensor, router: LinearTensors | None, experts: tuple[Any, Any, Any], shape: MoeShape, eps: float
    ) -> Weights:
        kept = Kept()
        gate, up, down = (kept.matrices(part) for part in experts)
        if (gate[0].format, gate[0].group_size) != (up[0].format, up[0].group_size):
            raise CheckpointError(
                "gate_proj and up_proj of one layer are quantised differently; the native backend reads them together, "
                "use --backend mlx"
            )
        layer = MoeLayer(
            hidden_size=norm.shape[0],
            intermediate_size=gate[0].rows,
            num_experts=shape.num_experts,
            experts_per_token=shape.num_experts_per_tok,
            renormalise=shape.norm_topk_prob,
            dense=router is None,
            eps=eps,
            norm=kept.vector(norm),
            router=Matrix() if router is None else kept.matrix(router),
            gate=ctypes.addressof(gate),
            up=ctypes.addressof(up),
            down=ctypes.addressof(down),
        )
        return Weights(layer, kept)

    def load_head(self, norm: Tensor, head: LinearTensors, rms_norm_eps: float) -> Weights:
        """See `Ops`."""
        kept = Kept()
        return Weights(HeadLayer(norm=kept.vector(norm), eps=rms_norm_eps, head=kept.matrix(head)), kept)

    def begin_step(self, batch: Batch, kv: KvView) -> NativeStep:
        """See `Ops`."""
        return NativeStep(batch, kv, self._spare_rows)

    def embed(self, embedding: Weights, step: NativeStep) -> Hidden:
        """See `Ops`."""
        return step.record(layout.OP_EMBED, embedding)

    def norm_qkv_rope(
        self, attention: Weights, hidden: Hidden, step: NativeStep
    ) -> tuple[_Projected, _Projected, _Projected]:
        """See `Ops`."""
        projected = _Projected(hidden)
        return projected, projected, projected

    def attention(
        self, attention: Weights, layer: int, q: _Projected, k: _Projected, v: _Projected, step: NativeStep
    ) -> Hidden:
        """See `Ops`."""
        step.record(layout.OP_NORM_QKV_ROPE, attention, layer, after=q.hidden)
        return step.record(layout.OP_ATTENTION, attention, layer)

    def out_proj_residual(self, attention: Weights, attended: Hidden, hidden: Hidden) -> Hidden:
        """See `Ops`."""
        return attended.step.record(layout.OP_OUT_PROJ, attention, after=attended)

    def dense_mlp(self, mlp: Weights, hidden: Hidden) -> Hidden:
        """See `Ops`."""
        return self.moe(mlp, hidden)

    def moe(self, moe: Weights, hidden: Hidden) -> Hidden:
        """See `Ops`."""
        return hidden.step.record(layout.OP_MLP, moe, after=hidden)

    def head_and_sample(self, head: Weights, hidden: Hidden, step: NativeStep) -> Sampled:
        """See `Ops`."""
        size = (len(step.batch.sample_rows), head.struct.head.rows)
        if self._spare_logits.size < math.prod(size):
            # Kept, because memory that is new in every step is cleared by the kernel, page by page.
            self._spare_logits = np.empty(size, np.float32).reshape(-1)
        logits = self._spare_logits[: math.prod(size)].reshape(size)
        self._head(head, step, logits)
        return sample(self._lib, self._context, logits, step.batch.sampling)

    def logits(self, head: Weights, hidden: Hidden, step: NativeStep) -> npt.NDArray[np.float32]:
        """See `Ops`."""
        logits = np.empty((len(step.batch.sample_rows), head.struct.head.rows), np.float32)
        self._head(head, step, logits)
        return logits

    def _head(self, head: Weights, step: NativeStep, logits: npt.NDArray[np.float32]) -> None:
        self._run(step)
        rows = np.ascontiguousarray(step.batch.sample_rows, np.int32)
        if len(rows) and self._lib.lh_head_logits(
            self._context, head.struct, rows.ctypes.data, len(rows), logits.ctypes.data
        ):
            raise _out_of_memory(step)

    def hidden_rows(self, hidden: Hidden) -> npt.NDArray[np.float32]:
        """The hidden state [T, hidden] so far, for tests; ends the recording."""
        self._run(hidden.step)
        rows = np.empty((hidden.step.batch.num_tokens, self._hidden_size), np.float32)
        self._lib.lh_hidden_rows(self._context, rows.size, rows.ctypes.data)
        return rows

    def take_routing(self) -> tuple[int, int]:
        """MoE blocks computed since the last call, and the sum of the distinct experts that each read."""
        blocks, experts = ctypes.c_int64(), ctypes.c_int64()
        self._lib.lh_take_routing(self._context, blocks, experts)
        return blocks.value, experts.value

    def read_memory(self, array: npt.NDArray[Any]) -> None:
        """Reads a contiguous array with the whole team, as the measure of what a kernel could do."""
        self._lib.lh_read(self._context, array.ctypes.data, array.nbytes)

    def commit(self, step: NativeStep) -> None:
        """See `Ops`."""
        self._run(step)
        self._lib.lh_commit(self._context, step.struct)
        step.end()

    def _run(self, step: NativeStep) -> None:
        if step.has_run:
            return
        step.has_run = True
        recorded = self._recorded = step.recorded(self._recorded)
        if self._lib.lh_forward(self._context, step.struct, recorded.array, len(recorded.ops), self._hidden_size):
            raise _out_of_memory(step)


def _out_of_memory(step: NativeStep) -> EngineFailedError:
    return EngineFailedError(
        f"no memory for a step of {step.batch.num_tokens} tokens; lower --max-num-batched-tokens or --max-seqs"
    )
