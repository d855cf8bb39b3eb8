"""config.json: every key that changes the mathematics is implemented, or refused by its name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx_lm.models.rope_utils import initialize_rope

from services.decoder.errors import CheckpointError
from services.decoder.loader import open_checkpoint
from services.decoder.model_config import ModelConfig, read_model_config
from services.decoder.models import load_model
from services.decoder.ops.mlx import MlxOps
from services.decoder.rope import read_rope
from tests.decoder.model_driver import ModelDriver, make_contiguous
from tests.decoder.tiny_models import TinyConfig, write_tiny_checkpoint

HEAD_DIM = 64


@pytest.fixture(scope="module")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("model"), TinyConfig(num_hidden_layers=4), eos_token_id=3)


def _read(checkpoint_dir: Path, tmp_path: Path, *removed: str, **changes: Any) -> ModelConfig:
    config = json.loads((checkpoint_dir / "config.json").read_text()) | changes
    for key in removed:
        config.pop(key)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(checkpoint_dir / "model.safetensors")
    return read_model_config(open_checkpoint(tmp_path))


def test_a_plain_config(checkpoint_dir: Path, tmp_path: Path) -> None:
    config = _read(checkpoint_dir, tmp_path)
    assert config.model_type == "qwen3_moe"
    assert config.moe_layers == (True, True, True, True)
    assert config.window_tokens == 0
    assert config.eos_token_ids == (3,)
    assert config.kv_dtype == "f32"
    assert config.rope.attention_factor == 1.0
    assert not config.tie_word_embeddings


def test_absent_keys_have_the_defaults_of_transformers(checkpoint_dir: Path, tmp_path: Path) -> None:
    removed = ("head_dim", "norm_topk_prob", "tie_word_embeddings", "mlp_only_layers", "decoder_sparse_step")
    config = _read(
        checkpoint_dir, tmp_path, *removed, "rope_theta", "num_key_value_heads", "rms_norm_eps", "eos_token_id"
    )
    assert config.head_dim == 64 // 4
    assert config.num_key_value_heads == 4
    assert not config.norm_topk_prob
    assert config.moe_layers == (True,) * 4
    assert config.rope.theta == 10_000.0
    assert config.rms_norm_eps == 1e-6
    assert config.eos_token_ids == ()


@pytest.mark.parametrize(
    ("dense", "step", "expected"),
    [
        ([], 2, (False, True, False, True)),
        ([1], 1, (True, False, True, True)),
        ([3], 2, (False, True, False, False)),
        (None, 3, (False, False, True, False)),
    ],
)
def test_dense_layers(checkpoint_dir: Path, tmp_path: Path, dense: Any, step: int, expected: tuple[bool, ...]) -> None:
    config = _read(checkpoint_dir, tmp_path, mlp_only_layers=dense, decoder_sparse_step=step)
    assert config.moe_layers == expected


def test_transformers_5_spells_num_experts_otherwise(checkpoint_dir: Path, tmp_path: Path) -> None:
    assert _read(checkpoint_dir, tmp_path, "num_experts", num_local_experts=8).num_experts == 8


@pytest.mark.parametrize(("window", "use", "expected"), [(7, True, 7), (7, False, 0), (None, True, 0)])
def test_sliding_window(checkpoint_dir: Path, tmp_path: Path, window: Any, use: bool, expected: int) -> None:
    config = _read(checkpoint_dir, tmp_path, sliding_window=window, use_sliding_window=use)
    assert config.window_tokens == expected


def test_eos_ids_of_both_files_stop(checkpoint_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 5]}))
    assert _read(checkpoint_dir, tmp_path, eos_token_id=[3, 5]).eos_token_ids == (3, 5, 9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, "model_type 'mixtral' is not served; served is 'qwen3_moe'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', which is not served; served is 'silu'"),
        ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size is 64"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types has 'linear_attention'"),
        ({"hidden_size": None}, "hidden_size is missing; add it"),
        ({"hidden_size": "64"}, "hidden_size must be a non-negative integer, not '64'"),
        ({"vocab_size": 0}, "vocab_size must be positive"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 is more than num_experts 8"),
        ({"mlp_only_layers": "all"}, "mlp_only_layers must be a list of layer indices"),
        ({"norm_topk_prob": 1}, "norm_topk_prob must be true or false, not 1"),
        ({"rms_norm_eps": -1}, "rms_norm_eps must be a positive number"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"eos_token_id": 96}, "eos_token_id 96 is not a token id below vocab_size 96"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id '</s>' is not a token id"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"rope_scaling.rope_type 'dynamic' is not served"),
        ({"rope_parameters": {"rope_type": "longrope"}}, r"rope_parameters.rope_type 'longrope' is not served"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "parameters per layer type are not served"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [1]}}, "rope_scaling.mrope_section"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor must be a number, not None"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object or null"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5 is not served"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor 0.25 is not served"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0, but must be positive"),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    checkpoint_dir: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"config.json: .*{message}"):
        _read(checkpoint_dir, tmp_path, **changes)


def _rope(**config: Any) -> Any:
    return read_rope(config, "config.json", HEAD_DIM, 32768)


def test_both_spellings_of_rope_theta() -> None:
    expected = 1e6 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    for config in (
        {"rope_theta": 1e6},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 1e6},
        {"rope_theta": 1e6, "rope_scaling": None, "rope_parameters": None},
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}},
    ):
        rope = _rope(**config)
        assert rope.theta == 1e6
        assert rope.inv_freq.dtype == np.float32
        assert np.allclose(rope.inv_freq, expected, rtol=1e-7)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"factor": 4.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize("form", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        ("llama3", LLAMA3),
        ("llama3", LLAMA3 | {"factor": 32.0, "high_freq_factor": 8.0}),
        ("yarn", YARN),
        ("yarn", YARN | {"beta_fast": 16.0, "beta_slow": 2.0}),
    ],
)
def test_scaled_frequencies_equal_those_of_mlx_lm(form: str, kind: str, parameters: dict[str, Any]) -> None:
    theta = 500_000.0
    key = "type" if form == "rope_scaling" else "rope_type"
    if form == "rope_scaling":
        rope = _rope(rope_theta=theta, rope_scaling={key: kind, **parameters})
    else:
        rope = _rope(rope_parameters={key: kind, "rope_theta": theta, **parameters})
    theirs = initialize_rope(HEAD_DIM, theta, False, {"type": kind, **parameters}, 32768)
    assert np.allclose(rope.inv_freq, 1.0 / np.array(theirs._freqs), rtol=2e-6)
    assert rope.attention_factor == pytest.approx(getattr(theirs, "mscale", 1.0))


def test_linear_scaling_divides_the_frequencies() -> None:
    scaled = _rope(rope_scaling={"type": "linear", "factor": 4.0})
    assert np.allclose(scaled.inv_freq, _rope().inv_freq / 4.0)
    assert scaled.attention_factor == 1.0


def test_yarn_attention_factor() -> None:
    """transformers: given, or from mscale and mscale_all_dim, or 0.1 ln(factor) + 1."""
    assert _rope(rope_scaling={"type": "yarn", **YARN}).attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    assert _rope(rope_scaling={"type": "yarn", **YARN, "attention_factor": 1.5}).attention_factor == 1.5
    both = _rope(rope_scaling={"type": "yarn", **YARN, "mscale": 0.7, "mscale_all_dim": 1.0})
    assert both.attention_factor == pytest.approx((0.07 * math.log(4) + 1) / (0.1 * math.log(4) + 1))
    # Only mscale_all_dim: transformers, unlike mlx-lm, then takes neither.
    single = _rope(rope_scaling={"type": "yarn", **YARN, "mscale_all_dim": 1.0})
    assert single.attention_factor == pytest.approx(0.1 * math.log(4) + 1)


def test_yarn_leaves_fast_dimensions_and_interpolates_slow_ones() -> None:
    plain, scaled = (
        _rope(rope_theta=1e4).inv_freq,
        _rope(rope_theta=1e4, rope_scaling={"type": "yarn", **YARN}).inv_freq,
    )
    assert scaled[0] == plain[0]
    assert scaled[-1] == pytest.approx(plain[-1] / 4.0)
    soft = _rope(rope_theta=1e4, rope_scaling={"type": "yarn", **YARN, "truncate": False}).inv_freq
    assert not np.array_equal(soft, scaled)


def test_scaling_and_window_reach_the_logits(tmp_path: Path) -> None:
    found = []
    for index, extra in enumerate(
        (
            {},
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            {"use_sliding_window": True, "sliding_window": 4},
        )
    ):
        directory = write_tiny_checkpoint(tmp_path / str(index), TinyConfig(extra=extra))
        checkpoint = open_checkpoint(directory)
        model = load_model(checkpoint, read_model_config(checkpoint), MlxOps())
        kv = make_contiguous(model.config)
        found.append(ModelDriver(model, kv, [kv.take()]).logits({"a": list(range(30))})["a"])
    for logits in found[1:]:
        assert np.abs(logits - found[0]).max() > 1e-3
