"""A random checkpoint in Qwen3-30B-A3B's geometry, 4-bit, for speed only: `python -m tests.bench.gpu_checkpoint DIR LAYERS`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx

from tests.bench.gpu_models import GEOMETRY, mlx_lm_config

_ROUTER_BITS = 8


def write_random_checkpoint(directory: Path, num_layers: int) -> None:
    """One file for each layer, whose weights are random bits and whose scales keep the products in range."""
    directory.mkdir(parents=True, exist_ok=True)
    g, where = GEOMETRY, {}

    def save(index: int, tensors: dict[str, mx.array]) -> None:
        name = f"model-{index:05d}.safetensors"
        mx.save_safetensors(str(directory / name), tensors, metadata={"format": "mlx"})
        where.update(dict.fromkeys(tensors, name))

    embedding = _linear("model.embed_tokens", (g.vocab, g.hidden)) | _linear("lm_head", (g.vocab, g.hidden))
    save(0, embedding | {"model.norm.weight": mx.ones((g.hidden,), mx.bfloat16)})
    for layer in range(num_layers):
        save(layer + 1, _layer(f"model.layers.{layer}"))
        mx.clear_cache()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (directory / "config.json").write_text(json.dumps(_config(num_layers), indent=1))


def _layer(prefix: str) -> dict[str, mx.array]:
    g = GEOMETRY
    q_rows, kv_rows = g.heads * g.head_dim, g.kv_heads * g.head_dim
    linears = {
        "self_attn.q_proj": (q_rows, g.hidden),
        "self_attn.k_proj": (kv_rows, g.hidden),
        "self_attn.v_proj": (kv_rows, g.hidden),
        "self_attn.o_proj": (g.hidden, q_rows),
        "mlp.switch_mlp.gate_proj": (g.experts, g.width, g.hidden),
        "mlp.switch_mlp.up_proj": (g.experts, g.width, g.hidden),
        "mlp.switch_mlp.down_proj": (g.experts, g.hidden, g.width),
    }
    tensors = _linear(f"{prefix}.mlp.gate", (g.experts, g.hidden), _ROUTER_BITS)
    for name, shape in linears.items():
        tensors |= _linear(f"{prefix}.{name}", shape)
    norms = {
        "self_attn.q_norm": g.head_dim,
        "self_attn.k_norm": g.head_dim,
        "input_layernorm": g.hidden,
        "post_attention_layernorm": g.hidden,
    }
    for name, size in norms.items():
        tensors[f"{prefix}.{name}.weight"] = mx.ones((size,), mx.bfloat16)
    mx.eval(tensors)
    return tensors


def _linear(name: str, shape: tuple[int, ...], bits: int = 4) -> dict[str, mx.array]:
    *outer, inputs = shape
    scale = (1 / inputs) ** 0.5 * 3.4 / (2**bits - 1)
    halves = mx.random.randint(0, 65536, (*outer, inputs * bits // 16)).astype(mx.uint16)
    groups = (*outer, inputs // 64)
    return {
        f"{name}.weight": halves.view(mx.uint32),
        f"{name}.scales": mx.full(groups, scale, dtype=mx.bfloat16),
        f"{name}.biases": mx.full(groups, -scale * (2**bits - 1) / 2, dtype=mx.bfloat16),
    }


def _config(num_layers: int) -> dict[str, Any]:
    router = {"group_size": 64, "bits": _ROUTER_BITS}
    quantization = {"group_size": 64, "bits": 4} | {f"model.layers.{i}.mlp.gate": router for i in range(num_layers)}
    return mlx_lm_config(num_layers) | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_act": "silu",
        "attention_bias": False,
        "torch_dtype": "bfloat16",
        "quantization": quantization,
    }


if __name__ == "__main__":
    write_random_checkpoint(Path(sys.argv[1]), int(sys.argv[2]))
