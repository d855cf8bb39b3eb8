"""The interface between a model, written once, and the backend that computes it.

The ops are coarse, so that a backend can fuse. A hidden state, `q`, `k`, `v` and every weight handle are opaque to the model and to
the engine: each backend has its own. Shapes in comments are what they stand for. T is the number of tokens in the step.

A result for a row must not depend on how many rows there are, nor on block size, chunk start, batch or thread count: that is what
makes a stream go on token-exact after a crash. A backend that cannot promise it says so in `batch_invariant`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from services.decoder.batch import Batch
from services.decoder.kv_view import KvView
from services.decoder.sampler import Sampled

Handle = Any  # a backend's own array or weight
IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]


class Tensor(Protocol):
    """One tensor of a checkpoint, memory-mapped and not yet read."""

    @property
    def name(self) -> str:
        """As in the checkpoint."""
        ...

    @property
    def dtype(self) -> str:
        """safetensors' name: "F32", "F16", "BF16" or "U32"."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        ...

    def numpy(self) -> npt.NDArray[Any]:
        """A read-only view of the mapped bytes, without a copy; BF16 comes as uint16."""
        ...


@dataclass(frozen=True)
class LinearTensors:
    """A linear layer `[..., out_features, in_features]` as the checkpoint has it; a stack of experts has a leading axis.

    Quantised (MLX's affine format: w = scale * q + bias for each group of `group_size` inputs, q packed little-endian
    into uint32) when `scales` is there, and then `bits` and `group_size` hold.
    """

    weight: Tensor
    scales: Tensor | None = None
    biases: Tensor | None = None  # of the quantisation groups
    bits: int = 0
    group_size: int = 0
    bias: Tensor | None = None  # added to the output, [out_features]


# Experts come stacked in one tensor, or as one linear layer each.
ExpertTensors = LinearTensors | tuple[LinearTensors, ...]


@dataclass(frozen=True)
class AttentionTensors:
    """Everything between a layer's input and its residual after attention."""

    input_norm: Tensor  # [hidden]
    q_proj: LinearTensors
    k_proj: LinearTensors
    v_proj: LinearTensors
    o_proj: LinearTensors
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None  # [head_dim]


@dataclass(frozen=True)
class MlpTensors:
    """A dense gated MLP with the norm before it."""

    norm: Tensor
    gate_proj: LinearTensors
    up_proj: LinearTensors
    down_proj: LinearTensors


@dataclass(frozen=True)
class MoeTensors:
    """A mixture of gated MLPs with the norm and the router before it."""

    norm: Tensor
    router: LinearTensors
    gate_proj: ExpertTensors
    up_proj: ExpertTensors
    down_proj: ExpertTensors


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of attention, and its positional encoding (rotary, the two halves of a head as pairs)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    # Inverse frequencies [head_dim / 2], already scaled where the config scales them; cos and sin are multiplied by rope_attention_factor.
    rope_inv_freq: npt.NDArray[np.float32]
    rope_attention_factor: float
    window_tokens: int  # 0: the whole context

    @property
    def scale(self) -> float:
        """What scores are multiplied by: head_dim ** -0.5."""
        return float(self.head_dim**-0.5)


@dataclass(frozen=True)
class MoeShape:
    """Routing: softmax over all experts, the best num_experts_per_tok, renormalised when norm_topk_prob."""

    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool


class Ops(Protocol):
    """A backend. One instance serves one engine, on one thread: load and step on the same one."""

    @property
    def backend(self) -> str:
        """Its name on the command line."""
        ...

    @property
    def numerics_id(self) -> str:
        """Names the bits it computes: backend, precision, instruction set where bits differ, kernel revision."""
        ...

    @property
    def batch_invariant(self) -> bool:
        """Whether the bits of a row are independent of the rest of the batch."""
        ...

    # Loading: turns checkpoint tensors into handles, once.
    def load_embedding(self, table: LinearTensors) -> Handle: ...
    def load_attention(self, tensors: AttentionTensors, shape: AttentionShape) -> Handle: ...
    def load_mlp(self, tensors: MlpTensors, rms_norm_eps: float) -> Handle: ...
    def load_moe(self, tensors: MoeTensors, shape: MoeShape, rms_norm_eps: float) -> Handle: ...
    def load_head(self, norm: Tensor, head: LinearTensors, rms_norm_eps: float) -> Handle: ...

    # One step. The forward pass only reads the pool; the step's own K/V rows reach it in `commit`.
    def begin_step(self, batch: Batch, kv: KvView) -> Handle:
        """Takes over a batch whose arrays stay unchanged until `commit`; returns the step that the other ops are given."""
        ...

    def embed(self, embedding: Handle, step: Handle) -> Handle:
        """Hidden state [T, hidden] of the step's token ids."""
        ...

    def norm_qkv_rope(self, attention: Handle, hidden: Handle, step: Handle) -> tuple[Handle, Handle, Handle]:
        """q [T, num_heads, head_dim], and k, v [T, num_kv_heads, head_dim] rounded to the K/V dtype of the step's pool."""
        ...

    def attention(self, attention: Handle, layer: int, q: Handle, k: Handle, v: Handle, step: Handle) -> Handle:
        """Causal attention [T, num_heads * head_dim] of the whole mixed batch, over the pool and the step's own rows.

        `layer` counts the layers of the pool. k and v are kept for `commit`.
        """
        ...

    def out_proj_residual(self, attention: Handle, attended: Handle, hidden: Handle) -> Handle:
        """hidden + o_proj(attended), [T, hidden]."""
        ...

    def dense_mlp(self, mlp: Handle, hidden: Handle) -> Handle:
        """hidden + down(silu(gate(norm(hidden))) * up(norm(hidden))), [T, hidden]."""
        ...

    def moe(self, moe: Handle, hidden: Handle) -> Handle:
        """hidden + the weighted sum, in a fixed order, of each row's experts, [T, hidden]."""
        ...

    def head_and_sample(self, head: Handle, hidden: Handle, step: Handle) -> Sampled:
        """Samples a token for each of the batch's `sample_rows`; logits are computed for those rows only."""
        ...

    def logits(self, head: Handle, hidden: Handle, step: Handle) -> npt.NDArray[np.float32]:
        """Logits [num_sample_rows, vocab_size] in float32, for tests and tools; the engine never asks for them."""
        ...

    def commit(self, step: Handle) -> None:
        """Writes the step's K/V rows of all layers into the slots of its batch. After it the step is over."""
        ...
