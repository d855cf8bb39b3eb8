"""Which block is free, and which worker slots hold the others. Knows blocks and slots, not leases or sessions.

A *reference* is one place in one table. An unsealed block has exactly one; a sealed or void block has any number, also
several of one slot. Memory is the truth while the manager runs, and every header is made to say the same before a
reply leaves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum

from services.kv_manager import meta_format as fmt
from services.kv_manager.errors import ManagerError
from services.kv_manager.meta_file import leased_record
from services.kv_manager.meta_format import Content
from services.kv_manager.pool_file import PoolFiles


class BlockState(IntEnum):
    """What a block counts as. QUARANTINED: only revoked or absent workers hold it."""

    FREE = 0
    LEASED = 1
    SEALED = 2
    CACHED = 3
    QUARANTINED = 4


_FREE, _LEASED, _SEALED, _CACHED, _QUARANTINED = (int(state) for state in BlockState)


# block, holders, whether it is sealed or void, and its content if sealed
RestoredBlock = tuple[int, int, bool, Content | None]


class NoFreeBlocksError(ManagerError):
    """Fewer free blocks than asked for; the lessor says it with the lease's name."""


class BlockPool:
    """The blocks of one pool. Each method is all or nothing, and O(1) a block."""

    def __init__(self, files: PoolFiles) -> None:
        """Every block is free; recovery.py fills in what the files say."""
        num_blocks = files.num_blocks
        self.files = files
        self.num_blocks = num_blocks
        self._meta = files.meta
        self._data = files.data
        self._states = bytearray(num_blocks)
        self._holders: list[int] = [0] * num_blocks
        # Last in, first out; ids come out 0, 1, 2, …
        self._free: list[int] = list(range(num_blocks - 1, -1, -1))
        self._counts = [num_blocks, 0, 0, 0, 0]
        # Sealed blocks, and void ones with None.
        self._contents: dict[int, Content | None] = {}
        self._shared: list[dict[int, int]] = [{} for _ in range(fmt.NUM_SLOTS)]
        self._leased_records: list[bytes] = [b""] * fmt.NUM_SLOTS
        self._revoked_slots = 0

    @property
    def num_free(self) -> int:
        """Blocks that an Acquire can have at once."""
        return len(self._free)

    def counts(self) -> dict[BlockState, int]:
        """Number of blocks in each state."""
        return {state: self._counts[state] for state in BlockState}

    def state(self, block: int) -> BlockState:
        """What the block counts as now."""
        return BlockState(self._states[block])

    def is_held_by(self, block: int, slot: int) -> bool:
        """Whether the slot has a reference to the block."""
        return bool(self._holders[block] >> slot & 1)

    def restore(self, entries: Iterable[RestoredBlock]) -> dict[int, list[int]]:
        """Enters what recovery read from the files into a new pool; answers the blocks that each slot holds.

        A slot counts as holding one reference of each; its worker's claims say how many there are.
        """
        held: dict[int, list[int]] = {}
        for block, holders, is_shared, content in entries:
            self._holders[block] = holders
            if is_shared:
                self._contents[block] = content
            while holders:
                slot = holders.bit_length() - 1
                holders &= ~(1 << slot)
                held.setdefault(slot, []).append(block)
                if is_shared:
                    self._shared[slot][block] = 1
            self._recount(block)
        self._free = [block for block in range(self.num_blocks - 1, -1, -1) if self._states[block] == _FREE]
        return held

    def is_shared(self, block: int) -> bool:
        """Whether the block may have several references: it is sealed or void."""
        return block in self._contents

    def open_slot(self, slot: int, epoch: int) -> None:
        """Prepares a slot for a session's blocks."""
        self._leased_records[slot] = leased_record(slot, epoch)

    def take(self, slot: int, count: int) -> list[int]:
        """Leases count free blocks to the slot; raises NoFreeBlocksError or StorageFullError and changes nothing."""
        if count > len(self._free):
            raise NoFreeBlocksError(f"{count} blocks asked for, {len(self._free)} free")
        if count <= 0:
            return []
        blocks = self._free[: -count - 1 : -1]
        self._data.ensure(blocks)
        try:
            self._meta.write_leased(blocks, self._leased_records[slot])
        except BaseException:
            self._rewrite(blocks)
            raise
        del self._free[-count:]
        bit = 1 << slot
        state = _QUARANTINED if self._revoked_slots & bit else _LEASED
        states, holders = self._states, self._holders
        for block in blocks:
            states[block] = state
            holders[block] = bit
        self._counts[_FREE] -= count
        self._counts[state] += count
        return blocks

    def drop(self, slot: int, blocks: Sequence[int]) -> int:
        """Drops one reference of the slot for each entry of blocks; answers how many blocks nobody holds any more.

        The last block is given back first, so that the next table of the same length comes out in the same order, and
        deeper blocks of a chain are evicted before their parents.
        """
        contents = self._contents
        freed = [block for block in reversed(blocks) if block not in contents]
        shared = [block for block in reversed(blocks) if block in contents] if len(freed) < len(blocks) else []
        try:
            self._meta.write_free(freed)
            num_let_go = self._drop_shared(slot, shared)
        except BaseException:
            self._rewrite(blocks)
            raise
        state = _QUARANTINED if self._revoked_slots >> slot & 1 else _LEASED
        states, holders = self._states, self._holders
        for block in freed:
            states[block] = _FREE
            holders[block] = 0
        self._counts[state] -= len(freed)
        self._counts[_FREE] += len(freed)
        self._free += freed
        return len(freed) + num_let_go

    def share(self, slot: int, block: int) -> None:
        """Adds a reference of the slot to a sealed or void block."""
        references = self._shared[slot]
        count = references.get(block, 0)
        if count == 0:
            self._set_holders(block, self._holders[block] | 1 << slot)
        references[block] = count + 1

    def set_revoked(self, slot: int, revoked: bool, blocks: Sequence[int]) -> None:
        """Marks a slot as revoked or healthy; blocks is all that it holds."""
        bit = 1 << slot
        self._revoked_slots = self._revoked_slots | bit if revoked else self._revoked_slots & ~bit
        for block in blocks:
            self._recount(block)

    def _drop_shared(self, slot: int, blocks: Sequence[int]) -> int:
        references = self._shared[slot]
        num_let_go = 0
        for block in blocks:
            if references[block] > 1:
                references[block] -= 1
                continue
            holders = self._holders[block] & ~(1 << slot)
            self._set_holders(block, holders)
            del references[block]
            num_let_go += holders == 0
        return num_let_go

    def _set_holders(self, block: int, holders: int) -> None:
        content = self._contents[block]
        if content is not None:
            self._meta.write_holders(block, holders, content)
        elif holders:
            self._meta.write_void(block, holders)
        else:
            self._meta.write_free([block])
            del self._contents[block]
            self._free.append(block)
        self._holders[block] = holders
        self._recount(block)

    def _recount(self, block: int) -> None:
        state = self._derived_state(block)
        self._counts[self._states[block]] -= 1
        self._counts[state] += 1
        self._states[block] = state

    def _derived_state(self, block: int) -> int:
        holders = self._holders[block]
        if not holders:
            return _CACHED if block in self._contents else _FREE
        if not holders & ~self._revoked_slots:
            return _QUARANTINED
        return _SEALED if block in self._contents else _LEASED

    def _rewrite(self, blocks: Sequence[int]) -> None:
        """Makes headers say again what memory says, after a store among them failed."""
        for block in blocks:
            holders, content = self._holders[block], self._contents.get(block)
            if content is not None:
                self._meta.write_sealed(block, holders, content)
            elif block in self._contents:
                self._meta.write_void(block, holders)
            elif holders:
                self._meta.write_leased([block], self._leased_records[holders.bit_length() - 1])
            else:
                self._meta.write_free([block])

    def check(self) -> None:
        """Proves that free list, states, holders, references, counts and headers agree; raises AssertionError."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is in the free list twice"
        counts = [0] * len(BlockState)
        for block in range(self.num_blocks):
            state, holders = self._states[block], self._holders[block]
            counts[state] += 1
            assert state == self._derived_state(block), f"block {block} counts as {BlockState(state).name}"
            assert (state == _FREE) == (block in free), f"block {block} is {BlockState(state).name}; free list differs"
            if block in self._contents:
                sharers = sum(1 << slot for slot, shared in enumerate(self._shared) if block in shared)
                assert sharers == holders, f"block {block}: holders {holders:b}, references of {sharers:b}"
            else:
                assert holders.bit_count() <= 1, f"unsealed block {block} has holders {holders:b}"
        assert counts == self._counts, f"counts are {self._counts} and should be {counts}"
        assert sum(counts) == self.num_blocks
        self._check_headers()

    def check_references(self, tables: Mapping[int, Sequence[int]]) -> None:
        """Proves that the holders are exactly those whose tables, one list of references a slot, name the block."""
        holders = [0] * self.num_blocks
        for slot, references in tables.items():
            for block, count in Counter(references).items():
                holders[block] |= 1 << slot
                expected = self._shared[slot].get(block, 0) if block in self._contents else 1
                assert count == expected, f"slot {slot} has block {block} in {count} tables, and {expected} references"
        assert holders == self._holders, "holders differ from the tables"

    def _check_headers(self) -> None:
        states = self._meta.header_states()
        for block, on_file in enumerate(states):
            holders = self._holders[block]
            if on_file == fmt.FREE:
                assert block not in self._contents, f"sealed block {block} is FREE on file"
                assert not holders, f"block {block} is FREE on file and held by {holders:b}"
                continue
            header = self._meta.read_header(block)
            assert header.holders == holders, f"block {block}: holders {holders:b}, on file {header.holders:b}"
            content = self._contents.get(block)
            expected = fmt.SEALED if content else fmt.VOID if block in self._contents else fmt.LEASED
            assert on_file == expected, f"block {block} is {on_file:#x} on file and should be {expected:#x}"
