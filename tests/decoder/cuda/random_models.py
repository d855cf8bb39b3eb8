"""One random layer with its embedding and head, as tensors of a checkpoint that never was: for the kernels and their twins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from services.decoder.models.qwen3_moe import Qwen3Moe, _Layer
from services.decoder.ops.base import (
    AttentionShape,
    AttentionTensors,
    LinearTensors,
    MlpTensors,
    MoeShape,
    MoeTensors,
    Ops,
)

_EPS = 1e-6
_STORED: dict[str, str] = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


@dataclass(frozen=True, eq=False)
class HostTensor:
    """A tensor in memory of the host; BF16 as uint16."""

    name: str
    dtype: str
    array: npt.NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return self.array.shape

    def numpy(self) -> npt.NDArray[Any]:
        """The array itself."""
        return self.array


@dataclass(frozen=True)
class LayerSizes:
    """Of one layer; a mixture when it has experts, else dense. `bits` 0: not quantised; `dtype` is that of vectors and scales too."""

    hidden: int = 192
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    experts: int = 5
    per_token: int = 2
    width: int = 64
    vocab: int = 203
    bits: int = 4
    router_bits: int = 8
    group_size: int = 64
    dtype: str = "bf16"
    norm_topk: bool = True
    window: int = 0
    bias: bool = False

    def __str__(self) -> str:
        kind = f"{self.bits}-bit groups of {self.group_size}" if self.bits else "unquantised"
        mlp = f"{self.per_token} of {self.experts} experts" if self.experts else "dense"
        extra = (", biases" if self.bias else "") + (f", window {self.window}" if self.window else "")
        return f"{self.hidden}, {self.heads}/{self.kv_heads}x{self.head_dim}, {mlp} x {self.width}, {kind} {self.dtype}{extra}"


class RandomLayer:
    """The tensors, and the model that a backend makes of them."""

    def __init__(self, sizes: LayerSizes, rng: np.random.Generator) -> None:
        self.sizes, self._rng = sizes, rng
        s = sizes
        q_size, kv_size = s.heads * s.head_dim, s.kv_heads * s.head_dim
        inv_freq = (1e6 ** (-np.arange(s.head_dim // 2) / (s.head_dim // 2))).astype(np.float32)
        self.shape = AttentionShape(s.heads, s.kv_heads, s.head_dim, _EPS, 1e6, inv_freq, 1.0, s.window)
        self.eps = _EPS
        self.embedding = self.linear(s.vocab, s.hidden, gain=np.sqrt(s.hidden))
        projections = [self.linear(rows, s.hidden, bias=s.bias) for rows in (q_size, kv_size, kv_size)]
        output = self.linear(s.hidden, q_size, bias=s.bias)
        self.attention = AttentionTensors(
            self.vector(s.hidden), *projections, output, self.vector(s.head_dim, 1.5), self.vector(s.head_dim, 1.5)
        )
        stack = (s.experts,) if s.experts else ()
        mlp = [
            self.linear(*size, stack=stack) for size in ((s.width, s.hidden), (s.width, s.hidden), (s.hidden, s.width))
        ]
        self.moe_shape = MoeShape(s.experts, s.per_token, s.norm_topk)
        self.mlp: MlpTensors | MoeTensors = MlpTensors(self.vector(s.hidden), *mlp)
        if s.experts:
            router = self.linear(s.experts, s.hidden, bits=s.router_bits if s.bits else 0, gain=2.0)
            self.mlp = MoeTensors(self.vector(s.hidden), router, *mlp)
        self.norm, self.head = self.vector(s.hidden), self.linear(s.vocab, s.hidden, gain=3.0)

    def model(self, ops: Ops) -> Qwen3Moe:
        """Loads it."""
        attention = ops.load_attention(self.attention, self.shape)
        if isinstance(self.mlp, MoeTensors):
            layer = _Layer(attention, ops.load_moe(self.mlp, self.moe_shape, _EPS), True)
        else:
            layer = _Layer(attention, ops.load_mlp(self.mlp, _EPS), False)
        config: Any = None  # only the loader reads it
        head = ops.load_head(self.norm, self.head, _EPS)
        return Qwen3Moe(config, ops, ops.load_embedding(self.embedding), (layer,), head)

    def linear(
        self,
        rows: int,
        inputs: int,
        *,
        stack: tuple[int, ...] = (),
        bits: int | None = None,
        gain: float = 1.0,
        bias: bool = False,
    ) -> LinearTensors:
        """Weights of about unit gain, times `gain`."""
        bits = self.sizes.bits if bits is None else bits
        added = self.vector(rows, 0.0) if bias else None
        if not bits:
            weight = gain / np.sqrt(inputs) * self._rng.standard_normal((*stack, rows, inputs))
            return LinearTensors(self._stored("weight", weight), bias=added)
        groups = (*stack, rows, inputs // self.sizes.group_size)
        words = self._rng.integers(0, 2**32, (*stack, rows, inputs * bits // 32), np.uint32)
        scales = gain / np.sqrt(inputs) * 3.4 / (2**bits - 1) * self._rng.uniform(0.5, 1.5, groups)
        biases = -scales * (2**bits - 1) / 2 * self._rng.uniform(0.9, 1.1, groups)
        parts = (HostTensor("weight", "U32", words), self._stored("scales", scales), self._stored("biases", biases))
        return LinearTensors(*parts, bits, self.sizes.group_size, added)

    def vector(self, size: int, mean: float = 1.0) -> HostTensor:
        """A norm's weight, or a bias."""
        return self._stored("vector", mean + 0.1 * self._rng.standard_normal(size))

    def _stored(self, name: str, wide: npt.NDArray[Any]) -> HostTensor:
        dtype = self.sizes.dtype
        if dtype == "bf16":
            return HostTensor(name, "BF16", to_bf16(wide))
        return HostTensor(name, _STORED[dtype], wide.astype(np.float16 if dtype == "f16" else np.float32))


def to_bf16(wide: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    """Rounded to the nearest, as bits."""
    bits = wide.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
