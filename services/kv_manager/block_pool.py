"""Which block is free, which worker slots hold the others, and which content is where. Knows no leases or sessions.

A *reference* is one place in one table. An unsealed block has exactly one; a sealed or void block has any number, also
several of one slot. Memory is the truth while the manager runs, and every header is made to say the same before a
reply leaves.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from enum import IntEnum

from services.kv_manager import meta_format as fmt
from services.kv_manager.errors import ManagerError, StorageFullError
from services.kv_manager.events import EventRing
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

    def __init__(self, files: PoolFiles, events: EventRing) -> None:
        """Every block is free; recovery.py fills in what the files say. events hears what is stored and removed."""
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
        # Content hash of every sealed block.
        self._index: dict[bytes, int] = {}
        # CACHED blocks, the next to be evicted first. OrderedDict, because a plain dict's front is not O(1).
        self._cached: OrderedDict[int, None] = OrderedDict()
        # Blocks whose bytes are being read, and how often: not to be evicted.
        self._pins: Counter[int] = Counter()
        self._events = events
        self.num_unverified = 0
        self.num_evicted = 0
        self._shared: list[dict[int, int]] = [{} for _ in range(fmt.NUM_SLOTS)]
        self._leased_records: list[bytes] = [b""] * fmt.NUM_SLOTS
        self._revoked_slots = 0

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds and that hold nothing."""
        return len(self._free)

    @property
    def num_available(self) -> int:
        """Blocks that a lease can have at once: free ones, and cached ones that can be evicted."""
        pinned = sum(block in self._cached for block in self._pins) if self._pins else 0
        return len(self._free) + len(self._cached) - pinned

    def counts(self) -> dict[BlockState, int]:
        """Number of blocks in each state."""
        return {state: self._counts[state] for state in BlockState}

    def states(self) -> bytes:
        """The state of every block, a byte each."""
        return bytes(self._states)

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
        states, contents, index = self._states, self._contents, self._index
        for block, holders, is_shared, content in entries:
            if is_shared:
                contents[block] = content
            if content is not None:
                index[content.content_hash] = block
            if not holders:
                states[block] = _CACHED
                continue
            self._holders[block] = holders
            states[block] = self._derived_state(block)
            while holders:
                slot = holders.bit_length() - 1
                holders &= ~(1 << slot)
                held.setdefault(slot, []).append(block)
                if is_shared:
                    self._shared[slot][block] = 1
        self.num_unverified = len(index)
        self._counts = [states.count(state) for state in BlockState]
        self._free = [block for block in range(self.num_blocks - 1, -1, -1) if states[block] == _FREE]
        self._cached = OrderedDict.fromkeys(self._deepest_first())
        return held

    def _deepest_first(self) -> list[int]:
        """The cached blocks, each before its parent; nothing else is known about their order after a restart."""
        depths: dict[int, int] = {}
        parents = {block: self._index.get(content.parent_hash) for block, content in self._contents.items() if content}
        for start in parents:
            chain: list[int] = []
            block: int | None = start
            while block is not None and block not in depths:
                chain.append(block)
                depths[block] = 0  # ends a cycle, which only a damaged file could have
                block = parents[block]
            depth = depths[block] if block is not None else 0
            for block in reversed(chain):
                depth += 1
                depths[block] = depth
        cached = [block for block in self._index.values() if not self._holders[block]]
        return sorted(cached, key=depths.__getitem__, reverse=True)

    def is_shared(self, block: int) -> bool:
        """Whether the block may have several references: it is sealed or void."""
        return block in self._contents

    def is_last_reference(self, slot: int, block: int) -> bool:
        """Whether the block becomes available when the slot drops one reference to it."""
        return self._holders[block] == 1 << slot and self._shared[slot].get(block, 1) == 1

    def open_slot(self, slot: int, epoch: int) -> None:
        """Prepares a slot for a session's blocks."""
        self._leased_records[slot] = leased_record(slot, epoch)

    def take(self, slot: int, count: int) -> list[int]:
        """Leases count blocks to the slot, free ones first, then the longest unused cached ones.

        Raises NoFreeBlocksError or StorageFullError; no lease is changed then.
        """
        if count <= 0:
            return []
        if count > len(self._free):
            if count > self.num_available:
                raise NoFreeBlocksError(f"{count} blocks asked for, {self.num_available} available")
            self._evict(count - len(self._free))
        blocks = self._free[: -count - 1 : -1]
        try:
            self._data.ensure(blocks)
        except StorageFullError:
            if count > self.num_available - len(self._free):
                raise
            # The disk is full, but cached blocks have their room already.
            self._evict(count)
            blocks = self._free[: -count - 1 : -1]
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

    def _evict(self, count: int) -> None:
        victims: list[int] = []
        for block in self._cached:
            if len(victims) == count:
                break
            if block not in self._pins:
                victims.append(block)
        for block in victims:
            self.discard(block)
        self.num_evicted += len(victims)

    def drop(self, slot: int, blocks: Sequence[int]) -> int:
        """Drops one reference of the slot for each entry of blocks; answers how many blocks nobody holds any more.

        The last block is given back first, so that the next table of the same length comes out in the same order, and
        deeper blocks of a chain are evicted before their parents.
        """
        contents, references = self._contents, self._shared[slot]
        shared: list[int] = []
        if not contents or contents.keys().isdisjoint(blocks):
            freed = list(reversed(blocks))
        else:
            freed = [block for block in reversed(blocks) if block not in contents]
            shared = [block for block in reversed(blocks) if block in contents]
        counts = {block: references[block] for block in shared}
        leaving: list[int] = []
        for block in shared:
            counts[block] -= 1
            if not counts[block]:
                leaving.append(block)
        remaining = [self._holders[block] & ~(1 << slot) for block in leaving]
        # All headers first, then memory, where nothing can fail.
        try:
            self._meta.write_free(freed)
            for block, left in zip(leaving, remaining, strict=True):
                self._write_holders(block, left)
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
        references.update(counts)
        for block, left in zip(leaving, remaining, strict=True):
            del references[block]
            self._note_holders(block, left)
        return len(freed) + remaining.count(0)

    def share(self, slot: int, block: int) -> None:
        """Adds a reference of the slot to a sealed or void block."""
        references = self._shared[slot]
        count = references.get(block, 0)
        if count == 0:
            holders = self._holders[block] | 1 << slot
            self._write_holders(block, holders)
            self._note_holders(block, holders)
        references[block] = count + 1

    def seal(self, slot: int, block: int, content: Content) -> int:
        """Makes the slot's unsealed block immutable and findable; answers the block that holds the content.

        That is another one, with a reference for the slot, when the content was there already; the block stays unsealed
        then. Content that has not been verified since a restart gives way to the new one.
        """
        existing = self._index.get(content.content_hash)
        if existing is not None:
            if self._require_content(existing).verified:
                self.share(slot, existing)
                return existing
            self.discard(existing)
        try:
            self._meta.write_sealed(block, self._holders[block], content)
        except BaseException:
            self._rewrite([block])
            raise
        self._contents[block] = content
        self._index[content.content_hash] = block
        self._shared[slot][block] = 1
        self._recount(block)
        self._events.stored(content)
        return block

    def find(self, content_hash: bytes) -> int | None:
        """The block that holds the content, verified or not."""
        return self._index.get(content_hash)

    def content(self, block: int) -> Content | None:
        """What a sealed block holds; None for any other block."""
        return self._contents.get(block)

    def sealed_blocks(self) -> list[int]:
        """Every block whose content can be found."""
        return list(self._index.values())

    def cached_blocks(self) -> list[int]:
        """Every cached block, the next to be evicted first."""
        return list(self._cached)

    def discard(self, block: int) -> None:
        """Makes a sealed block's content unfindable for good; the block becomes free as soon as nobody holds it."""
        content = self._require_content(block)
        holders = self._holders[block]
        if holders:
            self._meta.write_void(block, holders)
            self._contents[block] = None
        else:
            self._meta.write_free([block])
            del self._contents[block]
            del self._cached[block]
            self._free.append(block)
        del self._index[content.content_hash]
        self.num_unverified -= not content.verified
        self._recount(block)
        self._events.removed(content)

    def mark_verified(self, block: int) -> None:
        """Notes that the block's bytes match their checksum."""
        content = self._require_content(block)
        self.num_unverified -= not content.verified
        content.verified = True

    def is_cached(self, block: int) -> bool:
        """Whether nobody holds the sealed block."""
        return block in self._cached

    def pin(self, block: int) -> None:
        """Keeps a block from eviction until unpin."""
        self._pins[block] += 1

    def unpin(self, block: int) -> None:
        """Takes one pin back."""
        self._pins[block] -= 1
        if not self._pins[block]:
            del self._pins[block]

    def set_revoked(self, slot: int, revoked: bool, blocks: Sequence[int]) -> None:
        """Marks a slot as revoked or healthy; blocks is all that it holds."""
        bit = 1 << slot
        self._revoked_slots = self._revoked_slots | bit if revoked else self._revoked_slots & ~bit
        for block in blocks:
            self._recount(block)

    def _write_holders(self, block: int, holders: int) -> None:
        """The header of a sealed or void block says who holds it; one that holds nothing to be found is free with its last."""
        content = self._contents[block]
        if content is not None:
            self._meta.write_holders(block, holders, content)
        elif holders:
            self._meta.write_void(block, holders)
        else:
            self._meta.write_free([block])

    def _note_holders(self, block: int, holders: int) -> None:
        """The same in memory."""
        if self._contents[block] is None:
            if not holders:
                del self._contents[block]
                self._free.append(block)
        elif not holders:
            self._cached[block] = None
        elif not self._holders[block]:
            del self._cached[block]
        self._holders[block] = holders
        self._recount(block)

    def _require_content(self, block: int) -> Content:
        content = self._contents.get(block)
        if content is None:
            raise KeyError(f"block {block} is not sealed")
        return content

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
