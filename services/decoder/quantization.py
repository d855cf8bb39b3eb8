"""How a checkpoint's quantised tensors are packed: MLX's affine mode, 4 and 8 bits, with overrides per layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.decoder.errors import CheckpointError
from services.decoder.ops.base import Tensor
from services.decoder.safetensors_file import FLOAT_TYPES

SERVED_BITS = (4, 8)
SERVED_GROUP_SIZES = (32, 64, 128)
_OPTIONS = ("bits", "group_size", "mode", "quant_method")


@dataclass(frozen=True)
class Quantization:
    """What config.json states; the shapes of the tensors decide, as in mlx-lm, and a contradiction is refused."""

    where: str
    overrides: Mapping[str, tuple[str, Mapping[str, Any]]]  # by the layer's path: the key it stands under, and options

    def of(self, prefix: str, weight: Tensor, scales: Tensor, in_features: int) -> tuple[int, int]:
        """(bits, group_size) of a layer that has scales."""
        if scales.dtype not in FLOAT_TYPES or weight.dtype != "U32" or not weight.shape or not scales.shape:
            raise CheckpointError(
                f"{self.where}: {prefix} is quantised as {weight.dtype} with {scales.dtype} scales; served is MLX's "
                "affine mode, uint32 with float scales"
            )
        bits, rest = divmod(weight.shape[-1] * 32, in_features)
        group_size, group_rest = divmod(in_features, scales.shape[-1])
        if rest or group_rest or bits not in SERVED_BITS or group_size not in SERVED_GROUP_SIZES:
            raise CheckpointError(
                f"{self.where}: {prefix} is packed with {weight.shape[-1] * 32 / in_features:g} bits in groups of "
                f"{in_features / scales.shape[-1]:g}; served are bits {SERVED_BITS} and groups {SERVED_GROUP_SIZES}"
            )
        key, stated = self.overrides.get(prefix, ("", {}))
        for option, value in (("bits", bits), ("group_size", group_size)):
            if stated.get(option, value) != value:
                raise CheckpointError(
                    f"{self.where}: {key}.{prefix}.{option} is {stated[option]}, but the tensors have {value}"
                )
        return bits, group_size


def read_quantization(config: Mapping[str, Any], where: str) -> Quantization:
    """Reads `quantization` (MLX) and `quantization_config` (its copy, or another library's, which is refused)."""
    overrides: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for key in ("quantization_config", "quantization"):
        options = config.get(key)
        if options is None:
            continue
        if not isinstance(options, Mapping):
            raise CheckpointError(f"{where}: {key} must be an object, not {options!r}")
        _check_options(options, f"{where}: {key}")
        for path, value in options.items():
            if isinstance(value, Mapping):
                _check_options(value, f"{where}: {key}.{path}")
                overrides[path] = (key, value)
            elif path not in _OPTIONS and not isinstance(value, bool):
                raise CheckpointError(f"{where}: {key}.{path} is not served; convert the model with mlx_lm.convert")
    return Quantization(where, overrides)


def _check_options(options: Mapping[str, Any], where: str) -> None:
    if (method := options.get("quant_method")) not in (None, "mlx"):
        raise CheckpointError(f"{where}.quant_method {method!r} is not served; convert the model with mlx_lm.convert")
    if (mode := options.get("mode")) not in (None, "affine"):
        raise CheckpointError(f"{where}.mode {mode!r} is not served; served is 'affine'")
    if (bits := options.get("bits")) is not None and bits not in SERVED_BITS:
        raise CheckpointError(f"{where}.bits {bits!r} is not served; served are {SERVED_BITS}")
    if (size := options.get("group_size")) is not None and size not in SERVED_GROUP_SIZES:
        raise CheckpointError(f"{where}.group_size {size!r} is not served; served are {SERVED_GROUP_SIZES}")
