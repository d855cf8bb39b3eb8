"""Random models in Qwen3-30B-A3B's geometry, made on the GPU: ours, and mlx-lm's with the same shapes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from protos.pool_format import BlockShape
from services.decoder.gpu_pool import GpuPool
from services.decoder.models.qwen3_moe import Qwen3Moe, _Layer
from services.decoder.ops.base import AttentionShape, AttentionTensors, LinearTensors, MoeShape, MoeTensors
from services.decoder.ops.cuda.driver import CudaDriver
from services.decoder.ops.cuda.fast import FastKernels
from services.decoder.ops.cuda.ops import CudaOps
from services.decoder.ops.cuda.table import addresses
from services.decoder.ops.cuda.weights import ArrayTensor
from tests.decoder.cuda.runner import Stream, run_step

_BLOCKS_A_STREAM = 80
_STEPS, _WARM_UP = 25, 5


@dataclass(frozen=True)
class Geometry:
    """Sizes of the timed model, and the bytes that a step has to read once."""

    hidden: int = 2048
    width: int = 768
    experts: int = 128
    experts_a_token: int = 8
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128
    vocab: int = 151936

    def step_bytes(self, batch: int, context: int, distinct: int, layers: int) -> float:
        """4.5 bits a weight (the router: 8.5), and bf16 K/V."""
        rows = (self.heads + 2 * self.kv_heads) * self.head_dim + self.heads * self.head_dim
        layer = (
            4.5 / 8 * (rows * self.hidden + distinct * 3 * self.width * self.hidden)
            + 8.5 / 8 * self.experts * self.hidden
        )
        kv = batch * context * 2 * self.kv_heads * self.head_dim * 2
        return layers * (layer + kv) + 4.5 / 8 * self.vocab * self.hidden


GEOMETRY = Geometry()


class TimedModel:
    """Our model over a pool of its own."""

    def __init__(self, model: Qwen3Moe, ops: CudaOps, num_layers: int) -> None:
        self._model, self._ops, self.num_layers = model, ops, num_layers
        shape = BlockShape(num_layers, GEOMETRY.kv_heads, 16, GEOMETRY.head_dim, 2)
        num_blocks = 32 * _BLOCKS_A_STREAM
        # Random K/V, small enough for bf16: zeros can be faster than real data.
        bits = mx.random.normal((num_blocks * shape.stride_bytes // 2,)).astype(mx.bfloat16)
        mx.eval(bits)
        self._memory = bits
        self._pool = GpuPool(addresses([bits])[0], num_blocks, shape, "bf16")
        self._rng = np.random.default_rng(0)

    def decode_ms(self, batch: int, context: int) -> float:
        """The median step of `batch` streams with random tokens, host work and commit included."""
        streams = [
            Stream(self._tokens(context + 1), list(range(i * _BLOCKS_A_STREAM, (i + 1) * _BLOCKS_A_STREAM)), context)
            for i in range(batch)
        ]
        times = []
        for _ in range(_STEPS):
            start = time.perf_counter()
            run_step(self._model, self._pool, [(stream, 1) for stream in streams])
            times.append(time.perf_counter() - start)
            for stream in streams:
                stream.token_ids[-1] = self._tokens(1)[0]
        return statistics.median(times[_WARM_UP:]) * 1e3

    def prefill_rate(self, tokens: int) -> float:
        """Tokens a second of one prompt in one step."""
        times = []
        for _ in range(5):
            stream = Stream(self._tokens(tokens), list(range(tokens // 16 + 1)))
            start = time.perf_counter()
            run_step(self._model, self._pool, [(stream, tokens)])
            times.append(time.perf_counter() - start)
        return tokens / statistics.median(times[2:])

    def distinct_experts(self, batch: int) -> int:
        """Experts that the last step's rows chose in the last layer."""
        logits = self._ops.scratch("router")[: batch * GEOMETRY.experts].reshape(batch, GEOMETRY.experts)
        return len(np.unique(np.argsort(-logits, axis=1)[:, : GEOMETRY.experts_a_token]))

    def _tokens(self, count: int) -> list[int]:
        tokens: list[int] = self._rng.integers(0, GEOMETRY.vocab, count).tolist()
        return tokens


