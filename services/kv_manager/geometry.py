"""What a pool stores: the shape and meaning of a block's K/V, fixed by the first worker that registers."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from protos.pool_format import ELEMENT_BYTES, LAYOUTS, BlockShape
from services.kv_manager.errors import PoolFileError, PoolMismatchError

FINGERPRINT_BYTES = 32


@dataclass(frozen=True)
class Geometry:
    """One group of layers with K/V of one shape. `window_tokens` 0 is no window.

    `kv_dtype` and `layout` are as `protos.pool_format` names them.
    """

    layer_ids: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    window_tokens: int
    kv_dtype: str
    layout: str
    model_fingerprint: bytes

    def shape(self, block_size: int) -> BlockShape:
        """The shape of one block of block_size tokens."""
        return BlockShape.of(
            self.kv_dtype,
            self.layout,
            num_layers=len(self.layer_ids),
            num_kv_heads=self.num_kv_heads,
            block_size=block_size,
            head_dim=self.head_dim,
        )

    def to_json(self) -> bytes:
        """The geometry as canonical JSON, for the superblock."""
        fields = dataclasses.asdict(self)
        fields["model_fingerprint"] = self.model_fingerprint.hex()
        return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Geometry:
        """Reads what to_json wrote; raises PoolFileError for anything else."""
        try:
            fields: dict[str, Any] = json.loads(text)
            fields["layer_ids"] = tuple(fields["layer_ids"])
            fields["model_fingerprint"] = bytes.fromhex(fields["model_fingerprint"])
            if fields["kv_dtype"] not in ELEMENT_BYTES or fields["layout"] not in LAYOUTS:
                raise ValueError(
                    f"kv_dtype {fields['kv_dtype']} or layout {fields['layout']} is unknown to this version"
                )
            return cls(**fields)
        except (ValueError, KeyError, TypeError) as error:
            raise PoolFileError(f"the superblock's geometry cannot be read: {error}") from error

    def require_same(self, other: Geometry) -> None:
        """Raises PoolMismatchError naming each field in which other, a worker's geometry, differs from the pool's."""
        differing = [
            field.name for field in dataclasses.fields(self) if getattr(self, field.name) != getattr(other, field.name)
        ]
        if not differing:
            return
        parts = [f"{name}: pool {_show(self, name)}, worker {_show(other, name)}" for name in differing]
        fix = (
            "start a second manager with another --pool-dir for this model, or stop this one and delete its pool files"
        )
        if set(differing) <= {"kv_dtype", "layout"}:
            fix = f"start the decoder with --kv-dtype {self.kv_dtype} --kv-layout {self.layout} as the pool has it; or {fix}"
        raise PoolMismatchError(
            f"this pool stores another geometry ({'; '.join(parts)}); {fix}", {"differing_fields": ",".join(differing)}
        )


def _show(geometry: Geometry, name: str) -> str:
    value = getattr(geometry, name)
    if isinstance(value, bytes):
        return value.hex()[:16]
    if isinstance(value, tuple):
        return f"{len(value)} layers {value[0]}..{value[-1]}"
    return str(value)
