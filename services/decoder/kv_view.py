"""Where the K/V bytes are, for a backend: the mapped pool, or caches of the decoder's own."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import grpc
import numpy as np
import numpy.typing as npt

from protos.pool_format import DATA_OFFSET_BYTES, ELEMENT_BYTES, PAGE_BYTES, SCALE_BYTES, BlockShape, DataHeader
from protos.rich_status import make_status
from services.decoder.errors import PoolExhaustedError
from services.decoder.int8_rows import dequantise

# bf16 has no NumPy type; its bits travel as uint16.
NUMPY_TYPES: dict[str, np.dtype[Any]] = {
    "bf16": np.dtype(np.uint16),
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "int8": np.dtype(np.int8),
}


class KvView(Protocol):
    """Blocks of K/V, `[num_layers, 2, num_kv_heads, block_size, head_dim]` each (K first), readable and writable in place.

    Axes are in this order whatever the layout; only strides differ. A contiguous cache is one block that is as long as the
    capacity, so a backend needs to know of blocks only.
    """

    kv_dtype: str  # a key of NUMPY_TYPES
    shape: BlockShape

    def block(self, block_id: int) -> npt.NDArray[Any]:
        """A writable view of one block's elements, without a copy; bf16 comes as uint16."""
        ...

    def scales(self, block_id: int) -> npt.NDArray[np.float32]:
        """A writable view `[num_layers, 2, num_kv_heads, block_size]` of an int8 block's scales; ValueError for others."""
        ...

    def block_bytes(self, block_id: int) -> npt.NDArray[np.uint8]:
        """All bytes of one block as they lie, scales included and padding not."""
        ...

    def gather(self, block_ids: npt.NDArray[np.int32], layer: int, num_tokens: int | None = None) -> npt.NDArray[Any]:
        """A copy [num_ids, 2, num_kv_heads, n, head_dim] of one layer of some blocks, n = min(block_size, num_tokens).

        int8 comes as float32, multiplied by its scales.
        """
        ...

    def addresses(self, block_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.uint64]:
        """The memory address of each block, same shape as block_ids, for native kernels."""
        ...


@runtime_checkable
class DeviceBlocks(Protocol):
    """Blocks that the host does not see: what it would do with their bytes is done where they are."""

    num_blocks: int

    def checksums(self, block_ids: Sequence[int]) -> list[int]:
        """CRC-32 of each block's bytes; raises IndexError for one that is not in this pool. From any thread."""
        ...

    def copy_tokens(self, source: int, target: int, first: int, end: int) -> None:
        """Copies the rows of the tokens at these places of a block from one to another; they are there when this returns."""
        ...


