"""Opens checkpoints in Hugging Face's layout: config.json, and one or many safetensors files."""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.decoder.errors import CheckpointError
from services.decoder.ops.base import ExpertTensors, LinearTensors, Tensor
from services.decoder.quantization import Quantization, read_quantization
from services.decoder.safetensors_file import FLOAT_TYPES, MappedTensor, TensorSlice, map_tensors

INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened checkpoint: its configs are read, its tensors mapped and not yet read."""

    directory: Path
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]  # empty when the file is absent
    weight_files: tuple[Path, ...]
    tensors: Mapping[str, MappedTensor]
    quantization: Quantization

    @property
    def mappings(self) -> list[mmap.mmap]:
        """The weight files as they are mapped, each once."""
        return list({id(tensor.mapping): tensor.mapping for tensor in self.tensors.values()}.values())

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> MappedTensor:
        """A tensor that must be there, with the shape it must have."""
        tensor = self._present(name, shape)
        if tensor.dtype not in FLOAT_TYPES:
            raise CheckpointError(
                f"{tensor.file}: tensor {name} has dtype {tensor.dtype} and no .scales beside it; convert it to one "
                f"of {', '.join(FLOAT_TYPES)}, or quantise it with mlx_lm.convert"
            )
        return tensor

    def linear(
        self, prefix: str, out_features: int, in_features: int, *, bias: bool = False, num_experts: int | None = None
    ) -> LinearTensors:
        """The linear layer under a prefix, quantised when it has `.scales`; with num_experts, a stack of them."""
        stack = () if num_experts is None else (num_experts,)
        bias_tensor = self.tensor(f"{prefix}.bias", (*stack, out_features)) if bias else None
        if f"{prefix}.scales" not in self.tensors:
            weight = self.tensor(f"{prefix}.weight", (*stack, out_features, in_features))
            return LinearTensors(weight, bias=bias_tensor)
        scales, weight = self._present(f"{prefix}.scales"), self._present(f"{prefix}.weight")
        bits, group_size = self.quantization.of(prefix, weight, scales, in_features)
        groups = (*stack, out_features, in_features // group_size)
        return LinearTensors(
            weight=self._present(weight.name, (*stack, out_features, in_features * bits // 32)),
            scales=self.tensor(scales.name, groups),
            biases=self.tensor(f"{prefix}.biases", groups),
            bits=bits,
            group_size=group_size,
            bias=bias_tensor,
        )

    def experts(
        self, prefix: str, num_experts: int, width: int, hidden: int
    ) -> tuple[ExpertTensors, ExpertTensors, ExpertTensors]:
        """gate, up and down of a layer's experts in any of three layouts.

        One linear layer each (`experts.N.gate_proj`, as published), a stack (`switch_mlp.gate_proj`, mlx-lm), or gate and up
        fused in one stack (`experts.gate_up_proj`, transformers 5 in memory).
        """
        if f"{prefix}.experts.gate_up_proj" in self.tensors:
            fused = self.tensor(f"{prefix}.experts.gate_up_proj", (num_experts, 2 * width, hidden))
            down = self.tensor(f"{prefix}.experts.down_proj", (num_experts, hidden, width))
            gate_up: list[Tensor] = [TensorSlice(fused, 0, width), TensorSlice(fused, width, 2 * width)]
            return LinearTensors(gate_up[0]), LinearTensors(gate_up[1]), LinearTensors(down)
        sizes = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
        if f"{prefix}.switch_mlp.gate_proj.weight" in self.tensors:
            stacked = [
                self.linear(f"{prefix}.switch_mlp.{name}", *size, num_experts=num_experts)
                for name, size in sizes.items()
            ]
            return stacked[0], stacked[1], stacked[2]
        single = [
            tuple(self.linear(f"{prefix}.experts.{expert}.{name}", *size) for expert in range(num_experts))
            for name, size in sizes.items()
        ]
        return single[0], single[1], single[2]

    def _present(self, name: str, shape: tuple[int, ...] | None = None) -> MappedTensor:
        tensor = self.tensors.get(name)
        if tensor is None:
            files = ", ".join(path.name for path in self.weight_files)
            raise CheckpointError(f"{self.directory}: tensor {name} is missing from {files}; download the model again")
        if shape is not None and tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}, but config.json asks for {list(shape)}"
            )
        return tensor


def open_checkpoint(model_dir: Path) -> Checkpoint:
    """Opens a checkpoint directory; a CheckpointError names the file, the tensor or key, and the fix."""
    if not model_dir.is_dir():
        raise CheckpointError(f"{model_dir}: no such directory; give the directory that holds config.json")
    config = _read_json(model_dir / "config.json")
    generation_path = model_dir / "generation_config.json"
    generation_config = _read_json(generation_path) if generation_path.exists() else {}
    quantization = read_quantization(config, str(model_dir / "config.json"))
    files, index = _weight_files(model_dir)
    tensors: dict[str, MappedTensor] = {}
    for path in files:
        tensors.update(map_tensors(path))
    for name, file_name in index.items():
        if name not in tensors or tensors[name].file.name != file_name:
            raise CheckpointError(
                f"{model_dir / INDEX_NAME}: tensor {name} should be in {file_name}, but is not; download both again"
            )
    return Checkpoint(model_dir, config, generation_config, tuple(files), tensors, quantization)


def _weight_files(model_dir: Path) -> tuple[list[Path], Mapping[str, str]]:
    """The weight files in the order of their names, and the index's map from tensor to file name."""
    index_path = model_dir / INDEX_NAME
    if not index_path.exists():
        files = sorted(model_dir.glob("model*.safetensors"))
        if not files:
            raise CheckpointError(f"{model_dir}: no model*.safetensors; only the safetensors format is served")
        return files, {}
    index = _read_json(index_path).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise CheckpointError(f"{index_path}: weight_map must map tensor names to file names")
    files = [model_dir / name for name in sorted(set(index.values()))]
    for path in files:
        if path.parent != model_dir:
            raise CheckpointError(f"{index_path}: {path.name} is not beside the index; weight files must be")
        if not path.exists():
            raise CheckpointError(f"{index_path}: names {path.name}, which is missing; download it")
    return files, index


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; a checkpoint needs it") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value
