"""The demo model's forward pass in PyTorch, for training, and its MLX affine quantisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """The geometry of the network."""

    vocab_size: int = 768
    num_layers: int = 4
    hidden_size: int = 256
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    num_experts: int = 8
    num_experts_per_tok: int = 2
    expert_size: int = 256
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6


@dataclass(frozen=True)
class Quantisation:
    """How the weights are rounded: experts to `expert_bits`, every other matrix to 8 bits."""

    group_size: int = 64
    expert_bits: int = 4

    def bits(self, name: str) -> int:
        """The bits of the weight `name`, 0 for a norm, which stays as it is."""
        if name.endswith("norm.weight"):
            return 0
        return self.expert_bits if ".switch_mlp." in name else 8


def init_weights(shape: Shape, seed: int) -> Weights:
    """Float32 weights under their checkpoint names, drawn with `seed`."""
    generator = torch.Generator().manual_seed(seed)
    hidden, kv = shape.hidden_size, shape.num_kv_heads * shape.head_dim
    weights: Weights = {}

    def matrix(name: str, *size: int, std: float = 0.02) -> None:
        weights[name] = torch.randn(*size, generator=generator) * std

    residual_std = 0.02 / (2 * shape.num_layers) ** 0.5
    experts, inner = shape.num_experts, shape.expert_size
    matrix("model.embed_tokens.weight", shape.vocab_size, hidden)
    for i in range(shape.num_layers):
        layer, attn = f"model.layers.{i}", f"model.layers.{i}.self_attn"
        matrix(f"{attn}.q_proj.weight", shape.num_heads * shape.head_dim, hidden)
        matrix(f"{attn}.k_proj.weight", kv, hidden)
        matrix(f"{attn}.v_proj.weight", kv, hidden)
        matrix(f"{attn}.o_proj.weight", hidden, shape.num_heads * shape.head_dim, std=residual_std)
        matrix(f"{layer}.mlp.gate.weight", experts, hidden)
        matrix(f"{layer}.mlp.switch_mlp.gate_proj.weight", experts, inner, hidden)
        matrix(f"{layer}.mlp.switch_mlp.up_proj.weight", experts, inner, hidden)
        matrix(f"{layer}.mlp.switch_mlp.down_proj.weight", experts, hidden, inner, std=residual_std)
        for norm in ("q_norm", "k_norm"):
            weights[f"{attn}.{norm}.weight"] = torch.ones(shape.head_dim)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}.{norm}.weight"] = torch.ones(hidden)
    weights["model.norm.weight"] = torch.ones(hidden)
    return weights


def quantise(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Integers, bf16 scales and bf16 biases such that weight ~ scale * integer + bias, by group."""
    groups = weight.detach().float().unflatten(-1, (-1, group_size))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    top = (1 << bits) - 1
    scales = ((high - low) / top).clamp_min(1e-7).bfloat16()
    biases = low.bfloat16()
    integers = ((groups - biases.float()) / scales.float()).round().clamp(0, top)
    return integers.flatten(-2), scales.squeeze(-1), biases.squeeze(-1)


def dequantise(integers: Tensor, scales: Tensor, biases: Tensor, group_size: int) -> Tensor:
    """The float32 weights that `quantise` stands for."""
    groups = integers.float().unflatten(-1, (-1, group_size))
    values = groups * scales.float().unsqueeze(-1) + biases.float().unsqueeze(-1)
    return values.flatten(-2)


def rounded(weights: Weights, quantisation: Quantisation) -> Weights:
    """The weights as they will be after quantisation; gradients pass straight through."""
    result: Weights = {}
    for name, weight in weights.items():
        bits = quantisation.bits(name)
        if bits:
            size = quantisation.group_size
            value = dequantise(*quantise(weight, bits, size), size)
            result[name] = weight + (value - weight).detach()
        else:
            result[name] = weight
    return result


def pack(integers: Tensor, bits: int) -> Tensor:
    """Integers of `bits` bits in little-endian order in uint32 words, along the last axis."""
    per_word = 32 // bits
    words = integers.to(torch.int64).unflatten(-1, (-1, per_word))
    shifts = torch.arange(per_word, device=integers.device) * bits
    return (words << shifts).sum(-1).to(torch.uint32)


