"""Complete checkpoints of tiny random Qwen3-MoE models, written as Hugging Face or mlx-lm would."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from services.decoder.loader import INDEX_NAME

_MLX_TYPES = {"f32": mx.float32, "bf16": mx.bfloat16, "f16": mx.float16}
_TORCH_NAMES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


@dataclass(frozen=True)
class TinyConfig:
    """A tiny model. Quantised where bits is 4 or 8: input sizes must then be multiples of group_size."""

    vocab_size: int = 96
    hidden_size: int = 64
    intermediate_size: int = 96
    moe_intermediate_size: int = 32
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 16
    num_experts: int = 8
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = True
    tie_word_embeddings: bool = False
    mlp_only_layers: tuple[int, ...] = ()
    decoder_sparse_step: int = 1
    max_position_embeddings: int = 512
    attention_bias: bool = False
    dtype: str = "f32"  # of weights and of quantisation scales
    bits: int = 0
    group_size: int = 32
    bits_of: Mapping[str, int] = field(
        default_factory=dict
    )  # overrides by the end of a layer's path, such as "mlp.gate"
    layout: str = "stacked"  # experts: "separate", "stacked" or "fused"
    num_files: int = 1
    extra: Mapping[str, Any] = field(default_factory=dict)  # more keys of config.json

    def is_moe(self, layer: int) -> bool:
        """Whether a layer is a mixture."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0


def write_tiny_checkpoint(
    directory: Path, config: TinyConfig, seed: int = 0, *, tokenizer: bool = False, eos_token_id: int | None = None
) -> Path:
    """Writes config.json, the weights and, when asked (vocab_size at least 300), tokenizer.json. Returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors, overrides = _tensors(config, np.random.default_rng(seed))
    (directory / "config.json").write_text(json.dumps(_config_json(config, overrides, eos_token_id), indent=2))
    _write_tensors(directory, tensors, config.num_files)
    if tokenizer:
        write_tiny_tokenizer(directory, config.vocab_size)
    return directory


def write_tiny_tokenizer(directory: Path, vocab_size: int) -> None:
    """A real byte-level BPE with a few merges, and at most vocab_size tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, 320),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the lease of the block is the block of the lease", "naïve café, 東京"], trainer)
    if tokenizer.get_vocab_size() > vocab_size:
        raise ValueError(f"vocab_size {vocab_size} is too small for a byte-level tokenizer")
    tokenizer.save(str(directory / "tokenizer.json"))


def random_tiny_config(rng: np.random.Generator, bits: int) -> TinyConfig:
    """A random configuration whose sizes are valid for its bits."""
    group_size = int(rng.choice([32, 64])) if bits else 32
    num_experts = int(rng.choice([4, 5, 8, 16, 33, 64]))
    kv_heads = int(rng.choice([1, 2, 3]))
    heads = kv_heads * int(rng.choice([1, 2, 4, 5]))
    num_layers = int(rng.integers(2, 5))
    dense = tuple(sorted(rng.choice(num_layers, int(rng.integers(0, 2)), replace=False).tolist()))
    return TinyConfig(
        vocab_size=int(rng.integers(60, 200)),
        hidden_size=group_size * int(rng.integers(1, 4)),
        intermediate_size=group_size * int(rng.integers(1, 4)),
        moe_intermediate_size=group_size * int(rng.integers(1, 3)),
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=int(rng.choice([32, 64])) if bits == 0 else 64,
        num_experts=num_experts,
        num_experts_per_tok=int(rng.integers(1, min(8, num_experts) + 1)),
        norm_topk_prob=bool(rng.integers(2)),
        tie_word_embeddings=bool(rng.integers(2)),
        mlp_only_layers=dense,
        decoder_sparse_step=int(rng.choice([1, 1, 2])),
        bits=bits,
        group_size=group_size,
        bits_of={"mlp.gate": 8} if bits and rng.integers(2) else {},
        layout="stacked" if bits or rng.integers(2) else "separate",
        num_files=int(rng.integers(1, 3)),
        extra={"rope_theta": float(rng.choice([1e4, 1e6]))},
    )


