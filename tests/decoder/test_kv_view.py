"""Views of K/V: the mapped pool, and contiguous caches."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from protos.pool_format import DATA_OFFSET_BYTES, PAGE_BYTES, BlockShape, DataHeader
from services.decoder.errors import PoolExhaustedError
from services.decoder.kv_view import NUMPY_TYPES, ContiguousKv, KvView, PagedKv, copy_tokens

POOL_ID = bytes(range(1, 17))
SHAPE = BlockShape(num_layers=3, num_kv_heads=2, block_size=16, head_dim=20, element_bytes=2)
NUM_BLOCKS = 6


def _write_pool(path: Path, shape: BlockShape = SHAPE, num_blocks: int = NUM_BLOCKS) -> Path:
    header = DataHeader(POOL_ID, num_blocks, shape)
    with path.open("wb") as file:
        file.write(header.pack())
        file.truncate(header.file_bytes)
    return path


def _contiguous(kv_capacity: int = 21, max_seqs: int = 3, kv_dtype: str = "bf16", layout: str = "hnd") -> ContiguousKv:
    return ContiguousKv(
        num_layers=3,
        num_kv_heads=2,
        head_dim=20,
        kv_dtype=kv_dtype,
        kv_capacity=kv_capacity,
        max_seqs=max_seqs,
        layout=layout,
    )


def _filled(kv: KvView, block_ids: list[int]) -> dict[int, np.ndarray]:
    """What `gather` should give of blocks full of random numbers."""
    rng = np.random.default_rng(1)
    blocks = {}
    for block_id in block_ids:
        kv.block(block_id)[...] = elements = rng.integers(-127, 128, kv.block(block_id).shape).astype(
            NUMPY_TYPES[kv.kv_dtype]
        )
        blocks[block_id] = elements
        if kv.kv_dtype == "int8":
            kv.scales(block_id)[...] = scales = rng.standard_normal(elements.shape[:-1]).astype(np.float32)
            blocks[block_id] = elements * scales[..., None]
    return blocks


def _view(directory: Path, kind: str, kv_dtype: str, layout: str) -> KvView:
    """NUM_BLOCKS blocks of SHAPE's sizes."""
    if kind == "paged":
        shape = BlockShape.of(kv_dtype, layout, 3, 2, 16, 20)
        return PagedKv(_write_pool(directory / "pool.kv", shape), kv_dtype)
    kv = _contiguous(max_seqs=NUM_BLOCKS, kv_dtype=kv_dtype, layout=layout)
    for _ in range(NUM_BLOCKS):
        kv.take()
    return kv


VIEWS = [
    (kind, dtype, layout) for kind in ("paged", "contiguous") for dtype in NUMPY_TYPES for layout in ("hnd", "nhd")
]


@pytest.mark.parametrize(("kind", "kv_dtype", "layout"), VIEWS)
def test_gather_copies_one_layer_of_blocks_in_the_order_asked(
    tmp_path: Path, kind: str, kv_dtype: str, layout: str
) -> None:
    kv = _view(tmp_path, kind, kv_dtype, layout)
    blocks = _filled(kv, list(range(NUM_BLOCKS)))
    ids = np.array([4, 0, 5, 0], np.int32)
    for layer in range(3):
        for num_tokens in (None, 1, 7, 1000):
            gathered = kv.gather(ids, layer, num_tokens)
            assert np.array_equal(gathered, np.stack([blocks[i][layer, :, :, :num_tokens] for i in ids.tolist()]))
    gathered[...] = 0
    assert np.array_equal(kv.gather(np.array([4], np.int32), 2)[0], blocks[4][2])
    for table in (ids, ids.reshape(2, 2)):
        expected = [kv.block_bytes(block_id).ctypes.data for block_id in table.ravel().tolist()]
        assert kv.addresses(table).ravel().tolist() == expected
        assert kv.addresses(table).shape == table.shape
    for bad in (-1, NUM_BLOCKS):
        with pytest.raises(IndexError, match="within 6 blocks"):
            kv.gather(np.array([bad], np.int32), 0)
        with pytest.raises(IndexError, match="within 6 blocks"):
            kv.addresses(np.array([bad], np.int32))
        with pytest.raises(IndexError, match="within 6 blocks"):
            kv.block(bad)


