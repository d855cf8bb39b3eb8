"""The numbers are right: against an independent NumPy model, and token for token against mlx-lm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model as load_mlx_lm

from services.decoder.ops.mlx import MlxOps
from tests.decoder.model_driver import ModelDriver, generate_greedy, load, make_pool
from tests.decoder.numpy_reference import NumpyQwen3Moe
from tests.decoder.tiny_models import TinyConfig, random_tiny_config, write_tiny_checkpoint

NUM_TOKENS = 64
# 24 random configurations with 16 prompts: every third float32, 4-bit, 8-bit. The first of each kind run always, with 3.
MATRIX = [(seed, (0, 4, 8)[seed % 3], 16) for seed in range(24)]
QUICK = [(seed, bits, 3) for seed, bits, _ in MATRIX[:3]]


def _mlx_lm_greedy(model: Any, prompt: list[int]) -> list[int]:
    cache = make_prompt_cache(model)
    tokens, output = mx.array([prompt]), []
    for _ in range(NUM_TOKENS):
        logits = model(tokens, cache=cache)
        output.append(int(mx.argmax(logits[0, -1]).item()))
        tokens = mx.array([output[-1:]])
    return output


@pytest.mark.parametrize(
    ("seed", "bits", "num_prompts"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in MATRIX)]
)
def test_greedy_tokens_equal_those_of_mlx_lm(tmp_path: Path, seed: int, bits: int, num_prompts: int) -> None:
    rng = np.random.default_rng(1000 + seed)
    config = random_tiny_config(rng, bits)
    directory = write_tiny_checkpoint(tmp_path / "model", config, seed)
    model = load(directory, MlxOps())
    prompts = {
        f"seq-{index}": rng.integers(0, config.vocab_size, int(rng.integers(1, 40))).tolist()
        for index in range(num_prompts)
    }
    pool = make_pool(tmp_path, model.config, "f32", num_blocks=num_prompts * 7 + 1)
    driver = ModelDriver(model, pool, rng.permutation(np.arange(1, pool.num_blocks)).tolist())
    outputs = generate_greedy(driver, prompts, NUM_TOKENS, rng)
    reference, _ = load_mlx_lm(directory)
    for name, prompt in prompts.items():
        assert outputs[name] == _mlx_lm_greedy(reference, prompt), (config, name)


def _logits_of_all_rows(directory: Path, tmp_path: Path, tokens: list[int], kv_dtype: str) -> npt.NDArray[Any]:
    model = load(directory, MlxOps())
    driver = ModelDriver(model, make_pool(tmp_path, model.config, kv_dtype), range(1, 20))
    return np.stack([driver.logits({"a": [token]})["a"] for token in tokens])


@pytest.mark.parametrize(
    "config",
    [
        TinyConfig(layout="separate", num_files=2),
        TinyConfig(layout="fused", tie_word_embeddings=True, norm_topk_prob=False),
        TinyConfig(
            attention_bias=True, mlp_only_layers=(1,), head_dim=24, num_attention_heads=6, num_key_value_heads=3
        ),
        TinyConfig(bits=4, head_dim=32, bits_of={"mlp.gate": 8, "embed_tokens": 8}),
        TinyConfig(bits=8, head_dim=32, decoder_sparse_step=2, num_experts=5, num_experts_per_tok=5),
        TinyConfig(extra={"use_sliding_window": True, "sliding_window": 7}),
        TinyConfig(dtype="f16", layout="separate"),
    ],
    ids=lambda config: f"{config.layout}-{config.dtype}-{config.bits}bit",
)
def test_logits_agree_with_numpy(tmp_path: Path, config: TinyConfig) -> None:
    directory = write_tiny_checkpoint(tmp_path / "model", config, seed=5)
    tokens = np.random.default_rng(6).integers(0, config.vocab_size, 90).tolist()
    expected = NumpyQwen3Moe(directory).logits(tokens)
    found = _logits_of_all_rows(directory, tmp_path, tokens, "f32")
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    "config",
    [
        TinyConfig(dtype="bf16", bits=4, head_dim=32),
        TinyConfig(dtype="bf16", bits=8, head_dim=32),
        # mlx-lm has no bf16 experts on a CPU, so unquantised weights are compared in dense layers.
        TinyConfig(dtype="bf16", mlp_only_layers=(0, 1, 2)),
    ],
    ids=["4bit", "8bit", "dense"],
)
def test_bf16_error_is_at_most_that_of_mlx_lm(tmp_path: Path, config: TinyConfig) -> None:
    directory = write_tiny_checkpoint(tmp_path / "model", config, seed=7)
    tokens = np.random.default_rng(8).integers(0, config.vocab_size, 90).tolist()
    exact = NumpyQwen3Moe(directory).logits(tokens)
    reference, _ = load_mlx_lm(directory)
    theirs = np.array(reference(mx.array([tokens]))[0].astype(mx.float32))
    ours = _logits_of_all_rows(directory, tmp_path, tokens, "bf16")

    def error(logits: npt.NDArray[Any]) -> float:
        return float(np.sqrt(((logits - exact) ** 2).mean()))

    assert error(ours) <= 1.2 * error(theirs)
