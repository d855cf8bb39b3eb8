"""What a manager makes of the files that its predecessor left: the .meta alone says who holds what.

Anything damaged is taken for the worst: a header that fails its checksum may be of a block that any known worker
holds, so its block stays pinned until each of them has come back or is proved dead, and its content is never found.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

from services.kv_manager import meta_format as fmt
from services.kv_manager.block_pool import BlockPool, RestoredBlock
from services.kv_manager.events import EventRing
from services.kv_manager.meta_file import MetaFile
from services.kv_manager.meta_format import WorkerRecord
from services.kv_manager.pool_file import PoolFiles


class Recovered:
    """The pool as read back, the worker of each slot (None: its record is damaged), and the blocks each slot holds."""

    def __init__(self, files: PoolFiles, events: EventRing) -> None:
        self.workers: dict[int, WorkerRecord | None] = dict(files.meta.read_slots())
        self.pool = BlockPool(files, events)
        self.num_damaged = 0
        for slot, worker in self.workers.items():
            self.pool.open_slot(slot, worker.epoch if worker else 0)
        # A million contents make the collector look at all of them again and again, and never find anything.
        gc.disable()
        try:
            self.held = self.pool.restore(self._entries(files.meta))
        finally:
            gc.freeze()
            gc.enable()

    def _entries(self, meta: MetaFile) -> Iterator[RestoredBlock]:
        known = sum(1 << slot for slot in self.workers)
        seen: set[bytes] = set()
        for block, header in meta.read_headers():
            if header is None:
                self.num_damaged += 1
                if known:
                    meta.write_void(block, known)
                    yield block, known, True, None
                else:
                    meta.write_free([block])
                continue
            state, stated, content = header
            holders = stated & known
            if content is not None and content.content_hash not in seen:
                seen.add(content.content_hash)
                if holders != stated:
                    meta.write_holders(block, holders, content)
                yield block, holders, True, content
            elif not holders:
                meta.write_free([block])
            elif state == fmt.LEASED and holders.bit_count() == 1:
                yield block, holders, False, None
            else:
                meta.write_void(block, holders)
                yield block, holders, True, None
