"""K/V in int8, on both backends: what they compute is attention over rows rounded to 127ths, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from services.decoder.int8_rows import LARGEST, dequantise, quantise
from services.decoder.ops.base import Ops
from services.decoder.ops.mlx import MlxOps
from services.decoder.ops.native import make_ops, why_unavailable
from tests.decoder.model_driver import ModelDriver, load, make_pool
from tests.decoder.numpy_reference import NumpyQwen3Moe
from tests.decoder.tiny_models import TinyConfig, write_tiny_checkpoint

CONFIGS = [
    TinyConfig(num_attention_heads=6, num_key_value_heads=2, head_dim=24, num_experts_per_tok=3),
    TinyConfig(bits=4, head_dim=32, mlp_only_layers=(1,), tie_word_embeddings=True),
    TinyConfig(extra={"use_sliding_window": True, "sliding_window": 7}),
]


def _backends() -> dict[str, Ops]:
    backends: dict[str, Ops] = {"mlx": MlxOps()}
    if not why_unavailable():
        backends["native"] = make_ops(2, "exact")
    return backends


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.bits}bit-{config.head_dim}")
def test_s20_both_backends_agree_with_a_float64_model_that_rounds_its_rows(tmp_path: Path, config: TinyConfig) -> None:
    directory = write_tiny_checkpoint(tmp_path / "model", config, seed=5)
    tokens = np.random.default_rng(6).integers(0, config.vocab_size, 90).tolist()
    exact = NumpyQwen3Moe(directory).logits(tokens)
    expected = NumpyQwen3Moe(directory, int8_kv=True).logits(tokens)
    rounding = _rms(expected - exact)
    assert rounding > 1e-4 * np.abs(exact).max()  # there is something to tell apart
    found = {}
    for name, ops in _backends().items():
        model = load(directory, ops)
        driver = ModelDriver(model, make_pool(tmp_path, model.config, "int8"), range(1, 20))
        found[name] = np.stack([driver.logits({"a": [token]})["a"] for token in tokens])
        # Where float32 and float64 round an element to different neighbours, a few logits move; the others do not.
        assert np.median(np.abs(found[name] - expected)) <= 0.02 * rounding, name
        assert _rms(found[name] - expected) <= 0.2 * rounding, name
    if len(found) == 2:
        assert _rms(found["mlx"] - found["native"]) <= 0.2 * rounding


def _rms(errors: npt.NDArray[Any]) -> float:
    return float(np.sqrt((errors**2).mean()))


def test_a_rounded_row_is_within_half_a_127th_of_its_largest_and_keeps_its_sign() -> None:
    rng = np.random.default_rng(1)
    rows = (rng.standard_normal((50, 3, 40)) * 10.0 ** rng.integers(-30, 30, (50, 3, 1))).astype(np.float32)
    codes, scales = quantise(rows)
    assert (codes.dtype, scales.dtype, scales.shape) == (np.int8, np.float32, (50, 3))
    assert np.abs(codes).max(axis=-1).tolist() == [[LARGEST] * 3] * 50
    errors = np.abs(dequantise(codes, scales).astype(np.float64) - rows)
    assert (errors <= 0.501 * scales[..., None]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_reads_as_not_finite(bad: float) -> None:
    rows = np.ones((2, 8), np.float32)
    rows[1, 3] = bad
    read = dequantise(*quantise(rows))
    assert np.isfinite(read[0]).all()
    assert not np.isfinite(read[1]).any()


def test_rows_of_zeros_and_of_the_smallest_numbers_are_no_trouble() -> None:
    rows = np.array([[0.0, -0.0], [1e-45, -1e-45], [2.6e-43, 1e-43]], np.float32)
    codes, scales = quantise(rows)
    assert dequantise(codes, scales)[:2].tolist() == [[0, 0], [0, 0]]
    # The scale itself is rounded to a multiple of the smallest number.
    assert np.abs(dequantise(codes, scales)[2] - rows[2]).max() <= 64 * np.float32(1.5e-45)
