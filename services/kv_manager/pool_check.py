"""The proof that a pool is consistent: what every test of the manager ends with. Looks into BlockPool's own fields."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from services.kv_manager import meta_format as fmt
from services.kv_manager.block_pool import BlockPool, BlockState


def check_pool(pool: BlockPool) -> None:
    """Proves that free list, states, holders, index, counts and headers agree; raises AssertionError. O(blocks)."""
    free = set(pool._free)
    assert len(free) == len(pool._free), "a block is in the free list twice"
    counts = [0] * len(BlockState)
    for block in range(pool.num_blocks):
        state, holders = pool._states[block], pool._holders[block]
        counts[state] += 1
        assert state == pool._derived_state(block), f"block {block} counts as {BlockState(state).name}"
        assert (state == BlockState.FREE) == (block in free), (
            f"block {block} is {BlockState(state).name}; free list differs"
        )
        if block in pool._contents:
            sharers = sum(1 << slot for slot, shared in enumerate(pool._shared) if block in shared)
            assert sharers == holders, f"block {block}: holders {holders:b}, references of {sharers:b}"
        else:
            assert holders.bit_count() <= 1, f"unsealed block {block} has holders {holders:b}"
    sealed = {content.content_hash: block for block, content in pool._contents.items() if content is not None}
    assert sealed == pool._index, "the index differs from the sealed blocks"
    assert {block for block in sealed.values() if not pool._holders[block]} == set(pool._cached)
    unverified = sum(content is not None and not content.verified for content in pool._contents.values())
    assert unverified == pool.num_unverified
    assert counts == pool._counts, f"counts are {pool._counts} and should be {counts}"
    assert sum(counts) == pool.num_blocks
    _check_headers(pool)


def check_references(pool: BlockPool, tables: Mapping[int, Sequence[int]]) -> None:
    """Proves that the holders are exactly those whose tables, one list of references a slot, name the block."""
    holders = [0] * pool.num_blocks
    for slot, references in tables.items():
        for block, count in Counter(references).items():
            holders[block] |= 1 << slot
            expected = pool._shared[slot].get(block, 0) if block in pool._contents else 1
            assert count == expected, f"slot {slot} has block {block} in {count} tables, and {expected} references"
    assert holders == pool._holders, "holders differ from the tables"


def _check_headers(pool: BlockPool) -> None:
    headers = dict(pool._meta.read_headers())
    for block in range(pool.num_blocks):
        holders, content = pool._holders[block], pool._contents.get(block)
        if block not in headers:
            assert block not in pool._contents, f"sealed block {block} is FREE on file"
            assert not holders, f"block {block} is FREE on file and held by {holders:b}"
            continue
        header = headers[block]
        assert header is not None, f"the header of block {block} fails its checksum"
        state, stated, on_file = header
        assert stated == holders, f"block {block}: holders {holders:b}, on file {stated:b}"
        expected = fmt.SEALED if content else fmt.VOID if block in pool._contents else fmt.LEASED
        assert state == expected, f"block {block} is {state:#x} on file and should be {expected:#x}"
        if on_file is not None and content is not None:
            assert on_file.content_hash == content.content_hash, f"block {block}: another hash on file"
            assert on_file.data_checksum == content.data_checksum
