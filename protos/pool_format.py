"""The data file of a pool, byte for byte: the contract between the manager, which makes it, and its decoders.

`<pool_id>.kv` is one header page, then `num_blocks` blocks. A block holds all layers, `[num_layers, 2, num_kv_heads,
block_size, head_dim]` (K first, then V), and its stride is padded to a whole page. All integers are little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

PAGE_BYTES = 4096
DATA_OFFSET_BYTES = PAGE_BYTES
MAGIC = b"LHPOOLKV"
FORMAT_VERSION = 1
POOL_ID_BYTES = 16

# magic, format version, pool_id, num_blocks, block_stride_bytes,
# num_layers, num_kv_heads, block_size, head_dim, element_bytes
_HEADER = struct.Struct("<8sI16sQQIIIII")


@dataclass(frozen=True)
class BlockShape:
    """The shape of one block, `[num_layers, 2, num_kv_heads, block_size, head_dim]`, and the bytes of an element."""

    num_layers: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    element_bytes: int

    @property
    def block_bytes(self) -> int:
        """Bytes of K/V in a block, without padding."""
        return self.num_layers * 2 * self.num_kv_heads * self.block_size * self.head_dim * self.element_bytes

    @property
    def stride_bytes(self) -> int:
        """Distance between two blocks: block_bytes, rounded up to a whole page."""
        return -(-self.block_bytes // PAGE_BYTES) * PAGE_BYTES


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
        )
        return packed.ljust(PAGE_BYTES, b"\0")

    @classmethod
    def unpack(cls, page: bytes) -> DataHeader:
        """Reads a header page; raises ValueError when it is not one, or of another format version."""
        if len(page) < _HEADER.size or page[: len(MAGIC)] != MAGIC:
            raise ValueError("not a pool data file: its first bytes are not the pool's magic")
        _, version, pool_id, num_blocks, stride, *dims = _HEADER.unpack_from(page)
        if version != FORMAT_VERSION:
            raise ValueError(f"pool format version {version} is not the supported version {FORMAT_VERSION}")
        shape = BlockShape(*dims)
        if shape.stride_bytes != stride:
            raise ValueError(
                f"block stride {stride} does not follow from the geometry: that gives {shape.stride_bytes}"
            )
        return cls(pool_id, num_blocks, shape)
