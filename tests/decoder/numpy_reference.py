"""An independent Qwen3-MoE in plain NumPy: whole sequences, no cache, no code shared with the services."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class NumpyQwen3Moe:
    """Reads a checkpoint directory by itself; `precision` is float64 or float32, for everything.

    With `int8_kv` each row of K and V is rounded to 127ths of its largest element before attention reads it.
    """

    def __init__(self, directory: Path, precision: type[np.floating[Any]] = np.float64, int8_kv: bool = False) -> None:
        self._int8_kv = int8_kv
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text())
        self._precision = precision
        self._tensors: dict[str, Array] = {}
        for path in directory.glob("*.safetensors"):
            self._tensors |= _read_safetensors(path)

    def logits(self, token_ids: list[int]) -> Array:
        """Logits [T, vocab_size] of every position."""
        config = self.config
        eps = config["rms_norm_eps"]
        hidden = self._linear_weight("model.embed_tokens")[token_ids]
        for layer in range(config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}"
            normed = _rms_norm(hidden, self._vector(f"{prefix}.input_layernorm.weight"), eps)
            hidden = hidden + self._attention(f"{prefix}.self_attn", normed)
            normed = _rms_norm(hidden, self._vector(f"{prefix}.post_attention_layernorm.weight"), eps)
            hidden = hidden + self._mlp(f"{prefix}.mlp", normed)
        hidden = _rms_norm(hidden, self._vector("model.norm.weight"), eps)
        return hidden @ self._linear_weight("model.embed_tokens" if config["tie_word_embeddings"] else "lm_head").T

    def _attention(self, prefix: str, x: Array) -> Array:
        config = self.config
        heads, kv_heads, dim = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        length, eps = len(x), config["rms_norm_eps"]
        q = self._linear(f"{prefix}.q_proj", x).reshape(length, heads, dim)
        k = self._linear(f"{prefix}.k_proj", x).reshape(length, kv_heads, dim)
        v = self._linear(f"{prefix}.v_proj", x).reshape(length, kv_heads, dim)
        q = self._rotate(_rms_norm(q, self._vector(f"{prefix}.q_norm.weight"), eps))
        k = self._rotate(_rms_norm(k, self._vector(f"{prefix}.k_norm.weight"), eps))
        if self._int8_kv:
            k, v = _round_to_127ths(k), _round_to_127ths(v)
        k, v = np.repeat(k, heads // kv_heads, axis=1), np.repeat(v, heads // kv_heads, axis=1)
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(self._precision(dim))
        visible = np.tri(length, dtype=bool)
        if config.get("use_sliding_window"):
            visible &= ~np.tri(length, k=-config["sliding_window"], dtype=bool)
        weights = _softmax(np.where(visible, scores, -np.inf))
        return self._linear(f"{prefix}.o_proj", np.einsum("hij,jhd->ihd", weights, v).reshape(length, heads * dim))

    def _rotate(self, x: Array) -> Array:
        half = x.shape[-1] // 2
        theta = self.config["rope_theta"] ** (-np.arange(half, dtype=np.float64) / half)
        angles = (np.arange(len(x))[:, None] * theta)[:, None]
        cos, sin = np.cos(angles).astype(self._precision), np.sin(angles).astype(self._precision)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def _mlp(self, prefix: str, x: Array) -> Array:
        if not self._has(f"{prefix}.gate"):
            inner = _silu(self._linear(f"{prefix}.gate_proj", x)) * self._linear(f"{prefix}.up_proj", x)
            return self._linear(f"{prefix}.down_proj", inner)
        probabilities = _softmax(self._linear(f"{prefix}.gate", x))
        count = self.config["num_experts_per_tok"]
        out = np.zeros_like(x)
        for row in range(len(x)):
            chosen = sorted(range(probabilities.shape[1]), key=lambda e: (-probabilities[row, e], e))[:count]
            total = sum(probabilities[row, e] for e in chosen) if self.config["norm_topk_prob"] else 1
            for expert in chosen:
                gate, up, down = (self._expert(prefix, name, expert) for name in ("gate_proj", "up_proj", "down_proj"))
                inner = _silu(gate @ x[row]) * (up @ x[row])
                out[row] += probabilities[row, expert] / total * (down @ inner)
        return out

    def _expert(self, prefix: str, name: str, expert: int) -> Array:
        if self._has(f"{prefix}.experts.{expert}.{name}"):
            return self._linear_weight(f"{prefix}.experts.{expert}.{name}")
        if self._has(f"{prefix}.switch_mlp.{name}"):
            return self._linear_weight(f"{prefix}.switch_mlp.{name}")[expert]
        if name == "down_proj":
            return self._vector(f"{prefix}.experts.down_proj")[expert]
        half = 0 if name == "gate_proj" else 1
        return np.split(self._vector(f"{prefix}.experts.gate_up_proj")[expert], 2)[half]

    def _has(self, path: str) -> bool:
        return f"{path}.weight" in self._tensors

    def _vector(self, name: str) -> Array:
        return self._tensors[name].astype(self._precision)

    def _linear(self, path: str, x: Array) -> Array:
        y = x @ self._linear_weight(path).T
        return y + self._vector(f"{path}.bias") if f"{path}.bias" in self._tensors else y

    def _linear_weight(self, path: str) -> Array:
        weight = self._tensors[f"{path}.weight"]
        if f"{path}.scales" not in self._tensors:
            return weight.astype(self._precision)
        scales, biases = self._vector(f"{path}.scales"), self._vector(f"{path}.biases")
        options = self.config["quantization"]
        bits = options.get(path, options)["bits"]
        shifts = np.arange(0, 32, bits, dtype=np.uint32)
        numbers = (weight[..., None] >> shifts) & np.uint32(2**bits - 1)
        grouped = numbers.reshape(*scales.shape, -1).astype(self._precision)
        return (grouped * scales[..., None] + biases[..., None]).reshape(*weight.shape[:-1], -1)


def _read_safetensors(path: Path) -> dict[str, Array]:
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    tensors = {}
    for name, entry in json.loads(content[8 : 8 + size]).items():
        if name == "__metadata__":
            continue
        start, stop = entry["data_offsets"]
        data = content[8 + size + start : 8 + size + stop]
        if entry["dtype"] == "BF16":
            tensor: Array = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            tensor = np.frombuffer(data, {"F32": "<f4", "F16": "<f2", "U32": "<u4"}[entry["dtype"]])
        tensors[name] = tensor.reshape(entry["shape"])
    return tensors


def _rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + x.dtype.type(eps)) * weight


def _round_to_127ths(rows: Array) -> Array:
    scales = np.abs(rows).max(axis=-1, keepdims=True) / 127
    return np.rint(rows / scales) * scales


def _softmax(x: Array) -> Array:
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def _silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))