def _tensors(config: TinyConfig, rng: np.random.Generator) -> tuple[dict[str, mx.array], dict[str, dict[str, int]]]:
    """All tensors, and the entries of `quantization` for the layers whose bits differ."""
    dtype = _MLX_TYPES[config.dtype]
    tensors: dict[str, mx.array] = {}
    overrides: dict[str, dict[str, int]] = {}

    def vector(name: str, size: int, mean: float) -> None:
        tensors[name] = mx.array((mean + 0.1 * rng.standard_normal(size)).astype(np.float32)).astype(dtype)

    def linear(path: str, *shape: int, gain: float = 1.0) -> None:
        values = gain * rng.standard_normal(shape) / np.sqrt(shape[-1])
        weight = mx.array(values.astype(np.float32)).astype(dtype)
        bits = next((bits for end, bits in config.bits_of.items() if path.endswith(end)), config.bits)
        if not bits:
            tensors[f"{path}.weight"] = weight
            return
        packed, scales, biases = mx.quantize(weight, config.group_size, bits)
        tensors.update({f"{path}.weight": packed, f"{path}.scales": scales, f"{path}.biases": biases})
        if bits != config.bits:
            overrides[path] = {"bits": bits, "group_size": config.group_size}

    hidden = config.hidden_size
    q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    linear("model.embed_tokens", config.vocab_size, hidden, gain=np.sqrt(hidden))
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for name, out_features, in_features in (
            ("q_proj", q_size, hidden),
            ("k_proj", kv_size, hidden),
            ("v_proj", kv_size, hidden),
            ("o_proj", hidden, q_size),
        ):
            linear(f"{prefix}.self_attn.{name}", out_features, in_features)
            if config.attention_bias:
                vector(f"{prefix}.self_attn.{name}.bias", out_features, 0.0)
        vector(f"{prefix}.self_attn.q_norm.weight", config.head_dim, 1.5)
        vector(f"{prefix}.self_attn.k_norm.weight", config.head_dim, 1.5)
        vector(f"{prefix}.input_layernorm.weight", hidden, 1.0)
        vector(f"{prefix}.post_attention_layernorm.weight", hidden, 1.0)
        width = config.moe_intermediate_size if config.is_moe(layer) else config.intermediate_size
        stack = (config.num_experts,) if config.is_moe(layer) else ()
        block = f"{prefix}.mlp.switch_mlp" if config.is_moe(layer) else f"{prefix}.mlp"
        if config.is_moe(layer):
            linear(f"{prefix}.mlp.gate", config.num_experts, hidden, gain=2.0)
        linear(f"{block}.gate_proj", *stack, width, hidden)
        linear(f"{block}.up_proj", *stack, width, hidden)
        linear(f"{block}.down_proj", *stack, hidden, width)
    vector("model.norm.weight", hidden, 1.0)
    if not config.tie_word_embeddings:
        linear("lm_head", config.vocab_size, hidden, gain=3.0)
    return _laid_out(tensors, config), overrides


def _laid_out(tensors: dict[str, mx.array], config: TinyConfig) -> dict[str, mx.array]:
    """Stacks of experts as they are, as one tensor for each expert, or with gate and up in one."""
    if config.layout == "stacked":
        return tensors
    result = {name: tensor for name, tensor in tensors.items() if ".switch_mlp." not in name}
    for name, tensor in tensors.items():
        prefix, found, rest = name.partition(".switch_mlp.")
        if not found:
            continue
        if config.layout == "separate":
            result |= {f"{prefix}.experts.{expert}.{rest}": tensor[expert] for expert in range(config.num_experts)}
        elif rest == "gate_proj.weight":
            up = tensors[f"{prefix}.switch_mlp.up_proj.weight"]
            result[f"{prefix}.experts.gate_up_proj"] = mx.concatenate([tensor, up], axis=1)
        elif rest == "down_proj.weight":
            result[f"{prefix}.experts.down_proj"] = tensor
    return result


def _config_json(config: TinyConfig, overrides: dict[str, dict[str, int]], eos_token_id: int | None) -> dict[str, Any]:
    same = (
        *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "head_dim", "num_experts", "num_experts_per_tok"),
        *("norm_topk_prob", "tie_word_embeddings", "decoder_sparse_step", "max_position_embeddings", "attention_bias"),
    )
    result: dict[str, Any] = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "torch_dtype": _TORCH_NAMES[config.dtype],
        "mlp_only_layers": list(config.mlp_only_layers),
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "eos_token_id": eos_token_id,
    }
    result |= {name: getattr(config, name) for name in same}
    if config.bits:
        result["quantization"] = {"bits": config.bits, "group_size": config.group_size, **overrides}
    return result | dict(config.extra)


def _write_tensors(directory: Path, tensors: dict[str, mx.array], num_files: int) -> None:
    if num_files == 1:
        mx.save_safetensors(str(directory / "model.safetensors"), tensors, metadata={"format": "mlx"})
        return
    names, index = sorted(tensors), {}
    for number in range(num_files):
        file_name = f"model-{number + 1:05}-of-{num_files:05}.safetensors"
        part = {name: tensors[name] for name in names[number::num_files]}
        mx.save_safetensors(str(directory / file_name), part, metadata={"format": "mlx"})
        index |= dict.fromkeys(part, file_name)
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": index}))