def random_model(num_layers: int) -> TimedModel:
    """Our model with 4-bit weights and an 8-bit router."""
    g, ops = GEOMETRY, CudaOps(FastKernels(), CudaDriver())
    inv_freq = (1e6 ** (-np.arange(g.head_dim // 2) / (g.head_dim // 2))).astype(np.float32)
    shape = AttentionShape(g.heads, g.kv_heads, g.head_dim, 1e-6, 1e6, inv_freq, 1.0, 0)
    q_rows, kv_rows, stack = g.heads * g.head_dim, g.kv_heads * g.head_dim, (g.experts,)
    embedding = ops.load_embedding(_linear(g.vocab, g.hidden))
    layers = []
    for _ in range(num_layers):
        projections = [_linear(rows, g.hidden) for rows in (q_rows, kv_rows, kv_rows)]
        attention = AttentionTensors(
            _ones(g.hidden), *projections, _linear(g.hidden, q_rows), _ones(g.head_dim), _ones(g.head_dim)
        )
        experts = [_linear(*size, stack) for size in ((g.width, g.hidden), (g.width, g.hidden), (g.hidden, g.width))]
        moe = MoeTensors(_ones(g.hidden), _linear(g.experts, g.hidden, bits=8), *experts)
        moe_shape = MoeShape(g.experts, g.experts_a_token, True)
        layers.append(_Layer(ops.load_attention(attention, shape), ops.load_moe(moe, moe_shape, 1e-6), True))
    head = ops.load_head(_ones(g.hidden), _linear(g.vocab, g.hidden), 1e-6)
    mx.clear_cache()
    config: Any = None  # only the loader reads it
    return TimedModel(Qwen3Moe(config, ops, embedding, tuple(layers), head), ops, num_layers)


def _linear(rows: int, inputs: int, stack: tuple[int, ...] = (), bits: int = 4) -> LinearTensors:
    scale = (1 / inputs) ** 0.5 * 3.4 / (2**bits - 1)
    size = int(np.prod((*stack, rows, inputs * bits // 16)))
    halves = mx.random.randint(0, 65536, (size,)).astype(mx.uint16)
    weight = halves.view(mx.uint32).reshape(*stack, rows, inputs * bits // 32)
    groups = (*stack, rows, inputs // 64)
    scales = mx.full(groups, scale, dtype=mx.bfloat16)
    biases = mx.full(groups, -scale * (2**bits - 1) / 2, dtype=mx.bfloat16)
    mx.eval(weight, scales, biases)
    parts = (
        ArrayTensor("weight", "U32", weight),
        ArrayTensor("scales", "BF16", scales),
        ArrayTensor("biases", "BF16", biases),
    )
    return LinearTensors(*parts, bits, 64)


def _ones(size: int) -> ArrayTensor:
    ones = mx.ones((size,), mx.bfloat16)
    mx.eval(ones)
    return ArrayTensor("norm", "BF16", ones)


def mlx_lm_config(num_layers: int) -> dict[str, Any]:
    """config.json of the geometry, as mlx-lm reads it."""
    g = GEOMETRY
    return {
        "model_type": "qwen3_moe",
        "hidden_size": g.hidden,
        "num_hidden_layers": num_layers,
        "intermediate_size": 6144,
        "num_attention_heads": g.heads,
        "num_key_value_heads": g.kv_heads,
        "head_dim": g.head_dim,
        "num_experts": g.experts,
        "num_experts_per_tok": g.experts_a_token,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": g.width,
        "rms_norm_eps": 1e-6,
        "vocab_size": g.vocab,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 40960,
        "norm_topk_prob": True,
    }


def mlx_lm_model(num_layers: int) -> Callable[[int], float]:
    """mlx-lm's model with random weights of the same shapes: answers its median step in ms at context 64."""
    import mlx.nn as nn
    from mlx.utils import tree_map
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.models.qwen3_moe import Model, ModelArgs

    model: Any = Model(ModelArgs.from_dict(mlx_lm_config(num_layers)))

    def widths(path: str, module: Any) -> Any:
        return (
            {"group_size": 64, "bits": 8 if path.endswith("mlp.gate") else 4}
            if hasattr(module, "to_quantized")
            else False
        )

    nn.quantize(model, class_predicate=widths)

    def filled(array: mx.array) -> mx.array:
        if array.dtype == mx.uint32:
            return mx.random.randint(0, 65536, (array.size * 2,)).astype(mx.uint16).view(mx.uint32).reshape(array.shape)
        if array.ndim == 1:
            return mx.ones(array.shape, mx.bfloat16)
        return mx.full(array.shape, 0.0037, dtype=mx.bfloat16)

    parameters = tree_map(filled, model.parameters())
    model.update(tree_map(lambda array: array, parameters))
    for layer in [model, *model.layers]:
        _centre(layer)
    mx.eval(model.parameters())

    def step_ms(batch: int) -> float:
        cache = make_prompt_cache(model)
        rng = np.random.default_rng(0)
        mx.eval(model(mx.array(rng.integers(0, GEOMETRY.vocab, (batch, 64))), cache=cache))
        times = []
        for _ in range(10):
            start = time.perf_counter()
            mx.eval(model(mx.array(rng.integers(0, GEOMETRY.vocab, (batch, 1))), cache=cache))
            times.append(time.perf_counter() - start)
        return statistics.median(times[3:]) * 1e3

    return step_ms


def _centre(module: Any) -> None:
    """Biases of quantised layers such that weights have mean 0: else every token chooses the same experts."""
    for _, part in module.named_modules():
        if "biases" in part and "scales" in part:
            part["biases"] = part["scales"] * (-(2**part.bits - 1) / 2)