def unpack(words: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`."""
    shifts = torch.arange(32 // bits, device=words.device) * bits
    values = (words.to(torch.int64).unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return values.flatten(-2)


class Network:
    """The forward pass over rows of ids, with weights given at each call."""

    def __init__(self, shape: Shape, compile_parts: bool = False) -> None:
        """Optionally compile the parts that see tokens one by one, whatever the rows' length."""
        self.shape = shape
        wrap: Callable[..., Any] = torch.compile if compile_parts else _identity
        self._qkv = wrap(self._qkv_part)
        self._moe = wrap(self._moe_part)
        self._rope: dict[tuple[int, int, torch.dtype], tuple[Tensor, Tensor]] = {}

    def hidden(self, weights: Weights, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Final hidden states, one row a token, and the mean load-balancing loss."""
        shape = self.shape
        rows, length = ids.shape
        x = F.embedding(ids.reshape(-1), weights["model.embed_tokens.weight"])
        cos, sin = self._rope_tables(rows, length, x)
        balance = x.new_zeros((), dtype=torch.float32)
        for i in range(shape.num_layers):
            layer, attn = f"model.layers.{i}", f"model.layers.{i}.self_attn"
            norm = weights[f"{layer}.input_layernorm.weight"]
            names = ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm")
            parts = self._qkv(x, norm, cos, sin, *(weights[f"{attn}.{n}.weight"] for n in names))
            q, k, v = (p.view(rows, length, -1, shape.head_dim).transpose(1, 2) for p in parts)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            mixed = mixed.transpose(1, 2).reshape(rows * length, -1)
            x = x + F.linear(mixed, weights[f"{attn}.o_proj.weight"])
            norm = weights[f"{layer}.post_attention_layernorm.weight"]
            switch = f"{layer}.mlp.switch_mlp"
            experts = [weights[f"{switch}.{n}_proj.weight"] for n in ("gate", "up", "down")]
            x, loss = self._moe(x, norm, weights[f"{layer}.mlp.gate.weight"], *experts)
            balance = balance + loss / shape.num_layers
        return self._norm(x, weights["model.norm.weight"]), balance

    def logits(self, weights: Weights, ids: Tensor) -> Tensor:
        """Logits of every position, rows by length by vocabulary."""
        hidden, _ = self.hidden(weights, ids)
        return F.linear(hidden, weights["model.embed_tokens.weight"]).view(*ids.shape, -1)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.shape.norm_eps)

    def _rope_tables(self, rows: int, length: int, x: Tensor) -> tuple[Tensor, Tensor]:
        key = (rows, length, x.dtype)
        if key not in self._rope:
            half = self.shape.head_dim // 2
            exponents = torch.arange(half, device=x.device, dtype=torch.float32) / half
            positions = torch.arange(length, device=x.device, dtype=torch.float32)
            angles = positions[:, None] * self.shape.rope_theta**-exponents
            angles = angles.repeat(rows, 1)[:, None, :]
            self._rope[key] = (angles.cos().to(x.dtype), angles.sin().to(x.dtype))
        return self._rope[key]

    def _qkv_part(
        self,
        x: Tensor,
        norm: Tensor,
        cos: Tensor,
        sin: Tensor,
        q_proj: Tensor,
        k_proj: Tensor,
        v_proj: Tensor,
        q_norm: Tensor,
        k_norm: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = self._norm(x, norm)
        size = (-1, self.shape.head_dim)

        def rotate(y: Tensor) -> Tensor:
            a, b = y.chunk(2, dim=-1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

        q = rotate(self._norm(F.linear(x, q_proj).unflatten(-1, size), q_norm))
        k = rotate(self._norm(F.linear(x, k_proj).unflatten(-1, size), k_norm))
        return q, k, F.linear(x, v_proj)

    def _moe_part(
        self, x: Tensor, norm: Tensor, router: Tensor, gate: Tensor, up: Tensor, down: Tensor
    ) -> tuple[Tensor, Tensor]:
        # All experts on every token: at this size three large products beat any dispatch.
        experts, inner, hidden = gate.shape
        normed = self._norm(x, norm)
        probabilities = F.linear(normed, router).float().softmax(-1)
        top = probabilities.topk(self.shape.num_experts_per_tok, dim=-1).values
        chosen = probabilities >= top[:, -1:]
        shares = torch.where(chosen, probabilities, 0.0) / top.sum(-1, keepdim=True)
        load = chosen.float().mean(0) / self.shape.num_experts_per_tok
        balance = experts * (load * probabilities.mean(0)).sum()
        activation = F.silu(F.linear(normed, gate.reshape(experts * inner, hidden)))
        activation = activation * F.linear(normed, up.reshape(experts * inner, hidden))
        activation = activation.unflatten(-1, (experts, inner)) * shares.to(x.dtype).unsqueeze(-1)
        columns = down.permute(1, 0, 2).reshape(hidden, experts * inner)
        return x + F.linear(activation.flatten(1), columns), balance


def _identity(part: Callable[..., Any]) -> Callable[..., Any]:
    return part