def test_paged_blocks_lie_in_the_file_where_the_format_says(tmp_path: Path) -> None:
    path = _write_pool(tmp_path / "pool.kv")
    writer, reader = PagedKv(path, "f16"), PagedKv(path, "f16")
    writer.block(4)[2, 1, 0, 15, 19] = 0.5
    assert reader.block(4)[2, 1, 0, 15, 19] == 0.5  # the mapping is shared
    index = (((2 * 2 + 1) * 2 + 0) * 16 + 15) * 20 + 19
    offset = DATA_OFFSET_BYTES + 4 * SHAPE.stride_bytes + 2 * index
    assert path.read_bytes()[offset : offset + 2] == np.float16(0.5).tobytes()
    assert reader.pool_id == POOL_ID
    assert reader.shape == SHAPE
    assert reader.num_blocks == NUM_BLOCKS


@pytest.mark.parametrize("layout", ["hnd", "nhd"])
def test_s13_s20_rows_and_scales_lie_in_the_file_where_the_layout_says(tmp_path: Path, layout: str) -> None:
    """S13 and S20: both layouts and int8, found by plain arithmetic on the file's bytes."""
    shape = BlockShape.of("int8", layout, num_layers=3, num_kv_heads=2, block_size=16, head_dim=20)
    path = _write_pool(tmp_path / "pool.kv", shape)
    kv = PagedKv(path, "int8")
    kv.block(4)[2, 1, 1, 15, 19] = -77
    kv.scales(4)[2, 1, 1, 15] = 0.25
    row = (2 * 2 + 1) * 32 + (15 * 2 + 1 if layout == "nhd" else 1 * 16 + 15)
    block = path.read_bytes()[DATA_OFFSET_BYTES + 4 * shape.stride_bytes :][: shape.block_bytes]
    scales, rows = np.frombuffer(block, np.float32, count=192), np.frombuffer(block, np.int8, offset=4 * 192)
    assert (scales[row], rows[row * 20 + 19]) == (0.25, -77)
    assert (np.count_nonzero(scales), np.count_nonzero(rows)) == (1, 1)
    assert block == kv.block_bytes(4).tobytes()


@pytest.mark.parametrize(("kind", "kv_dtype", "layout"), VIEWS)
def test_a_partial_tail_is_copied_with_its_scales_and_nothing_else(
    tmp_path: Path, kind: str, kv_dtype: str, layout: str
) -> None:
    kv = _view(tmp_path, kind, kv_dtype, layout)
    before = _filled(kv, list(range(NUM_BLOCKS)))
    start, end = kv.shape.block_size + 3, kv.shape.block_size + 9
    copy_tokens(kv, np.array([0, 1], np.int32), np.array([2, 3], np.int32), start, end)
    expected = before | {3: before[3].copy()}
    expected[3][:, :, :, 3:9] = before[1][:, :, :, 3:9]
    for block_id in range(NUM_BLOCKS):
        for layer in range(3):
            found = kv.gather(np.array([block_id], np.int32), layer)[0]
            assert np.array_equal(found, expected[block_id][layer])


def test_only_int8_has_scales(tmp_path: Path) -> None:
    for kv in (_view(tmp_path, "paged", "f16", "hnd"), _view(tmp_path, "contiguous", "bf16", "nhd")):
        with pytest.raises(ValueError, match="only int8"):
            kv.scales(0)


