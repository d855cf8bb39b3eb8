"""What config.json says of a model. Every key that changes the mathematics is implemented, or refused by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.decoder.errors import CheckpointError
from services.decoder.loader import Checkpoint
from services.decoder.rope import Rope, read_rope

# Keys of related families whose effect is not implemented here, with the values that mean "without effect".
_REFUSED_UNLESS: dict[str, tuple[Any, ...]] = {
    "hidden_act": (None, "silu"),
    "shared_expert_intermediate_size": (None, 0),
    "n_shared_experts": (None, 0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1, 1.0),
    "mlp_bias": (None, False),
    "query_pre_attn_scalar": (None,),
    "use_qk_norm": (None, True),
}
_KV_DTYPES = {"BF16": "bf16", "F16": "f16", "F32": "f32"}


@dataclass(frozen=True, eq=False)
class ModelConfig:
    """The numbers of a Qwen3-MoE checkpoint."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of the dense layers
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    moe_layers: tuple[bool, ...]  # per layer: a mixture, or dense
    rms_norm_eps: float
    rope: Rope
    window_tokens: int  # 0: attention reads the whole context
    attention_bias: bool
    tie_word_embeddings: bool
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]  # of config.json and generation_config.json, ascending
    kv_dtype: str  # the checkpoint's own: "bf16", "f16" or "f32"


def read_model_config(checkpoint: Checkpoint) -> ModelConfig:
    """Reads and checks a checkpoint's config.json; a CheckpointError names the key and the fix."""
    keys = _Keys(checkpoint.config, str(checkpoint.directory / "config.json"))
    model_type = keys.raw("model_type")
    if model_type != "qwen3_moe":
        raise keys.error("model_type", f"{model_type!r} is not served; served is 'qwen3_moe'")
    _refuse_unserved(keys)
    hidden, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    kv_heads = keys.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise keys.error("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads {heads}")
    head_dim = keys.size("head_dim", hidden // heads)
    num_layers = keys.size("num_hidden_layers")
    num_experts = keys.count("num_experts", keys.count("num_local_experts", 0))
    moe_layers = _moe_layers(keys, num_layers, num_experts)
    per_token = keys.size("num_experts_per_tok") if any(moe_layers) else 0
    if per_token > num_experts:
        raise keys.error("num_experts_per_tok", f"{per_token} is more than num_experts {num_experts}")
    max_positions = keys.size("max_position_embeddings")
    vocab_size = keys.size("vocab_size")
    return ModelConfig(
        model_type=model_type,
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=keys.size("intermediate_size") if not all(moe_layers) else 0,
        moe_intermediate_size=keys.size("moe_intermediate_size") if any(moe_layers) else 0,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        num_experts=num_experts,
        num_experts_per_tok=per_token,
        norm_topk_prob=keys.flag("norm_topk_prob"),
        moe_layers=moe_layers,
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
        rope=read_rope(keys.config, keys.where, head_dim, max_positions),
        window_tokens=_window_tokens(keys),
        attention_bias=keys.flag("attention_bias"),
        tie_word_embeddings=keys.flag("tie_word_embeddings"),
        max_position_embeddings=max_positions,
        eos_token_ids=_eos_token_ids(checkpoint, vocab_size),
        kv_dtype=_kv_dtype(checkpoint),
    )


@dataclass(frozen=True)
class _Keys:
    """config.json with typed access; null counts as absent, as in transformers."""

    config: Mapping[str, Any]
    where: str

    def error(self, key: str, message: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {key} {message}")

    def raw(self, key: str, default: Any = None) -> Any:
        value = self.config.get(key)
        return default if value is None else value

    def count(self, key: str, default: int | None = None) -> int:
        value = self.raw(key, default)
        if value is None:
            raise self.error(key, "is missing; add it")
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.error(key, f"must be a non-negative integer, not {value!r}")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        value = self.count(key, default)
        if value == 0:
            raise self.error(key, "must be positive")
        return value

    def flag(self, key: str) -> bool:
        value = self.raw(key, False)
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, not {value!r}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.raw(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise self.error(key, f"must be a positive number, not {value!r}")
        return float(value)


def _refuse_unserved(keys: _Keys) -> None:
    for key, harmless in _REFUSED_UNLESS.items():
        value = keys.raw(key)
        if value not in harmless:
            raise keys.error(key, f"is {value!r}, which is not served; served is {harmless[-1]!r}")
    layer_types = keys.raw("layer_types", [])
    if other := sorted({str(kind) for kind in layer_types} - {"full_attention"}):
        raise keys.error("layer_types", f"has {other[0]!r}, which is not served; served is 'full_attention'")


def _moe_layers(keys: _Keys, num_layers: int, num_experts: int) -> tuple[bool, ...]:
    step = keys.size("decoder_sparse_step", 1)
    dense = keys.raw("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise keys.error("mlp_only_layers", f"must be a list of layer indices, not {dense!r}")
    return tuple(num_experts > 0 and index not in dense and (index + 1) % step == 0 for index in range(num_layers))


def _window_tokens(keys: _Keys) -> int:
    """transformers' Qwen3-MoE applies the window to every layer, and only where use_sliding_window is set."""
    return keys.count("sliding_window", 0) if keys.flag("use_sliding_window") else 0


def _eos_token_ids(checkpoint: Checkpoint, vocab_size: int) -> tuple[int, ...]:
    found: set[int] = set()
    for name, config in (
        ("config.json", checkpoint.config),
        ("generation_config.json", checkpoint.generation_config),
    ):
        value = config.get("eos_token_id")
        ids = [] if value is None else value if isinstance(value, list) else [value]
        for token_id in ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
                raise CheckpointError(
                    f"{checkpoint.directory / name}: eos_token_id {token_id!r} is not a token id below "
                    f"vocab_size {vocab_size}"
                )
            found.add(token_id)
    return tuple(sorted(found))


def _kv_dtype(checkpoint: Checkpoint) -> str:
    """The dtype of the checkpoint's unquantised tensors; config.json's own word for it is often stale."""
    return _KV_DTYPES[checkpoint.tensor("model.norm.weight").dtype]
