"""One safetensors file, memory-mapped, with its tensors as views of the map.

Source: the format description at https://huggingface.co/docs/safetensors (8 bytes of header length, little-endian, a
JSON header with dtype, shape and data_offsets, then the data, to which the offsets are relative).
"""

from __future__ import annotations

import json
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from services.decoder.errors import CheckpointError

FLOAT_TYPES = ("F32", "F16", "BF16")
# BF16 has no NumPy type; its bits travel as uint16.
_NUMPY_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U32": "<u4"}


@dataclass(frozen=True, eq=False)
class MappedTensor:
    """See `ops.base.Tensor`. Any dtype can be mapped; those of FLOAT_TYPES and U32 can be read."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    mapping: mmap.mmap  # of the whole file
    _offset: int

    def numpy(self) -> npt.NDArray[Any]:
        """A read-only view of the mapped bytes, without a copy; BF16 comes as uint16."""
        count = int(np.prod(self.shape, dtype=np.int64))
        flat = np.frombuffer(self.mapping, dtype=_NUMPY_TYPES[self.dtype], count=count, offset=self._offset)
        return flat.reshape(self.shape)


@dataclass(frozen=True, eq=False)
class TensorSlice:
    """Part of a tensor along its second axis, for layouts that fuse two matrices; a `Tensor` as well."""

    whole: MappedTensor
    start: int
    stop: int

    @property
    def name(self) -> str:
        """The fused tensor's name with the rows taken of it."""
        return f"{self.whole.name}[:, {self.start}:{self.stop}]"

    @property
    def dtype(self) -> str:
        """As stored."""
        return self.whole.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The slice's own."""
        return (self.whole.shape[0], self.stop - self.start, *self.whole.shape[2:])

    def numpy(self) -> npt.NDArray[Any]:
        """A read-only, strided view of the mapped bytes, without a copy."""
        return self.whole.numpy()[:, self.start : self.stop]


def map_tensors(path: Path) -> dict[str, MappedTensor]:
    """Maps a file and lists its tensors; nothing is read but the header. A CheckpointError names what is wrong."""
    try:
        with safe_open(path, framework="numpy"):
            pass  # the library checks the header against the file's length, overlaps and gaps included
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a complete safetensors file ({error}); download it again") from error
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), os.fstat(file.fileno()).st_size, access=mmap.ACCESS_READ)
    header_bytes = int.from_bytes(mapped[:8], "little")
    header: dict[str, Any] = json.loads(mapped[8 : 8 + header_bytes])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        offset = 8 + header_bytes + entry["data_offsets"][0]
        tensors[name] = MappedTensor(name, entry["dtype"], tuple(entry["shape"]), path, mapped, offset)
    return tensors
