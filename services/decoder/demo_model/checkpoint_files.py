"""Writes and reads the demo model's checkpoint in the layout of Hugging Face and mlx-lm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from services.decoder.demo_model.corpus import CHAT_TEMPLATE, END_OF_TEXT, TURN_END
from services.decoder.demo_model.network import (
    Quantisation,
    Shape,
    Weights,
    dequantise,
    pack,
    quantise,
    unpack,
)

MAX_POSITIONS = 4096


def write_checkpoint(
    directory: Path,
    weights: Weights,
    tokenizer: Tokenizer,
    shape: Shape,
    quantisation: Quantisation,
) -> None:
    """Quantise `weights` and write all files that a loader needs into `directory`.

    Scales, biases and norms are bf16 values stored as float32: MLX computes in their type, and on a
    CPU it is five times as fast in float32. A cast of the checkpoint to bf16 loses nothing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        bits = quantisation.bits(name)
        if not bits:
            tensors[name] = weight.detach().bfloat16().float().cpu()
            continue
        integers, scales, biases = quantise(weight, bits, quantisation.group_size)
        stem = name.removesuffix(".weight")
        tensors[name] = pack(integers.cpu(), bits)
        tensors[f"{stem}.scales"] = scales.float().cpu()
        tensors[f"{stem}.biases"] = biases.float().cpu()
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "mlx"})
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    ends = tokenizer.encode(TURN_END + END_OF_TEXT).ids
    _write_json(directory / "config.json", _config(list(weights), shape, quantisation, ends))
    _write_json(
        directory / "generation_config.json",
        {"do_sample": False, "eos_token_id": ends, "pad_token_id": ends[1]},
    )
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": TURN_END,
            "pad_token": END_OF_TEXT,
            "model_max_length": MAX_POSITIONS,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def read_weights(directory: Path, quantisation: Quantisation, device: str) -> Weights:
    """The dequantised weights of a checkpoint as they are on disk, in float32."""
    tensors = load_file(directory / "model.safetensors", device=device)
    weights: Weights = {}
    for name, tensor in tensors.items():
        if name.endswith((".scales", ".biases")):
            continue
        bits = quantisation.bits(name)
        if bits:
            stem = name.removesuffix(".weight")
            scales, biases = tensors[f"{stem}.scales"], tensors[f"{stem}.biases"]
            tensor = dequantise(unpack(tensor, bits), scales, biases, quantisation.group_size)
        weights[name] = tensor.float()
    return weights


def _config(names: list[str], shape: Shape, quantisation: Quantisation, ends: list[int]) -> dict[str, Any]:
    size = quantisation.group_size
    bits: dict[str, Any] = {"group_size": size, "bits": quantisation.expert_bits}
    for name in names:
        if quantisation.bits(name) not in (0, quantisation.expert_bits):
            stem = name.removesuffix(".weight")
            bits[stem] = {"group_size": size, "bits": quantisation.bits(name)}
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "torch_dtype": "float32",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.expert_size,
        "moe_intermediate_size": shape.expert_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.num_experts_per_tok,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": ends,
        "pad_token_id": ends[1],
        "quantization": bits,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
