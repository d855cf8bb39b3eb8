"""Inverse frequencies of rotary embeddings, from both forms that config.json has for them.

The formulas are those of transformers' modeling_rope_utils.py: linear, yarn (arXiv:2309.00071) and llama3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from services.decoder.errors import CheckpointError

_Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Rope:
    """Angles are position * inv_freq; cos and sin are multiplied by attention_factor."""

    theta: float
    inv_freq: npt.NDArray[np.float32]  # [head_dim / 2]
    attention_factor: float


def read_rope(config: Mapping[str, Any], where: str, head_dim: int, max_position_embeddings: int) -> Rope:
    """The rotary embedding that a config asks for; a CheckpointError names the key that cannot be served."""
    if head_dim % 2:
        raise CheckpointError(f"{where}: head_dim {head_dim} is odd; rotary embeddings need pairs")
    key, parameters = _parameters(config, where)
    theta = _number(parameters, "rope_theta", f"{where}: {key}", default=config.get("rope_theta") or 10_000.0)
    kind = parameters.get("rope_type", parameters.get("type", "default")) or "default"
    served = _KINDS.get(kind)
    if served is None:
        raise CheckpointError(
            f"{where}: {key}.rope_type {kind!r} is not served; served are {', '.join(sorted(_KINDS))}"
        )
    compute, keys = served
    if unknown := sorted(set(parameters) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"} - keys):
        raise CheckpointError(f"{where}: {key}.{unknown[0]} is not served for rope_type {kind!r}; remove the key")
    for partial in (parameters.get("partial_rotary_factor"), config.get("partial_rotary_factor")):
        if partial not in (None, 1, 1.0):
            raise CheckpointError(f"{where}: partial_rotary_factor {partial} is not served; only 1.0 is")
    if theta <= 0.0:
        raise CheckpointError(f"{where}: rope_theta is {theta}, but must be positive")
    inv_freq = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    # A checkpoint that states it beside the parameters means it; transformers gives that one priority, too.
    original = config.get("original_max_position_embeddings") or parameters.get("original_max_position_embeddings")
    context = _Context(parameters, f"{where}: {key}", theta, float(original or max_position_embeddings))
    scaled, attention_factor = compute(inv_freq, context)
    return Rope(theta, scaled.astype(np.float32), attention_factor)


@dataclass(frozen=True)
class _Context:
    parameters: Mapping[str, Any]
    where: str
    theta: float
    original_max_positions: float

    def number(self, key: str, default: float | None = None) -> float:
        return _number(self.parameters, key, self.where, default)


def _parameters(config: Mapping[str, Any], where: str) -> tuple[str, Mapping[str, Any]]:
    """The rope dictionary and the key it stands under; transformers prefers rope_scaling where both are."""
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        if not value:
            continue
        if not isinstance(value, Mapping):
            raise CheckpointError(f"{where}: {key} must be an object or null, not {value!r}")
        if nested := [name for name, inner in value.items() if isinstance(inner, Mapping)]:
            raise CheckpointError(f"{where}: {key}.{nested[0]}: parameters per layer type are not served")
        return key, value
    return "rope_parameters", {}


def _number(parameters: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    value = parameters.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise CheckpointError(f"{where}.{key} must be a number, not {value!r}")
    return float(value)


def _default(inv_freq: _Float64Array, context: _Context) -> tuple[_Float64Array, float]:
    return inv_freq, 1.0


def _linear(inv_freq: _Float64Array, context: _Context) -> tuple[_Float64Array, float]:
    return inv_freq / context.number("factor"), 1.0


def _llama3(inv_freq: _Float64Array, context: _Context) -> tuple[_Float64Array, float]:
    factor = context.number("factor")
    low, high = context.number("low_freq_factor"), context.number("high_freq_factor")
    if low == high:
        raise CheckpointError(f"{context.where}.low_freq_factor and high_freq_factor must differ")
    wavelength = 2.0 * math.pi / inv_freq
    smooth = (context.original_max_positions / wavelength - low) / (high - low)
    smoothed = (1.0 - smooth) * inv_freq / factor + smooth * inv_freq
    scaled = np.where(wavelength > context.original_max_positions / low, inv_freq / factor, smoothed)
    return np.where(wavelength < context.original_max_positions / high, inv_freq, scaled), 1.0


def _yarn(inv_freq: _Float64Array, context: _Context) -> tuple[_Float64Array, float]:
    parameters, half = context.parameters, len(inv_freq)
    factor = context.number("factor")
    low = _yarn_dimension(context.number("beta_fast", 32.0) or 32.0, 2 * half, context)
    high = _yarn_dimension(context.number("beta_slow", 1.0) or 1.0, 2 * half, context)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    if low == high:
        high += 0.001  # as in transformers: keeps the ramp finite
    ramp = np.clip((np.arange(half, dtype=np.float64) - low) / (high - low), 0.0, 1.0)
    scaled = inv_freq / factor * ramp + inv_freq * (1.0 - ramp)
    if parameters.get("attention_factor") is not None:
        return scaled, context.number("attention_factor")
    mscale, mscale_all_dim = context.number("mscale", 0.0), context.number("mscale_all_dim", 0.0)
    if mscale and mscale_all_dim:
        return scaled, _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all_dim)
    return scaled, _yarn_mscale(factor, 1.0)


def _yarn_dimension(rotations: float, head_dim: int, context: _Context) -> float:
    """The dimension whose pair makes that many rotations over the original context."""
    turns = context.original_max_positions / (rotations * 2.0 * math.pi)
    return head_dim * math.log(turns) / (2.0 * math.log(context.theta))


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


_Compute = Callable[[_Float64Array, _Context], tuple[_Float64Array, float]]
_ORIGINAL = "original_max_position_embeddings"
_KINDS: dict[str, tuple[_Compute, frozenset[str]]] = {
    "default": (_default, frozenset()),
    "linear": (_linear, frozenset({"factor"})),
    "llama3": (_llama3, frozenset({"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL})),
    "yarn": (
        _yarn,
        frozenset(
            {
                *("factor", _ORIGINAL, "attention_factor", "beta_fast", "beta_slow"),
                *("mscale", "mscale_all_dim", "truncate"),
            }
        ),
    ),
}