def test_s17_a_paged_view_holds_no_kv_of_its_own(tmp_path: Path) -> None:
    path = _write_pool(tmp_path / "pool.kv", num_blocks=4000)
    tracemalloc.start()
    kv = PagedKv(path, "bf16")
    blocks = [kv.block(block_id) for block_id in range(200)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(blocks) == 200
    assert peak < 200_000  # a block has 3840 bytes
    assert path.stat().st_blocks * 512 <= 2 * PAGE_BYTES  # nothing was touched


def test_the_pool_id_is_read_through_the_mapping(tmp_path: Path) -> None:
    path = _write_pool(tmp_path / "pool.kv")
    kv = PagedKv(path, "bf16")
    path.unlink()
    _write_pool(path).write_bytes(b"another file of the same name")
    assert kv.pool_id == POOL_ID
    kv.close()
    path.unlink()
    again = PagedKv(_write_pool(path), "bf16")
    os.truncate(path, PAGE_BYTES)
    with pytest.raises(OSError, match="was cut"):
        _ = again.pool_id


def test_closing_waits_for_views_and_leaves_no_descriptor(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    kv = PagedKv(_write_pool(tmp_path / "pool.kv"), "bf16")
    view = kv.block(1)
    kv.close()
    view[...] = 7  # still mapped
    with pytest.raises(IndexError):
        kv.block(1)
    del view, kv
    assert len(os.listdir("/proc/self/fd")) == before


def test_files_that_are_not_the_pool_are_refused(tmp_path: Path) -> None:
    path = _write_pool(tmp_path / "pool.kv")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="elements have 2 bytes and scales 0, but f32 has 4 and 0"):
        PagedKv(path, "f32")
    with pytest.raises(ValueError, match="elements have 2 bytes and scales 0, but int8 has 1 and 4"):
        PagedKv(path, "int8")
    with pytest.raises(ValueError, match="'int4' is not one of bf16, f16, f32, int8"):
        PagedKv(path, "int4")
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(OSError, match="was cut"):
        PagedKv(path, "bf16")
    path.write_bytes(b"no pool at all")
    with pytest.raises(ValueError, match="magic"):
        PagedKv(path, "bf16")
    with pytest.raises(FileNotFoundError):
        PagedKv(tmp_path / "absent.kv", "bf16")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("kv_dtype", list(NUMPY_TYPES))
def test_s18_a_contiguous_cache_holds_its_own_kv(kv_dtype: str) -> None:
    kv = ContiguousKv(num_layers=2, num_kv_heads=1, head_dim=4, kv_dtype=kv_dtype, kv_capacity=5, max_seqs=2)
    first, second = kv.take(), kv.take()
    kv.block(first)[...] = 1
    assert not kv.block(second).any()
    assert kv.block(first).dtype == NUMPY_TYPES[kv_dtype]
    assert not np.shares_memory(kv.block_bytes(first), kv.block_bytes(second))


@pytest.mark.parametrize("kv_capacity", [1, 15, 16, 17, 2047])
def test_s19_contiguous_capacity_is_exact_and_only_paged_capacity_rounds_up(kv_capacity: int) -> None:
    kv = _contiguous(kv_capacity)
    assert kv.shape.block_size == kv_capacity
    assert kv.block(kv.take()).shape == (3, 2, 2, kv_capacity, 20)
    blocks_per_seq = -(-kv_capacity // SHAPE.block_size)
    assert 0 <= blocks_per_seq * SHAPE.block_size - kv_capacity < SHAPE.block_size


def test_s16_contiguous_caches_are_reused_last_in_first_out() -> None:
    kv = _contiguous()
    ids = [kv.take() for _ in range(3)]
    address = kv.block(ids[1]).ctypes.data
    kv.give_back(ids[0])
    kv.give_back(ids[1])
    assert kv.take() == ids[1]
    assert kv.block(ids[1]).ctypes.data == address
    assert kv.take() == ids[0]
    assert kv.num_allocated == 3
    assert kv.num_free == 0


def test_s33_contiguous_mode_allocates_no_pool_and_each_cache_when_first_taken(tmp_path: Path) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    kv = _contiguous(max_seqs=32)
    assert (kv.num_allocated, kv.num_free) == (0, 32)
    kv.give_back(kv.take())
    kv.give_back(kv.take())
    assert (kv.num_allocated, kv.num_free) == (1, 32)
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_contiguous_caches_run_out_with_a_typed_error_and_are_given_back_once() -> None:
    kv = _contiguous(max_seqs=1)
    taken = kv.take()
    with pytest.raises(PoolExhaustedError, match="--max-seqs"):
        kv.take()
    kv.give_back(taken)
    for bad in (taken, -1, 5):
        with pytest.raises(ValueError, match="is not taken"):
            kv.give_back(bad)
