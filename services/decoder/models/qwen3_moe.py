"""Qwen3-MoE, written once against `Ops`; source: transformers' models/qwen3_moe/modeling_qwen3_moe.py."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.decoder.batch import Batch
from services.decoder.kv_view import KvView
from services.decoder.loader import Checkpoint
from services.decoder.model_config import ModelConfig
from services.decoder.ops.base import AttentionShape, AttentionTensors, Handle, MlpTensors, MoeShape, MoeTensors, Ops
from services.decoder.sampler import Sampled


@dataclass(frozen=True)
class _Layer:
    attention: Handle
    mlp: Handle
    is_moe: bool


class Qwen3Moe:
    """See `models.base.Model`."""

    def __init__(
        self, config: ModelConfig, ops: Ops, embedding: Handle, layers: tuple[_Layer, ...], head: Handle
    ) -> None:
        self._config = config
        self._ops = ops
        self._embedding = embedding
        self._layers = layers
        self._head = head

    @property
    def config(self) -> ModelConfig:
        """The configuration it was loaded with."""
        return self._config

    def begin(self, batch: Batch, kv: KvView) -> Handle:
        """See `Model.begin`."""
        return self._ops.begin_step(batch, kv)

    def forward(self, step: Handle) -> Sampled:
        """See `Model.forward`."""
        return self._ops.head_and_sample(self._head, self._hidden(step), step)

    def logits(self, step: Handle) -> npt.NDArray[np.float32]:
        """See `Model.logits`."""
        return self._ops.logits(self._head, self._hidden(step), step)

    def commit(self, step: Handle) -> None:
        """See `Model.commit`."""
        self._ops.commit(step)

    def _hidden(self, step: Handle) -> Handle:
        ops = self._ops
        hidden = ops.embed(self._embedding, step)
        for index, layer in enumerate(self._layers):
            q, k, v = ops.norm_qkv_rope(layer.attention, hidden, step)
            attended = ops.attention(layer.attention, index, q, k, v, step)
            hidden = ops.out_proj_residual(layer.attention, attended, hidden)
            hidden = ops.moe(layer.mlp, hidden) if layer.is_moe else ops.dense_mlp(layer.mlp, hidden)
        return hidden


def load(checkpoint: Checkpoint, config: ModelConfig, ops: Ops) -> Qwen3Moe:
    """Loads every weight of the checkpoint into the backend; each that is missing or misshapen is a CheckpointError."""
    hidden, vocab = config.hidden_size, config.vocab_size
    table = checkpoint.linear("model.embed_tokens", vocab, hidden)
    layers = tuple(_load_layer(checkpoint, config, ops, index) for index in range(config.num_hidden_layers))
    head = table if config.tie_word_embeddings else checkpoint.linear("lm_head", vocab, hidden)
    norm = checkpoint.tensor("model.norm.weight", (hidden,))
    return Qwen3Moe(config, ops, ops.load_embedding(table), layers, ops.load_head(norm, head, config.rms_norm_eps))


def _load_layer(checkpoint: Checkpoint, config: ModelConfig, ops: Ops, index: int) -> _Layer:
    prefix = f"model.layers.{index}"
    attention = _load_attention(checkpoint, config, ops, prefix)
    norm = checkpoint.tensor(f"{prefix}.post_attention_layernorm.weight", (config.hidden_size,))
    if config.moe_layers[index]:
        gate, up, down = checkpoint.experts(
            f"{prefix}.mlp", config.num_experts, config.moe_intermediate_size, config.hidden_size
        )
        router = checkpoint.linear(f"{prefix}.mlp.gate", config.num_experts, config.hidden_size)
        shape = MoeShape(config.num_experts, config.num_experts_per_tok, config.norm_topk_prob)
        moe = ops.load_moe(MoeTensors(norm, router, gate, up, down), shape, config.rms_norm_eps)
        return _Layer(attention, moe, True)
    hidden, width = config.hidden_size, config.intermediate_size
    tensors = MlpTensors(
        norm=norm,
        gate_proj=checkpoint.linear(f"{prefix}.mlp.gate_proj", width, hidden),
        up_proj=checkpoint.linear(f"{prefix}.mlp.up_proj", width, hidden),
        down_proj=checkpoint.linear(f"{prefix}.mlp.down_proj", hidden, width),
    )
    return _Layer(attention, ops.load_mlp(tensors, config.rms_norm_eps), False)


def _load_attention(checkpoint: Checkpoint, config: ModelConfig, ops: Ops, layer_prefix: str) -> Handle:
    prefix = f"{layer_prefix}.self_attn"
    hidden, bias = config.hidden_size, config.attention_bias
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    tensors = AttentionTensors(
        input_norm=checkpoint.tensor(f"{layer_prefix}.input_layernorm.weight", (hidden,)),
        q_proj=checkpoint.linear(f"{prefix}.q_proj", q_size, hidden, bias=bias),
        k_proj=checkpoint.linear(f"{prefix}.k_proj", kv_size, hidden, bias=bias),
        v_proj=checkpoint.linear(f"{prefix}.v_proj", kv_size, hidden, bias=bias),
        o_proj=checkpoint.linear(f"{prefix}.o_proj", hidden, q_size, bias=bias),
        q_norm=checkpoint.tensor(f"{prefix}.q_norm.weight", (config.head_dim,)),
        k_norm=checkpoint.tensor(f"{prefix}.k_norm.weight", (config.head_dim,)),
    )
    shape = AttentionShape(
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope.theta,
        rope_inv_freq=config.rope.inv_freq,
        rope_attention_factor=config.rope.attention_factor,
        window_tokens=config.window_tokens,
    )
    return ops.load_attention(tensors, shape)
