"""The header page of a pool's data file."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.pool_format import DATA_OFFSET_BYTES, ELEMENT_BYTES, LAYOUTS, PAGE_BYTES, BlockShape, DataHeader

shapes = st.builds(
    BlockShape.of,
    kv_dtype=st.sampled_from(list(ELEMENT_BYTES)),
    layout=st.sampled_from(LAYOUTS),
    num_layers=st.integers(1, 200),
    num_kv_heads=st.integers(1, 64),
    block_size=st.sampled_from([8, 16, 32]),
    head_dim=st.integers(1, 512),
)


@given(shapes, st.integers(1, 1 << 20), st.binary(min_size=16, max_size=16))
def test_a_header_reads_back_as_it_was_written(shape: BlockShape, num_blocks: int, pool_id: bytes) -> None:
    header = DataHeader(pool_id, num_blocks, shape)
    page = header.pack()
    assert len(page) == PAGE_BYTES
    assert DataHeader.unpack(page) == header


@given(shapes)
def test_a_block_begins_on_a_page_and_pads_by_less_than_one(shape: BlockShape) -> None:
    assert DATA_OFFSET_BYTES % PAGE_BYTES == 0
    assert shape.stride_bytes % PAGE_BYTES == 0
    assert 0 <= shape.stride_bytes - shape.block_bytes < PAGE_BYTES


@given(shapes)
def test_s12_a_block_holds_a_row_for_each_layer_k_and_v_head_and_token_and_no_two_at_one_place(
    shape: BlockShape,
) -> None:
    strides, sizes = shape.row_strides, (shape.num_layers, 2, shape.num_kv_heads, shape.block_size)
    last = (
        (shape.num_layers - 1) * strides.layer
        + strides.value
        + (shape.num_kv_heads - 1) * strides.head
        + (shape.block_size - 1) * strides.token
    )
    assert last == shape.num_rows - 1
    by_stride = sorted(zip((strides.layer, strides.value, strides.head, strides.token), sizes, strict=True))
    expected = 1
    for stride, size in by_stride:  # each axis steps over the whole of the ones within it
        assert stride == expected or size == 1
        expected *= size
    assert shape.block_bytes == shape.rows_offset_bytes + shape.num_rows * shape.row_bytes
    assert shape.rows_offset_bytes == shape.num_rows * shape.scale_bytes


def test_int8_takes_about_half_of_bf16() -> None:
    """S20: at head_dim 128 a scale adds four bytes to 128."""
    sizes = {"num_layers": 48, "num_kv_heads": 4, "block_size": 16, "head_dim": 128}
    half, whole = BlockShape.of("int8", "hnd", **sizes), BlockShape.of("bf16", "hnd", **sizes)
    assert half.block_bytes * 256 == whole.block_bytes * 132


def test_a_page_of_before_scales_and_layouts_reads_as_what_it_was() -> None:
    header = DataHeader(bytes(16), 4, BlockShape.of("bf16", "hnd", 2, 2, 16, 64))
    assert header.pack()[64:] == bytes(PAGE_BYTES - 64)


@pytest.mark.parametrize(("kv_dtype", "layout", "named"), [("int4", "hnd", "kv dtype"), ("int8", "ndh", "kv layout")])
def test_an_unknown_dtype_or_layout_is_refused(kv_dtype: str, layout: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        BlockShape.of(kv_dtype, layout, 1, 1, 16, 8)


@pytest.mark.parametrize(
    ("offset", "message"),
    [(0, "magic"), (8, "version"), (36, "stride"), (64, "stride"), (68, "layout")],
)
def test_a_damaged_header_is_refused_and_says_what_is_wrong(offset: int, message: str) -> None:
    page = bytearray(DataHeader(bytes(16), 4, BlockShape(2, 2, 16, 64, 2)).pack())
    page[offset] ^= 0xFF
    with pytest.raises(ValueError, match=message):
        DataHeader.unpack(bytes(page))


def test_a_short_file_is_refused() -> None:
    with pytest.raises(ValueError, match="magic"):
        DataHeader.unpack(b"LHPOOLKV")
