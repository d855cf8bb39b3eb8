"""The plain kernels against mlx-lm and NumPy on the parity matrix of every backend, as lines to print.

mlx-lm runs on the host's cores: on the GPU, MLX compiles for a minute or more for each new shape of a quantised product.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model as load_mlx_lm

from protos.pool_format import ELEMENT_BYTES, BlockShape
from services.decoder.gpu_pool import GpuPool
from services.decoder.loader import open_checkpoint
from services.decoder.model_config import read_model_config
from services.decoder.ops.cuda.loading import load
from services.decoder.ops.cuda.table import addresses
from tests.decoder.model_driver import ModelDriver, generate_greedy
from tests.decoder.numpy_reference import NumpyQwen3Moe
from tests.decoder.tiny_models import TinyConfig, random_tiny_config, write_tiny_checkpoint

NUM_TOKENS = 64
MATRIX = [(seed, (0, 4, 8)[seed % 3], 16) for seed in range(24)]  # as in test_parity.py
_NUMPY = [
    TinyConfig(layout="separate", num_files=2),
    TinyConfig(layout="fused", tie_word_embeddings=True, norm_topk_prob=False),
    TinyConfig(attention_bias=True, mlp_only_layers=(1,), head_dim=24, num_attention_heads=6, num_key_value_heads=3),
    TinyConfig(bits=4, head_dim=32, bits_of={"mlp.gate": 8, "embed_tokens": 8}),
    TinyConfig(bits=8, head_dim=32, decoder_sparse_step=2, num_experts=5, num_experts_per_tok=5),
    TinyConfig(bits=4, group_size=128, hidden_size=128, moe_intermediate_size=128, head_dim=32),
    TinyConfig(extra={"use_sliding_window": True, "sliding_window": 7}),
    TinyConfig(dtype="f16", layout="separate"),
]
_BF16 = [
    TinyConfig(dtype="bf16", bits=4, head_dim=32, decoder_sparse_step=2),
    TinyConfig(dtype="bf16", bits=8, head_dim=32, mlp_only_layers=(1,)),
    TinyConfig(dtype="bf16", mlp_only_layers=(0, 1, 2)),
]


def run(*, configurations: int = len(MATRIX)) -> Iterator[tuple[str, bool]]:
    """Each check: what it found, and whether it holds."""
    for case in MATRIX[:configurations]:
        with tempfile.TemporaryDirectory() as directory:
            yield _greedy(Path(directory), *case)
    for config in _NUMPY:
        with tempfile.TemporaryDirectory() as directory:
            path = write_tiny_checkpoint(Path(directory) / "model", config, seed=5)
            tokens = np.random.default_rng(6).integers(0, config.vocab_size, 90).tolist()
            wanted = NumpyQwen3Moe(path).logits(tokens)
            error = float(np.abs(_logits(path, tokens, "f32", "f32") - wanted).max() / np.abs(wanted).max())
            yield f"float32 logits of {_name(config)}: {error:.1e} from float64 (at most 1e-5)", error <= 1e-5
    for config in _BF16:
        with tempfile.TemporaryDirectory() as directory:
            yield _bf16_error(Path(directory), config)


def _greedy(directory: Path, seed: int, bits: int, num_prompts: int) -> tuple[str, bool]:
    """Streams in continuous batching, prefilled in random chunks, against mlx-lm, which is given the tokens so far at once."""
    rng = np.random.default_rng(1000 + seed)
    config = random_tiny_config(rng, bits)
    path = write_tiny_checkpoint(directory / "model", config, seed)
    prompts = {
        f"seq-{index}": rng.integers(0, config.vocab_size, int(rng.integers(1, 40))).tolist()
        for index in range(num_prompts)
    }
    driver = _driver(path, "f32", "f32", num_prompts * 7 + 1, rng)
    outputs = generate_greedy(driver, prompts, NUM_TOKENS, rng)
    same = 0
    with mx.stream(mx.cpu):
        reference, _ = load_mlx_lm(path)
        for index, (name, prompt) in enumerate(prompts.items()):
            wanted = _mlx_lm_step_by_step(reference, prompt) if index == 0 else None
            same += outputs[name] == (wanted or _mlx_lm_after(reference, prompt, outputs[name]))
    words = f"float32, {_name(config)}: {same} of {num_prompts} streams of {NUM_TOKENS} tokens as mlx-lm's"
    return words, same == num_prompts


def _mlx_lm_step_by_step(model: Any, prompt: list[int]) -> list[int]:
    cache = make_prompt_cache(model)
    tokens, output = mx.array([prompt]), []
    for _ in range(NUM_TOKENS):
        logits = model(tokens, cache=cache)
        output.append(int(mx.argmax(logits[0, -1]).item()))
        tokens = mx.array([output[-1:]])
    return output


def _mlx_lm_after(model: Any, prompt: list[int], output: list[int]) -> list[int]:
    """The best token after each of the output's; equal to it exactly when greedy decoding would have made it."""
    logits = model(mx.array([prompt + output[:-1]]))
    best: list[int] = mx.argmax(logits[0, len(prompt) - 1 :], axis=-1).tolist()
    return best


