"""The MoE block, and the dense MLP, against float64."""

from __future__ import annotations

import numpy as np
import pytest

from services.decoder.ops.base import LinearTensors, MlpTensors, MoeShape, MoeTensors
from services.decoder.ops.native import NativeOps
from tests.decoder.native.steps import Array, ones, rms_norm, start
from tests.decoder.native.tensors import float_linear, quantised_linear


def _silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def _experts(
    rng: np.random.Generator, count: int, hidden: int, width: int, bits: int
) -> tuple[list[LinearTensors], list[Array]]:
    """gate, up and down, stacked."""
    shapes = [(count, width, hidden), (count, width, hidden), (count, hidden, width)]
    made = [
        quantised_linear(f"expert{i}", shape, bits, 32, rng)
        if bits
        else float_linear(f"expert{i}", rng.standard_normal(shape) / np.sqrt(shape[-1]))
        for i, shape in enumerate(shapes)
    ]
    return [linear for linear, _ in made], [exact for _, exact in made]


def _reference(x: Array, router: Array, experts: list[Array], shape: MoeShape) -> Array:
    normed = rms_norm(x)
    logits = normed @ router.T
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    out = x.astype(np.float64).copy()
    for row in range(len(x)):
        chosen = np.argsort(-weights[row], kind="stable")[: shape.num_experts_per_tok]
        total = weights[row, chosen].sum() if shape.norm_topk_prob else 1.0
        for e in chosen:
            inner = _silu(experts[0][e] @ normed[row]) * (experts[1][e] @ normed[row])
            out[row] += weights[row, e] / total * (experts[2][e] @ inner)
    return out


def _run(ops: NativeOps, x: Array, tensors: MoeTensors, shape: MoeShape) -> Array:
    _, hidden = start(ops, x)
    return ops.hidden_rows(ops.moe(ops.load_moe(tensors, shape, 1e-6), hidden))


@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize(
    ("tokens", "count", "top_k", "hidden", "width"),
    [(1, 4, 1, 32, 32), (7, 8, 8, 64, 96), (33, 5, 2, 96, 32), (40, 64, 8, 64, 160), (70, 33, 3, 160, 64)],
)
@pytest.mark.parametrize("renormalise", [True, False])
def test_moe(
    isa: str, bits: int, tokens: int, count: int, top_k: int, hidden: int, width: int, renormalise: bool
) -> None:
    rng = np.random.default_rng(tokens + count)
    x = rng.standard_normal((tokens, hidden)).astype(np.float32)
    router, exact_router = float_linear("router", rng.standard_normal((count, hidden)), "BF16")
    linears, exact = _experts(rng, count, hidden, width, bits)
    tensors = MoeTensors(ones(hidden), router, linears[0], linears[1], linears[2])
    shape = MoeShape(count, top_k, renormalise)
    expected = _reference(x, exact_router, exact, shape)
    found = _run(NativeOps("exact", 2, isa), x, tensors, shape)
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()
    if bits:
        fast = _run(NativeOps("fast", 2, isa), x, tensors, shape)
        assert np.abs(fast - expected).max() <= 0.05 * np.abs(expected).max()
        assert np.sqrt(((fast - expected) ** 2).mean()) <= 0.01 * np.sqrt((expected**2).mean())


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_one_hot_expert_and_experts_without_a_token(precision: str) -> None:
    rng = np.random.default_rng(1)
    x = np.abs(rng.standard_normal((90, 64))).astype(np.float32)
    rows = np.zeros((16, 64))
    rows[5], rows[9] = 1.0, 0.5  # all tokens go to experts 5 and 9, the other 14 have none
    router, exact_router = float_linear("router", rows)
    linears, exact = _experts(rng, 16, 64, 64, 4)
    tensors = MoeTensors(ones(64), router, linears[0], linears[1], linears[2])
    shape = MoeShape(16, 2, True)
    found = _run(NativeOps(precision, 2), x, tensors, shape)
    expected = _reference(x, exact_router, exact, shape)
    assert np.abs(found - expected).max() <= (2e-5 if precision == "exact" else 0.05) * np.abs(expected).max()


def test_experts_that_tie_go_by_number() -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((3, 32)).astype(np.float32)
    router, exact_router = float_linear("router", np.zeros((12, 32)))
    linears, exact = _experts(rng, 12, 32, 32, 0)
    tensors = MoeTensors(ones(32), router, linears[0], linears[1], linears[2])
    shape = MoeShape(12, 4, True)
    found = _run(NativeOps("exact", 1), x, tensors, shape)
    assert np.abs(found - _reference(x, exact_router, exact, shape)).max() <= 1e-5


def test_single_experts_equal_a_stack() -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((11, 64)).astype(np.float32)
    router, _ = float_linear("router", rng.standard_normal((6, 64)))
    stacked = [rng.standard_normal(shape).astype(np.float32) for shape in ((6, 32, 64), (6, 32, 64), (6, 64, 32))]
    shape = MoeShape(6, 2, True)
    as_stack = MoeTensors(ones(64), router, *(float_linear("e", part)[0] for part in stacked))
    single = [tuple(float_linear("e", one)[0] for one in part) for part in stacked]
    as_single = MoeTensors(ones(64), router, single[0], single[1], single[2])
    results = [_run(NativeOps("fast", 2), x, tensors, shape) for tensors in (as_stack, as_single)]
    assert np.array_equal(results[0], results[1])


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_a_tokens_bits_depend_on_that_token_alone(precision: str) -> None:
    rng = np.random.default_rng(4)
    x = rng.standard_normal((50, 64)).astype(np.float32)
    router, _ = float_linear("router", rng.standard_normal((16, 64)))
    linears, _ = _experts(rng, 16, 64, 96, 4)
    tensors = MoeTensors(ones(64), router, linears[0], linears[1], linears[2])
    shape = MoeShape(16, 4, True)
    whole = _run(NativeOps(precision, 1), x, tensors, shape)
    for threads in (2, 3):
        ops = NativeOps(precision, threads)
        assert np.array_equal(_run(ops, x, tensors, shape), whole)
        for begin, end in ((0, 1), (7, 9), (20, 50)):
            assert np.array_equal(_run(ops, x[begin:end], tensors, shape), whole[begin:end])


def test_dense_mlp_and_an_empty_batch(isa: str) -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((9, 64)).astype(np.float32)
    made = [
        float_linear("mlp", rng.standard_normal(s) / np.sqrt(s[-1]), "BF16") for s in ((96, 64), (96, 64), (64, 96))
    ]
    ops = NativeOps("exact", 2, isa)
    mlp = ops.load_mlp(MlpTensors(ones(64), *(linear for linear, _ in made)), 1e-6)
    _, hidden = start(ops, x)
    normed = rms_norm(x)
    expected = x + (_silu(normed @ made[0][1].T) * (normed @ made[1][1].T)) @ made[2][1].T
    assert np.abs(ops.hidden_rows(ops.dense_mlp(mlp, hidden)) - expected).max() <= 1e-5
    _, hidden = start(ops, x[:0])
    assert ops.hidden_rows(ops.dense_mlp(mlp, hidden)).shape == (0, 64)
