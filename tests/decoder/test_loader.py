"""Opening checkpoints: every layout, and an error that names file, tensor and fix for every way to be broken."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from services.decoder.errors import CheckpointError
from services.decoder.loader import INDEX_NAME, Checkpoint, open_checkpoint
from services.decoder.model_config import read_model_config
from services.decoder.models import load_model
from services.decoder.ops.base import LinearTensors
from services.decoder.ops.mlx import MlxOps
from tests.decoder.tiny_models import TinyConfig, write_tiny_checkpoint

SMALL = TinyConfig(num_hidden_layers=2, num_experts=3, head_dim=32)


def _load(directory: Path) -> None:
    checkpoint = open_checkpoint(directory)
    load_model(checkpoint, read_model_config(checkpoint), MlxOps())


def _edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _edit_tensors(directory: Path, edit: Callable[[dict[str, mx.array]], None]) -> None:
    path = directory / "model.safetensors"
    tensors = dict(mx.load(str(path)))
    mx.eval(tensors)
    edit(tensors)
    mx.save_safetensors(str(path), tensors)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_tensors_are_views_of_the_mapped_files(tmp_path: Path, dtype: str) -> None:
    write_tiny_checkpoint(tmp_path, TinyConfig(dtype=dtype, bits=4, head_dim=32, num_files=2))
    checkpoint = open_checkpoint(tmp_path)
    assert [path.name for path in checkpoint.weight_files] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    expected = {name: array for path in checkpoint.weight_files for name, array in mx.load(str(path)).items()}
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in checkpoint.tensors.items():
        array = expected[name]
        view = tensor.numpy()
        assert np.array_equal(view, np.array(array.view(mx.uint16) if tensor.dtype == "BF16" else array)), name
        assert tensor.shape == tuple(array.shape)
        assert not view.flags.writeable
        assert not view.flags.owndata
        assert np.shares_memory(view, tensor.numpy())


def _experts(checkpoint: Checkpoint, config: TinyConfig) -> list[np.ndarray]:
    parts = checkpoint.experts(
        "model.layers.0.mlp", config.num_experts, config.moe_intermediate_size, config.hidden_size
    )
    return [
        np.stack([expert.weight.numpy() for expert in part]) if isinstance(part, tuple) else part.weight.numpy()
        for part in parts
    ]


def test_the_three_layouts_of_experts_hold_the_same(tmp_path: Path) -> None:
    found = []
    for layout in ("separate", "stacked", "fused"):
        config = TinyConfig(layout=layout)
        found.append(_experts(open_checkpoint(write_tiny_checkpoint(tmp_path / layout, config)), config))
    for gate_up_down in zip(*found, strict=True):
        assert np.array_equal(gate_up_down[0], gate_up_down[1])
        assert np.array_equal(gate_up_down[0], gate_up_down[2])


def test_quantisation_is_seen_by_scales_with_bits_of_each_layer(tmp_path: Path) -> None:
    config = TinyConfig(
        bits=4,
        head_dim=32,
        layout="separate",
        bits_of={"mlp.gate": 8, "embed_tokens": 8, "layers.1.self_attn.q_proj": 0},
    )
    checkpoint = open_checkpoint(write_tiny_checkpoint(tmp_path, config))

    def bits(path: str, out_features: int, in_features: int) -> tuple[int, int, bool]:
        linear = checkpoint.linear(path, out_features, in_features)
        return linear.bits, linear.group_size, linear.scales is not None

    assert bits("model.layers.0.mlp.gate", 8, 64) == (8, 32, True)
    assert bits("model.embed_tokens", 96, 64) == (8, 32, True)
    assert bits("model.layers.0.self_attn.q_proj", 128, 64) == (4, 32, True)
    assert bits("model.layers.1.self_attn.q_proj", 128, 64) == (0, 0, False)
    gate, _, _ = checkpoint.experts("model.layers.0.mlp", 8, 32, 64)
    assert isinstance(gate, tuple)
    assert all(isinstance(expert, LinearTensors) and expert.bits == 4 for expert in gate)


def test_bits_that_only_the_tensors_tell_are_believed(tmp_path: Path) -> None:
    """mlx-lm writes no override where a converter forgot it; the shapes cannot lie."""
    write_tiny_checkpoint(tmp_path, TinyConfig(bits=8, head_dim=32))
    _edit_config(tmp_path, quantization={"bits": 4, "group_size": 64}, quantization_config=None)
    linear = open_checkpoint(tmp_path).linear("model.layers.0.mlp.gate", 8, 64)
    assert (linear.bits, linear.group_size) == (8, 32)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"bits": 3, "group_size": 32}, r"quantization.bits 3 is not served; served are \(4, 8\)"),
        ({"bits": 4, "group_size": 16}, "quantization.group_size 16 is not served"),
        ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, "quantization.mode 'mxfp4' is not served"),
        ({"bits": 4, "group_size": 32, "lm_head": {"mode": "nvfp4"}}, "quantization.lm_head.mode 'nvfp4' is not"),
        (
            {"bits": 4, "group_size": 32, "lm_head": {"bits": 8}},
            "quantization.lm_head.bits is 8, but the tensors have 4",
        ),
        ({"quant_method": "gptq", "bits": 4}, "quantization.quant_method 'gptq' is not served.*mlx_lm.convert"),
        ({"bits": 4, "zero_point": 3}, "quantization.zero_point is not served"),
        ("fp8", "quantization must be an object"),
    ],
)
@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_other_quantisation_is_refused_by_name(tmp_path: Path, key: str, quantization: Any, message: str) -> None:
    write_tiny_checkpoint(tmp_path, TinyConfig(bits=4, head_dim=32))
    other = "quantization_config" if key == "quantization" else "quantization"
    _edit_config(tmp_path, **{key: quantization, other: None})
    with pytest.raises(CheckpointError, match=message if key in message else message.replace("quantization", key, 1)):
        _load(tmp_path)


def test_packing_that_is_not_served_is_refused_by_the_layer(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, TinyConfig(bits=4, head_dim=32))

    def to_two_bits(tensors: dict[str, mx.array]) -> None:
        weight = mx.random.normal((96, 64))
        packed, scales, biases = mx.quantize(weight, 32, 2)
        tensors |= {"lm_head.weight": packed, "lm_head.scales": scales, "lm_head.biases": biases}

    _edit_tensors(tmp_path, to_two_bits)
    with pytest.raises(CheckpointError, match="lm_head is packed with 2 bits in groups of 32; served are bits"):
        _load(tmp_path)


def test_a_missing_directory_or_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent: no such directory; give the directory that holds config.json"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"config.json: no such file"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(CheckpointError, match=r"config.json: cannot be read as JSON .*line 1"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config.json: must hold a JSON object, not list"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no model.*safetensors; only the safetensors format is served"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("keep_bytes", [0, 7, 100, -1])
def test_a_truncated_file_is_named(tmp_path: Path, keep_bytes: int) -> None:
    path = write_tiny_checkpoint(tmp_path, SMALL) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep_bytes])
    with pytest.raises(
        CheckpointError, match=r"model.safetensors: not a complete safetensors file .*; download it again"
    ):
        open_checkpoint(tmp_path)


def test_a_header_that_lies_is_refused(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, SMALL)
    header = json.dumps({"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", [mx.uint32, mx.int64, mx.uint8])
def test_an_unserved_dtype_is_named_with_its_tensor(tmp_path: Path, dtype: mx.Dtype) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    write_tiny_checkpoint(tmp_path, SMALL)
    _edit_tensors(tmp_path, lambda tensors: tensors.update({name: tensors[name].astype(dtype)}))
    with pytest.raises(CheckpointError, match=f"tensor {name} has dtype [UI].* and no .scales beside it; convert it"):
        _load(tmp_path)


def test_scales_of_another_mode_are_refused(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, TinyConfig(bits=4, head_dim=32))
    _edit_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.scales": mx.zeros((96, 2), mx.uint8)}))
    with pytest.raises(
        CheckpointError, match="lm_head is quantised as U32 with U8 scales; served is MLX's affine mode"
    ):
        _load(tmp_path)


def test_tensors_that_no_layer_wants_may_be_anything(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, SMALL)
    _edit_tensors(tmp_path, lambda tensors: tensors.update({"rotary.step": mx.zeros((2,), mx.int64)}))
    _load(tmp_path)


def test_an_index_that_names_what_is_missing(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, TinyConfig(num_files=3))
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=rf"{INDEX_NAME}: names model-00002-of-00003.safetensors, which is missing"
    ):
        open_checkpoint(tmp_path)
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match="not beside the index"):
        open_checkpoint(tmp_path)
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": ["lm_head.weight"]}))
    with pytest.raises(CheckpointError, match="weight_map must map tensor names to file names"):
        open_checkpoint(tmp_path)
    first = "model-00001-of-00003.safetensors"
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"nowhere": first}}))
    with pytest.raises(CheckpointError, match=f"tensor nowhere should be in {first}, but is not"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.1.self_attn.k_norm.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.1.mlp.experts.2.down_proj.weight",
    ],
)
def test_a_missing_or_misshapen_tensor_is_named(tmp_path: Path, name: str) -> None:
    write_tiny_checkpoint(tmp_path, TinyConfig(num_hidden_layers=2, num_experts=3, layout="separate"))
    _edit_tensors(tmp_path, lambda tensors: tensors.update({name: tensors[name][:-1]}))
    with pytest.raises(CheckpointError, match=rf"tensor {name} has shape \[\d.*\], but config.json asks for \[\d"):
        _load(tmp_path)
    _edit_tensors(tmp_path, lambda tensors: tensors.__delitem__(name))
    with pytest.raises(CheckpointError, match=f"tensor {name} is missing from model.safetensors; download"):
        _load(tmp_path)


@pytest.mark.parametrize("name", ["lm_head.biases", "model.layers.0.mlp.switch_mlp.up_proj.biases"])
def test_scales_without_biases_are_named(tmp_path: Path, name: str) -> None:
    write_tiny_checkpoint(tmp_path, TinyConfig(bits=4, head_dim=32))
    _edit_tensors(tmp_path, lambda tensors: tensors.__delitem__(name))
    with pytest.raises(CheckpointError, match=f"tensor {name} is missing"):
        _load(tmp_path)


def test_a_tiny_checkpoint_can_have_a_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    write_tiny_checkpoint(tmp_path, TinyConfig(vocab_size=400), tokenizer=True, eos_token_id=0)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "the lease, naïve 東京 🦓"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert read_model_config(open_checkpoint(tmp_path)).eos_token_ids == (0,)
