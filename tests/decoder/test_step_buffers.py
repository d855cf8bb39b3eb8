"""The step buffers: rows S1, S3, S4, S28, S34 and S35 of BEHAVIOURS.md."""

from __future__ import annotations

import pytest

from services.decoder.sequence import Chunk, Sequence
from services.decoder.step_buffers import StepBuffers
from tests.decoder.engine_fakes import make_request

BLOCK = 4


def make_sequence(name: str, num_prompt: int, block_ids: list[int], num_computed: int = 0) -> Sequence:
    sequence = Sequence(make_request(name, num_prompt), 0)
    sequence.take_seat(1, len(block_ids))
    sequence.take_blocks(block_ids)
    sequence.start(num_computed, None)
    return sequence


def test_mixed_batch_is_laid_out_row_by_row() -> None:
    buffers = StepBuffers(64)
    buffers.pin(4, 8)
    decoding = make_sequence("decoding", 6, [3, 0], num_computed=5)
    prefilling = make_sequence("prefilling", 11, [7, 5, 2], num_computed=4)
    batch = buffers.fill([Chunk(decoding, 1), Chunk(prefilling, 5)], BLOCK)
    assert batch.cu_seqlens.tolist() == [0, 1, 6]
    assert batch.context_lens.tolist() == [5, 4]
    assert batch.positions.tolist() == [5, 4, 5, 6, 7, 8]
    assert batch.token_ids.tolist() == [decoding.token_ids[5], *prefilling.token_ids[4:9]]
    assert batch.slot_mapping.tolist() == [1, 20, 21, 22, 23, 8]
    assert batch.block_tables.tolist() == [[3, 0, 0], [7, 5, 2]]
    assert batch.sample_rows.tolist() == [0]  # the prefill does not reach its last token
    assert [how.position for how in batch.sampling] == [0]


def test_s1_buffers_grow_only_when_a_step_needs_more() -> None:
    buffers = StepBuffers(1000)
    buffers.pin(4, 300)
    long = make_sequence("long", 1000, list(range(250)))
    first = buffers.capacity_tokens
    buffers.fill([Chunk(long, first)], BLOCK)
    assert buffers.capacity_tokens == first
    buffers.fill([Chunk(long, first + 1)], BLOCK)
    grown = buffers.capacity_tokens
    assert grown > first
    before = buffers.fill([Chunk(long, 3)], BLOCK).token_ids.base
    assert buffers.fill([Chunk(long, 2)], BLOCK).token_ids.base is before
    assert buffers.capacity_tokens == grown


def test_s3_growth_is_geometric_and_bounded() -> None:
    buffers = StepBuffers(100)
    buffers.pin(2, 50)
    long = make_sequence("long", 150, list(range(40)))
    sizes = set()
    for num_tokens in range(1, 101):
        buffers.fill([Chunk(long, num_tokens)], BLOCK)
        sizes.add(buffers.capacity_tokens)
    assert len(sizes) <= 3
    assert max(sizes) == 100
    with pytest.raises(ValueError, match="101 tokens"):
        buffers.fill([Chunk(long, 101)], BLOCK)


def test_s4_growth_between_admission_and_decode_keeps_the_pinned_buffers() -> None:
    buffers = StepBuffers(4096)
    buffers.pin(32, 64)
    few = [make_sequence(f"few-{i}", 9, [3 * i, 3 * i + 1, 3 * i + 2]) for i in range(17)]
    buffers.fill([Chunk(sequence, 1) for sequence in few], BLOCK)
    small = buffers.capacity_tokens
    batch = buffers.fill([Chunk(sequence, 9) for sequence in few], BLOCK)
    assert buffers.capacity_tokens > small
    assert buffers.pinned == (32, 64)
    assert batch.block_tables.tolist() == [sequence.block_ids.tolist() for sequence in few]
    for sequence in few:
        sequence.num_computed = 8
    batch = buffers.fill([Chunk(sequence, 1) for sequence in few], BLOCK)
    assert batch.context_lens.tolist() == [8] * 17
    assert batch.slot_mapping.tolist() == [(3 * i + 2) * BLOCK for i in range(17)]


def test_s35_without_pinned_dimensions_growth_makes_no_paged_buffers() -> None:
    buffers = StepBuffers(64)
    assert buffers.pinned is None
    with pytest.raises(ValueError, match="not pinned"):
        buffers.fill([Chunk(make_sequence("early", 3, [0]), 3)], BLOCK)


def test_s34_a_row_that_held_a_longer_table_shows_nothing_of_it() -> None:
    buffers = StepBuffers(64)
    buffers.pin(2, 8)
    longer = make_sequence("longer", 30, [1, 2, 3, 4, 5, 6, 7, 8])
    buffers.fill([Chunk(longer, 1)], BLOCK)
    short, long = make_sequence("short", 3, [9]), make_sequence("long", 10, [10, 11, 12])
    batch = buffers.fill([Chunk(short, 3), Chunk(long, 10)], BLOCK)
    assert batch.block_tables.tolist() == [[9, 0, 0], [10, 11, 12]]


def test_s28_a_sequence_that_starts_over_has_no_context() -> None:
    buffers = StepBuffers(64)
    buffers.pin(2, 8)
    sequence = make_sequence("recycled", 7, [1, 2], num_computed=6)
    assert buffers.fill([Chunk(sequence, 1)], BLOCK).context_lens.tolist() == [6]
    sequence.unseat()
    assert sequence.num_computed == 0
    assert len(sequence.block_ids) == 0
    sequence.take_seat(2, 2)
    sequence.take_blocks([5, 6])
    sequence.start(0, None)
    assert buffers.fill([Chunk(sequence, 7)], BLOCK).context_lens.tolist() == [0]


def test_a_chunk_beyond_its_blocks_is_refused_before_anything_is_written() -> None:
    buffers = StepBuffers(64)
    buffers.pin(2, 8)
    with pytest.raises(ValueError, match="do not fit"):
        buffers.fill([Chunk(make_sequence("tight", 9, [1, 2]), 9)], BLOCK)
    with pytest.raises(ValueError, match="exceeds"):
        buffers.fill([Chunk(make_sequence(f"{i}", 3, [i]), 1) for i in range(3)], BLOCK)