class PagedKv:
    """The manager's data file, mapped shared and writable. Raises OSError or ValueError when it is not what is expected."""

    def __init__(self, kv_path: Path, kv_dtype: str) -> None:
        _check_dtype(kv_dtype)
        self._path = kv_path
        self._file = os.open(kv_path, os.O_RDWR | os.O_CLOEXEC)
        try:
            header = DataHeader.unpack(os.pread(self._file, PAGE_BYTES, 0))
            check_elements(kv_path, header.shape, kv_dtype)
            self._file_bytes = header.file_bytes
            self._check_whole()
            self._map = mmap.mmap(self._file, header.file_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except BaseException:
            os.close(self._file)
            raise
        self.kv_dtype = kv_dtype
        self.shape = header.shape
        self.num_blocks = header.num_blocks
        # np.frombuffer, because its arrays keep the mapping from being closed under them; those of np.ndarray do not.
        mapped = np.frombuffer(self._map, np.uint8)[DATA_OFFSET_BYTES:]
        self._blocks = mapped.reshape(header.num_blocks, header.shape.stride_bytes)[:, : header.shape.block_bytes]

    @property
    def pool_id(self) -> bytes:
        """As the header in the mapping says now; raises OSError when the file is not whole any more."""
        self._check_whole()  # reading past the end of a file that was cut would be a SIGBUS
        return DataHeader.unpack(self._map[:PAGE_BYTES]).pool_id

    def block(self, block_id: int) -> npt.NDArray[Any]:
        """See `KvView.block`."""
        return rows_of(self.block_bytes(block_id), self.shape, self.kv_dtype)

    def scales(self, block_id: int) -> npt.NDArray[np.float32]:
        """See `KvView.scales`."""
        return scales_of(self.block_bytes(block_id), self.shape)

    def block_bytes(self, block_id: int) -> npt.NDArray[np.uint8]:
        """See `KvView.block_bytes`."""
        _check_ids(np.asarray(block_id), self.num_blocks)
        view: npt.NDArray[np.uint8] = self._blocks[block_id]
        return view

    def gather(self, block_ids: npt.NDArray[np.int32], layer: int, num_tokens: int | None = None) -> npt.NDArray[Any]:
        """See `KvView.gather`."""
        _check_ids(block_ids, self.num_blocks)
        copy: npt.NDArray[Any] = rows_of(self._blocks, self.shape, self.kv_dtype)[:, layer, :, :, :num_tokens][
            block_ids
        ]
        if not self.shape.scale_bytes:
            return copy
        return dequantise(copy, scales_of(self._blocks, self.shape)[:, layer, :, :, :num_tokens][block_ids])

    def addresses(self, block_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.uint64]:
        """See `KvView.addresses`."""
        _check_ids(block_ids, self.num_blocks)
        base = np.uint64(self._blocks.ctypes.data)
        return base + block_ids.astype(np.uint64) * np.uint64(self.shape.stride_bytes)

    def close(self) -> None:
        """Unmaps the file, once the last view of a block is gone, and closes it."""
        self._blocks = np.empty((0, self.shape.block_bytes), np.uint8)
        self.num_blocks = 0
        os.close(self._file)
        with contextlib.suppress(BufferError):  # a view of a block is still alive somewhere: the mapping goes with it
            self._map.close()

    def _check_whole(self) -> None:
        size = os.fstat(self._file).st_size
        if size < self._file_bytes:
            raise OSError(f"{self._path}: has {size} of {self._file_bytes} bytes; the file was cut")


class ContiguousKv:
    """One cache for each running request, exactly kv_capacity tokens long: a block each. Allocated when first taken.

    A cache that is given back is the first to be taken again.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        kv_dtype: str,
        kv_capacity: int,
        max_seqs: int,
        layout: str = "hnd",
    ) -> None:
        _check_dtype(kv_dtype)
        self.kv_dtype = kv_dtype
        self.shape = BlockShape.of(kv_dtype, layout, num_layers, num_kv_heads, kv_capacity, head_dim)
        self._max_seqs = max_seqs
        self._caches: list[npt.NDArray[np.uint8]] = []
        self._free: list[int] = []

    @property
    def num_allocated(self) -> int:
        """Caches that exist, taken or free."""
        return len(self._caches)

    @property
    def num_free(self) -> int:
        """Caches that can be taken."""
        return self._max_seqs - len(self._caches) + len(self._free)

    def take(self) -> int:
        """The id of a cache for one request; raises PoolExhaustedError when max_seqs are taken."""
        if self._free:
            return self._free.pop()
        if len(self._caches) == self._max_seqs:
            message = (
                f"all {self._max_seqs} contiguous caches are taken; raise --max-seqs, or send fewer requests at once"
            )
            raise PoolExhaustedError(make_status(grpc.StatusCode.RESOURCE_EXHAUSTED, message, reason="POOL_EXHAUSTED"))
        self._caches.append(np.zeros(self.shape.block_bytes, np.uint8))
        return len(self._caches) - 1

    def give_back(self, block_id: int) -> None:
        """Frees a cache that was taken; its bytes stay until the next request overwrites them."""
        if not 0 <= block_id < len(self._caches) or block_id in self._free:
            raise ValueError(f"contiguous cache {block_id} is not taken")
        self._free.append(block_id)

    def block(self, block_id: int) -> npt.NDArray[Any]:
        """See `KvView.block`."""
        return rows_of(self.block_bytes(block_id), self.shape, self.kv_dtype)

    def scales(self, block_id: int) -> npt.NDArray[np.float32]:
        """See `KvView.scales`."""
        return scales_of(self.block_bytes(block_id), self.shape)

    def block_bytes(self, block_id: int) -> npt.NDArray[np.uint8]:
        """See `KvView.block_bytes`."""
        _check_ids(np.asarray(block_id), len(self._caches))
        return self._caches[block_id]

    def gather(self, block_ids: npt.NDArray[np.int32], layer: int, num_tokens: int | None = None) -> npt.NDArray[Any]:
        """See `KvView.gather`."""
        _check_ids(block_ids, len(self._caches))
        copy = np.stack([self.block(block_id)[layer, :, :, :num_tokens] for block_id in block_ids])
        if not self.shape.scale_bytes:
            return copy
        return dequantise(copy, np.stack([self.scales(block_id)[layer, :, :, :num_tokens] for block_id in block_ids]))

    def addresses(self, block_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.uint64]:
        """See `KvView.addresses`."""
        _check_ids(block_ids, len(self._caches))
        table = np.array([cache.ctypes.data for cache in self._caches], np.uint64)
        found: npt.NDArray[np.uint64] = table[block_ids]
        return found


def copy_tokens(
    kv: KvView, sources: npt.NDArray[np.int32], targets: npt.NDArray[np.int32], start: int, end: int
) -> None:
    """Copies the K/V of the tokens from start up to end from one block table's blocks to another's.

    Nobody else may write to either's tokens meanwhile.
    """
    size = kv.shape.block_size
    for index in range(start // size, -(-end // size)):
        first, last = max(start - index * size, 0), min(end - index * size, size)
        source, target = int(sources[index]), int(targets[index])
        if isinstance(kv, DeviceBlocks):
            kv.copy_tokens(source, target, first, last)
            continue
        kv.block(target)[:, :, :, first:last] = kv.block(source)[:, :, :, first:last]
        if kv.shape.scale_bytes:
            kv.scales(target)[:, :, :, first:last] = kv.scales(source)[:, :, :, first:last]


def rows_of(blocks: npt.NDArray[np.uint8], shape: BlockShape, kv_dtype: str) -> npt.NDArray[Any]:
    """The elements `[..., num_layers, 2, num_kv_heads, block_size, head_dim]` of blocks' bytes `[..., block_bytes]`, a view."""
    dtype = NUMPY_TYPES[kv_dtype]
    elements = blocks[..., shape.rows_offset_bytes : shape.block_bytes].view(dtype)
    return _by_axis(elements.reshape(*blocks.shape[:-1], *_order(shape), shape.head_dim, copy=False), shape, 1)


def scales_of(blocks: npt.NDArray[np.uint8], shape: BlockShape) -> npt.NDArray[np.float32]:
    """The scales `[..., num_layers, 2, num_kv_heads, block_size]` of int8 blocks' bytes `[..., block_bytes]`, a view."""
    if not shape.scale_bytes:
        raise ValueError("only int8 K/V has scales")
    scales = blocks[..., : shape.rows_offset_bytes].view(np.float32)
    return _by_axis(scales.reshape(*blocks.shape[:-1], *_order(shape), copy=False), shape, 0)


def check_elements(kv_path: Path, shape: BlockShape, kv_dtype: str) -> None:
    """Raises ValueError when the blocks of a data file hold elements, or scales, of other sizes than the dtype's."""
    found, expected = (shape.element_bytes, shape.scale_bytes), (ELEMENT_BYTES[kv_dtype], SCALE_BYTES[kv_dtype])
    if found != expected:
        raise ValueError(
            f"{kv_path}: elements have {found[0]} bytes and scales {found[1]}, but {kv_dtype} has {expected[0]} and "
            f"{expected[1]}"
        )


def _check_dtype(kv_dtype: str) -> None:
    if kv_dtype not in NUMPY_TYPES:
        raise ValueError(f"kv dtype {kv_dtype!r} is not one of {', '.join(NUMPY_TYPES)}")


def _order(shape: BlockShape) -> tuple[int, int, int, int]:
    """The axes of the rows as they lie."""
    if shape.layout == "nhd":
        return shape.num_layers, 2, shape.block_size, shape.num_kv_heads
    return shape.num_layers, 2, shape.num_kv_heads, shape.block_size


def _by_axis(array: npt.NDArray[Any], shape: BlockShape, num_behind: int) -> npt.NDArray[Any]:
    """Heads before tokens, whatever the layout; num_behind axes stand behind these two."""
    return array.swapaxes(-2 - num_behind, -1 - num_behind) if shape.layout == "nhd" else array


def _check_ids(block_ids: npt.NDArray[Any], num_blocks: int) -> None:
    """NumPy would take a negative id from the end, and a kernel any id at all."""
    if block_ids.size and not 0 <= int(block_ids.min()) <= int(block_ids.max()) < num_blocks:
        raise IndexError(f"block ids {block_ids.tolist()} are not all within {num_blocks} blocks")
