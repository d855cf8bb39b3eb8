"""The data file of a pool, byte for byte: the contract between the manager, which makes it, and its decoders.

`<pool_id>.kv` is one header page, then `num_blocks` blocks. A block holds all layers, and its stride is padded to a whole page:

    scales    int8 only: a float32 for each row, in the order of the rows
    rows      head_dim elements each, of K or V of one token, head and layer

The rows lie in the order of the layout: `[num_layers, 2, num_kv_heads, block_size]` for hnd, `[num_layers, 2, block_size,
num_kv_heads]` for nhd (K first, then V). A row of int8 stands for scale × element. The scales come first because a block begins on
a page, so that they are aligned whatever the sizes are, and a row's number finds both its scale and its elements.
All integers are little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

PAGE_BYTES = 4096
DATA_OFFSET_BYTES = PAGE_BYTES
MAGIC = b"LHPOOLKV"
FORMAT_VERSION = 1
POOL_ID_BYTES = 16

ELEMENT_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "int8": 1}
SCALE_BYTES = {"bf16": 0, "f16": 0, "f32": 0, "int8": 4}  # for each row of head_dim elements
LAYOUTS = ("hnd", "nhd")

# magic, format version, pool_id, num_blocks, block_stride_bytes,
# num_layers, num_kv_heads, block_size, head_dim, element_bytes, scale_bytes, index into LAYOUTS.
# The last two came later: a page of before has zeros there, which is what its blocks are like.
_HEADER = struct.Struct("<8sI16sQQIIIIIII")


@dataclass(frozen=True)
class RowStrides:
    """Distances between rows of a block, counted in rows."""

    layer: int
    value: int  # from K to V
    head: int
    token: int


@dataclass(frozen=True)
class BlockShape:
    """The sizes of one block, the bytes of an element and of a row's scale (0: none), and the order of the rows."""

    num_layers: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    element_bytes: int
    scale_bytes: int = 0
    layout: str = "hnd"

    @classmethod
    def of(
        cls, kv_dtype: str, layout: str, num_layers: int, num_kv_heads: int, block_size: int, head_dim: int
    ) -> BlockShape:
        """The shape for one of ELEMENT_BYTES and one of LAYOUTS; raises ValueError for another."""
        if kv_dtype not in ELEMENT_BYTES:
            raise ValueError(f"kv dtype {kv_dtype!r} is not one of {', '.join(ELEMENT_BYTES)}")
        if layout not in LAYOUTS:
            raise ValueError(f"kv layout {layout!r} is not one of {', '.join(LAYOUTS)}")
        sizes = (num_layers, num_kv_heads, block_size, head_dim)
        return cls(*sizes, ELEMENT_BYTES[kv_dtype], SCALE_BYTES[kv_dtype], layout)

    @property
    def num_rows(self) -> int:
        """Rows of head_dim elements in a block."""
        return self.num_layers * 2 * self.num_kv_heads * self.block_size

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's elements."""
        return self.head_dim * self.element_bytes

    @property
    def rows_offset_bytes(self) -> int:
        """Where the rows begin in a block: after the scales."""
        return self.num_rows * self.scale_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of scales and rows in a block, without padding."""
        return self.num_rows * (self.scale_bytes + self.row_bytes)

    @property
    def stride_bytes(self) -> int:
        """Distance between two blocks: block_bytes, rounded up to a whole page."""
        return -(-self.block_bytes // PAGE_BYTES) * PAGE_BYTES

    @property
    def row_strides(self) -> RowStrides:
        """Where the rows of a layer, K or V, a head and a token lie."""
        value = self.num_kv_heads * self.block_size
        head, token = (1, self.num_kv_heads) if self.layout == "nhd" else (self.block_size, 1)
        return RowStrides(layer=2 * value, value=value, head=head, token=token)


@dataclass(frozen=True)
class DataHeader:
    """What the header page of a data file says."""

    pool_id: bytes
    num_blocks: int
    shape: BlockShape

    @property
    def file_bytes(self) -> int:
        """Size of the whole file."""
        return DATA_OFFSET_BYTES + self.num_blocks * self.shape.stride_bytes

    def pack(self) -> bytes:
        """The header page, PAGE_BYTES long."""
        shape = self.shape
        packed = _HEADER.pack(
            MAGIC,
            FORMAT_VERSION,
            self.pool_id,
            self.num_blocks,
            shape.stride_bytes,
            shape.num_layers,
            shape.num_kv_heads,
            shape.block_size,
            shape.head_dim,
            shape.element_bytes,
            shape.scale_bytes,
            LAYOUTS.index(shape.layout),
        )
        return packed.ljust(PAGE_BYTES, b"\0")

    @classmethod
    def unpack(cls, page: bytes) -> DataHeader:
        """Reads a header page; raises ValueError when it is not one, or of another format version."""
        if len(page) < _HEADER.size or page[: len(MAGIC)] != MAGIC:
            raise ValueError("not a pool data file: its first bytes are not the pool's magic")
        _, version, pool_id, num_blocks, stride, *sizes = _HEADER.unpack_from(page)
        if version != FORMAT_VERSION:
            raise ValueError(f"pool format version {version} is not the supported version {FORMAT_VERSION}")
        layers, heads, block_size, head_dim, element_bytes, scale_bytes, layout = sizes
        if layout >= len(LAYOUTS):
            raise ValueError(f"layout {layout} of the blocks is unknown to this version")
        shape = BlockShape(layers, heads, block_size, head_dim, element_bytes, scale_bytes, LAYOUTS[layout])
        if shape.stride_bytes != stride:
            raise ValueError(
                f"block stride {stride} does not follow from the geometry: that gives {shape.stride_bytes}"
            )
        return cls(pool_id, num_blocks, shape)