def _bf16_error(directory: Path, config: TinyConfig) -> tuple[str, bool]:
    path = write_tiny_checkpoint(directory / "model", config, seed=7)
    tokens = np.random.default_rng(8).integers(0, config.vocab_size, 90).tolist()
    wanted = NumpyQwen3Moe(path).logits(tokens)
    with mx.stream(mx.cpu):
        reference, _ = load_mlx_lm(path)
        theirs = np.array(reference(mx.array([tokens]))[0].astype(mx.float32))
    ours = _logits(path, tokens, "bf16", "bf16")
    ratio = float(np.sqrt(((ours - wanted) ** 2).mean() / ((theirs - wanted) ** 2).mean()))
    return f"bf16, {_name(config)}: {ratio:.2f} times mlx-lm's error (at most 1.2)", ratio <= 1.2


def _logits(path: Path, tokens: list[int], precision: str, kv_dtype: str) -> np.ndarray[Any, Any]:
    driver = _driver(path, precision, kv_dtype, 20, np.random.default_rng(0))
    return np.stack([driver.logits({"a": [token]})["a"] for token in tokens])


def _driver(path: Path, precision: str, kv_dtype: str, num_blocks: int, rng: np.random.Generator) -> ModelDriver:
    checkpoint = open_checkpoint(path)
    config = read_model_config(checkpoint)
    model, _ = load(checkpoint, config, precision)
    shape = BlockShape(
        config.num_hidden_layers, config.num_key_value_heads, 16, config.head_dim, ELEMENT_BYTES[kv_dtype]
    )
    memory = mx.zeros((num_blocks * shape.stride_bytes // 2,), mx.uint16)
    mx.eval(memory)
    pool = GpuPool(addresses([memory])[0], num_blocks, shape, kv_dtype)
    _MEMORY[:] = [memory]
    return ModelDriver(model, pool, rng.permutation(np.arange(1, num_blocks)).tolist())


_MEMORY: list[mx.array] = []  # of the last driver's pool, which holds an address only


def _name(config: TinyConfig) -> str:
    kind = f"{config.bits}-bit groups of {config.group_size}" if config.bits else "unquantised"
    dense = "" if all(config.is_moe(layer) for layer in range(config.num_hidden_layers)) else ", dense layers"
    extra = (", biases" if config.attention_bias else "") + (", tied" if config.tie_word_embeddings else "")
    heads = f"{config.num_attention_heads}/{config.num_key_value_heads}x{config.head_dim}"
    return f"{kind} {config.dtype}, {config.hidden_size}, {heads}, {config.num_experts} experts{dense}{extra}"
