"""The kernels on a GPU, skipped where there is none; and their NumPy twins, everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from services.decoder.loader import open_checkpoint
from services.decoder.model_config import read_model_config
from services.decoder.ops.base import AttentionShape, MoeShape
from services.decoder.ops.cuda.driver import CudaDriver, CudaError
from tests.decoder.cuda import checks, parity, stage_checks, twins
from tests.decoder.numpy_reference import NumpyQwen3Moe
from tests.decoder.tiny_models import TinyConfig, write_tiny_checkpoint

_MODEL = Path(__file__).parents[3] / "services/decoder/demo_model/checkpoint"


@pytest.mark.parametrize(
    "run",
    [
        lambda: stage_checks.run(small=True),
        lambda: checks.run(_MODEL, "bf16"),
        lambda: checks.run(_MODEL, "f32"),
        lambda: parity.run(configurations=3),
    ],
    ids=["stages", "bundled-bf16", "bundled-f32", "parity"],
)
def test_everything_that_must_hold_of_the_kernels(run: Callable[[], Iterator[tuple[str, bool]]]) -> None:
    try:
        CudaDriver()
    except CudaError as error:
        pytest.skip(f"needs an NVIDIA GPU: {error}")
    failed = [words for words, holds in run() if not holds]
    assert not failed


@pytest.mark.parametrize(
    "config",
    [
        TinyConfig(num_hidden_layers=1, bits=4, head_dim=32, bits_of={"mlp.gate": 8}),
        TinyConfig(num_hidden_layers=1, bits=8, head_dim=32, dtype="bf16", norm_topk_prob=False),
        TinyConfig(num_hidden_layers=1, attention_bias=True, mlp_only_layers=(0,), dtype="f16"),
        TinyConfig(num_hidden_layers=1, extra={"use_sliding_window": True, "sliding_window": 7}, layout="separate"),
    ],
    ids=["4bit", "8bit", "dense-bias", "window"],
)
def test_the_twins_in_a_row_are_the_numpy_model(tmp_path: Path, config: TinyConfig) -> None:
    path = write_tiny_checkpoint(tmp_path / "model", config, seed=3)
    tokens = np.random.default_rng(4).integers(0, config.vocab_size, 23)
    wanted = NumpyQwen3Moe(path).logits(tokens.tolist())
    # Not closer, because frequencies are float32 as in the kernels.
    assert np.abs(_logits_of_twins(path, tokens) - wanted).max() <= 1e-6 * np.abs(wanted).max()


def _logits_of_twins(path: Path, tokens: twins.Array) -> twins.Array:
    checkpoint = open_checkpoint(path)
    config = read_model_config(checkpoint)
    heads, kv_heads, dim, hidden, bias = (
        *(config.num_attention_heads, config.num_key_value_heads, config.head_dim),
        *(config.hidden_size, config.attention_bias),
    )
    shape = AttentionShape(
        heads, kv_heads, dim, config.rms_norm_eps, 0.0, config.rope.inv_freq, 1.0, config.window_tokens
    )
    prefix = "model.layers.0"

    def vector(name: str, size: int) -> twins.Array:
        return twins.values(checkpoint.tensor(f"{prefix}.{name}.weight", (size,)))

    x = twins.weights(checkpoint.linear("model.embed_tokens", config.vocab_size, hidden))[tokens]
    normed = twins.rms_norm(x, vector("input_layernorm", hidden), shape.rms_norm_eps)
    sizes = {"q_proj": heads * dim, "k_proj": kv_heads * dim, "v_proj": kv_heads * dim}
    parts = [checkpoint.linear(f"{prefix}.self_attn.{name}", size, hidden, bias=bias) for name, size in sizes.items()]
    qkv = np.concatenate([twins.linear(part, normed) for part in parts], -1)
    norms = (vector("self_attn.q_norm", dim), vector("self_attn.k_norm", dim))
    q, k, v = twins.heads(qkv, norms, np.arange(len(tokens), dtype=np.float64), shape)
    rows = [twins.attention(q[row], k[: row + 1], v[: row + 1], shape) for row in range(len(tokens))]
    output = checkpoint.linear(f"{prefix}.self_attn.o_proj", hidden, heads * dim, bias=bias)
    x = x + twins.linear(output, np.stack(rows).reshape(len(tokens), -1))
    normed = twins.rms_norm(x, vector("post_attention_layernorm", hidden), shape.rms_norm_eps)
    if config.moe_layers[0]:
        width, experts = config.moe_intermediate_size, config.num_experts
        gate, up, down = map(twins.stack, checkpoint.experts(f"{prefix}.mlp", experts, width, hidden))
        router = checkpoint.linear(f"{prefix}.mlp.gate", experts, hidden)
        moe = MoeShape(experts, config.num_experts_per_tok, config.norm_topk_prob)
        chosen, chances = twins.route(twins.linear(router, normed), moe)
        for row in range(len(tokens)):
            for expert, chance in zip(chosen[row], chances[row], strict=True):
                x[row] += chance * (down[expert] @ twins.gated(gate[expert], up[expert], normed[row : row + 1])[0])
    else:
        width = config.intermediate_size
        shapes = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
        gate, up, down = (
            twins.weights(checkpoint.linear(f"{prefix}.mlp.{name}", *two)) for name, two in shapes.items()
        )
        x = x + twins.gated(gate, up, normed) @ down.T
    final = twins.rms_norm(x, twins.values(checkpoint.tensor("model.norm.weight", (hidden,))), config.rms_norm_eps)
    return twins.linear(checkpoint.linear("lm_head", config.vocab_size, hidden), final)
