"""The header page of a pool's data file."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.pool_format import DATA_OFFSET_BYTES, PAGE_BYTES, BlockShape, DataHeader

shapes = st.builds(
    BlockShape,
    num_layers=st.integers(1, 200),
    num_kv_heads=st.integers(1, 64),
    block_size=st.sampled_from([8, 16, 32]),
    head_dim=st.integers(1, 512),
    element_bytes=st.sampled_from([1, 2, 4]),
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


@pytest.mark.parametrize(
    ("offset", "message"),
    [(0, "magic"), (8, "version"), (36, "stride")],
)
def test_a_damaged_header_is_refused_and_says_what_is_wrong(offset: int, message: str) -> None:
    page = bytearray(DataHeader(bytes(16), 4, BlockShape(2, 2, 16, 64, 2)).pack())
    page[offset] ^= 0xFF
    with pytest.raises(ValueError, match=message):
        DataHeader.unpack(bytes(page))


def test_a_short_file_is_refused() -> None:
    with pytest.raises(ValueError, match="magic"):
        DataHeader.unpack(b"LHPOOLKV")
