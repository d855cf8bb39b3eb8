"""The .meta file in use: every change of a lease goes through here, and reaches the file before its reply.

Stores go to a shared mapping, so they outlive this process at once. A header's state byte is stored last when a block
leaves FREE and first when it returns: whatever instant the manager is killed at, each header is readable.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from protos.pool_format import PAGE_BYTES
from services.kv_manager import meta_format as fmt
from services.kv_manager.errors import PoolFileError
from services.kv_manager.meta_format import BlockHeader, Content, Superblock, WorkerRecord

_HEADER = fmt.HEADER_BYTES
_BASE = fmt.HEADERS_OFFSET
_HEADERS_A_READ = 4096


def create(path: Path, superblock: Superblock) -> None:
    """Writes a new .meta file with no worker and only free blocks; it is there whole or not at all."""
    draft = path.with_suffix(".meta.new")
    fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        # Not sparse: a store to a hole of a full disk would be a SIGBUS.
        os.posix_fallocate(fd, 0, fmt.meta_file_bytes(superblock.num_blocks))
        os.pwrite(fd, superblock.pack(), 0)
        os.pwrite(fd, fmt.pack_epoch(0, ""), fmt.EPOCH_OFFSET)
        os.fsync(fd)
        os.rename(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


class MetaFile:
    """An open .meta file."""

    def __init__(self, path: Path) -> None:
        """Opens and checks the file; raises PoolFileError when it is damaged or of another version."""
        self.path = path
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            self.superblock = Superblock.unpack(os.pread(fd, PAGE_BYTES, 0), str(path))
            expected = fmt.meta_file_bytes(self.superblock.num_blocks)
            actual = os.fstat(fd).st_size
            if actual != expected:
                raise PoolFileError(
                    f"{path} has {actual} bytes and should have {expected}: it was truncated; {fmt.RESET_HINT}"
                )
            self._map = mmap.mmap(fd, expected)
        finally:
            os.close(fd)
        self.epoch, self.kernel_boot_id = fmt.unpack_epoch(self._map[fmt.EPOCH_OFFSET : fmt.SLOTS_OFFSET], str(path))

    def close(self) -> None:
        """Writes everything to the disk and closes the mapping."""
        self._map.flush()
        self._map.close()

    def advance_epoch(self, kernel_boot_id: str) -> int:
        """Issues the next epoch; it is on the disk when this returns, so that no reboot issues it again."""
        epoch = self.epoch + 1
        record = fmt.pack_epoch(epoch, kernel_boot_id)
        self._map[fmt.EPOCH_OFFSET : fmt.EPOCH_OFFSET + len(record)] = record
        self._map.flush(fmt.EPOCH_OFFSET, PAGE_BYTES)
        self.epoch, self.kernel_boot_id = epoch, kernel_boot_id
        return epoch

    def write_slot(self, slot: int, record: WorkerRecord) -> None:
        """Enters a worker into a slot, or changes its entry."""
        packed = record.pack()
        start = fmt.SLOTS_OFFSET + slot * fmt.SLOT_BYTES
        self._map[start : start + fmt.SLOT_BYTES] = packed
        self._map.flush(fmt.SLOTS_OFFSET, fmt.NUM_SLOTS * fmt.SLOT_BYTES)

    def clear_slot(self, slot: int) -> None:
        """Empties a slot; no header may name it any more."""
        self._map[fmt.SLOTS_OFFSET + slot * fmt.SLOT_BYTES] = fmt.FREE

    def read_slots(self) -> Iterator[tuple[int, WorkerRecord | None]]:
        """Every slot in use; None for one whose record is damaged."""
        for slot in range(fmt.NUM_SLOTS):
            start = fmt.SLOTS_OFFSET + slot * fmt.SLOT_BYTES
            record = self._map[start : start + fmt.SLOT_BYTES]
            if record[0] == fmt.FREE:
                continue
            try:
                yield slot, WorkerRecord.unpack(record)
            except (PoolFileError, UnicodeDecodeError):
                yield slot, None

    def header_states(self) -> bytes:
        """The state byte of every header, in order."""
        return self._map[_BASE::_HEADER]

    def read_headers(self) -> Iterator[tuple[int, BlockHeader | None]]:
        """Every block that is not FREE, with its header; None when that is damaged."""
        states = self.header_states()
        for first in range(0, len(states), _HEADERS_A_READ):
            end = min(first + _HEADERS_A_READ, len(states))
            if states.count(fmt.FREE, first, end) == end - first:
                continue
            records = self._map[_BASE + first * _HEADER : _BASE + end * _HEADER]
            for block, header in enumerate(fmt.unpack_headers(records), first):
                if states[block] != fmt.FREE:
                    yield block, header

    def write_leased(self, blocks: Iterable[int], record: bytes) -> None:
        """FREE to LEASED for each block; record is leased_record's."""
        data = self._map
        for block in blocks:
            start = _BASE + block * _HEADER
            data[start : start + _HEADER] = record
            data[start] = fmt.LEASED

    def write_free(self, blocks: Iterable[int]) -> None:
        """Any state to FREE for each block."""
        data = self._map
        for block in blocks:
            data[_BASE + block * _HEADER] = fmt.FREE

    def write_sealed(self, block: int, holders: int, content: Content) -> None:
        """The whole header of a sealed block; its state passes through nothing that a reader would take for FREE."""
        body = fmt.pack_body(content)
        content.static_crc = fmt.static_crc(fmt.SEALED, body)
        self._write_whole(block, fmt.pack_head(fmt.SEALED, content.static_crc, holders) + body)

    def write_void(self, block: int, holders: int) -> None:
        """The whole header of a block that is held, but whose content is not to be found any more."""
        body = fmt.pack_plain_body(0)
        self._write_whole(block, fmt.pack_head(fmt.VOID, fmt.static_crc(fmt.VOID, body), holders) + body)

    def write_holders(self, block: int, holders: int, content: Content) -> None:
        """Changes who holds a sealed block."""
        start = _BASE + block * _HEADER
        self._map[start : start + 16] = fmt.pack_head(fmt.SEALED, content.static_crc, holders)

    def _write_whole(self, block: int, record: bytes) -> None:
        # A held block must never look FREE in between: a torn header fails its CRC, and recovery then pins the block.
        start = _BASE + block * _HEADER
        self._map[start : start + _HEADER] = record


def leased_record(slot: int, epoch: int) -> bytes:
    """The header of any block that this session leases, its state byte still FREE: one for all its blocks."""
    body = fmt.pack_plain_body(epoch)
    head = fmt.pack_head(fmt.LEASED, fmt.static_crc(fmt.LEASED, body), 1 << slot)
    return bytes([fmt.FREE]) + head[1:] + body
