"""The .meta file of a pool, byte for byte; the manager's alone. All integers are little-endian.

One superblock page, a page with what changes at every start, 64 worker slots of 256 bytes, one header of 128 bytes
for each block. Every record has a CRC-32. Record states are bytes at least two bits apart, so that no single flipped
bit turns one into another.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from protos.pool_format import PAGE_BYTES, POOL_ID_BYTES
from services.kv_manager.errors import PoolFileError

MAGIC = b"LHPOOLMT"
FORMAT_VERSION = 1

NUM_SLOTS = 64
SLOT_BYTES = 256
HEADER_BYTES = 128
EPOCH_OFFSET = PAGE_BYTES
SLOTS_OFFSET = 2 * PAGE_BYTES
HEADERS_OFFSET = SLOTS_OFFSET + NUM_SLOTS * SLOT_BYTES

FREE = 0x00
LEASED = 0x4C
SEALED = 0x53
# Held, but what it held is not to be trusted or found any more: its header or its data was damaged.
VOID = 0x56
SLOT_USED = 0x57
_HELD = (SEALED, LEASED, VOID)

# magic, version, pool_id, num_blocks, block_size, length of the geometry's JSON; then the JSON and a CRC
_SUPER = struct.Struct("<8sI16sQII")
_CRC = struct.Struct("<I")
# epoch, kernel boot id, CRC of both
_EPOCH = struct.Struct("<Q36sI")
# state, pad, CRC; then worker_id, boot_id, lock device and inode, pid, process start, kernel boot id, pid namespace, epoch,
# registration attempt, kv_capacity_tokens, max_seqs
_SLOT_HEAD = struct.Struct("<B3xI")
_SLOT_BODY = struct.Struct("<64s16sQQQQ36sIQQII")
# state, pad, CRC, holders; then generation, num_tokens, data checksum, content hash, parent hash, tenant digest
HEADER_HEAD = struct.Struct("<B3xIQ")
HEADER_BODY = struct.Struct("<QII32s32s16s16x")
_HOLDERS = struct.Struct("<Q")
_HEADER = struct.Struct("<B3xIQQII32s32s16s16x")

NO_HASH = bytes(32)
NO_TENANT = bytes(16)


def meta_file_bytes(num_blocks: int) -> int:
    """Size of a whole .meta file."""
    return HEADERS_OFFSET + num_blocks * HEADER_BYTES


@dataclass(frozen=True)
class Superblock:
    """What never changes in a pool's life. `geometry_json` is Geometry.to_json."""

    pool_id: bytes
    num_blocks: int
    block_size: int
    geometry_json: bytes

    def pack(self) -> bytes:
        """The superblock page."""
        body = _SUPER.pack(
            MAGIC, FORMAT_VERSION, self.pool_id, self.num_blocks, self.block_size, len(self.geometry_json)
        )
        body += self.geometry_json
        if len(body) + _CRC.size > PAGE_BYTES:
            raise PoolFileError(f"the geometry takes {len(self.geometry_json)} bytes, more than the superblock has")
        return (body + _CRC.pack(zlib.crc32(body))).ljust(PAGE_BYTES, b"\0")

    @classmethod
    def unpack(cls, page: bytes, path: str) -> Superblock:
        """Reads a superblock page; raises PoolFileError when it is damaged or of another format version."""
        if len(page) < PAGE_BYTES or page[: len(MAGIC)] != MAGIC:
            raise PoolFileError(f"{path} does not begin with the magic of a pool's .meta file; {RESET_HINT}")
        _, version, pool_id, num_blocks, block_size, length = _SUPER.unpack_from(page)
        if version != FORMAT_VERSION:
            raise PoolFileError(
                f"{path} has format version {version}, and this manager reads version {FORMAT_VERSION}; use another"
                " --pool-dir, or the manager that wrote it"
            )
        end = _SUPER.size + length
        if end + _CRC.size > PAGE_BYTES or zlib.crc32(page[:end]) != _CRC.unpack_from(page, end)[0]:
            raise PoolFileError(f"{path} is damaged: its superblock fails its checksum; {RESET_HINT}")
        return cls(pool_id, num_blocks, block_size, page[_SUPER.size : end])


RESET_HINT = "stop the decoders and delete the pool's .meta and .kv to begin with an empty pool"


def pack_epoch(epoch: int, boot_id: str) -> bytes:
    """The record of the newest epoch and of the kernel boot that it was issued in."""
    packed = _EPOCH.pack(epoch, boot_id.encode()[:36], 0)
    return packed[:-4] + _CRC.pack(zlib.crc32(packed[:-4]))


def unpack_epoch(record: bytes, path: str) -> tuple[int, str]:
    """The newest epoch and its kernel boot id; raises PoolFileError when the record is damaged."""
    epoch, boot_id, crc = _EPOCH.unpack_from(record)
    if crc != zlib.crc32(record[: _EPOCH.size - 4]):
        raise PoolFileError(f"{path} is damaged: its epoch record fails its checksum; {RESET_HINT}")
    return int(epoch), bytes(boot_id).rstrip(b"\0").decode("ascii", "replace")


@dataclass(frozen=True)
class WorkerRecord:
    """Who holds a worker slot. `kernel_boot_id` is empty when it was not the manager's own at registration."""

    worker_id: str
    boot_id: bytes
    lock_device: int
    lock_inode: int
    pid: int
    process_start_time_ticks: int
    kernel_boot_id: str
    epoch: int
    attempt: int
    kv_capacity_tokens: int
    max_seqs: int
    pid_namespace: int = 0  # inode of the manager's own at registration; pid means something only there

    def pack(self) -> bytes:
        """The slot's record with state and CRC, SLOT_BYTES long."""
        body = _SLOT_BODY.pack(
            self.worker_id.encode(),
            self.boot_id,
            self.lock_device,
            self.lock_inode,
            self.pid,
            self.process_start_time_ticks,
            self.kernel_boot_id.encode()[:36],
            self.pid_namespace,
            self.epoch,
            self.attempt,
            self.kv_capacity_tokens,
            self.max_seqs,
        )
        return (_SLOT_HEAD.pack(SLOT_USED, zlib.crc32(body, SLOT_USED)) + body).ljust(SLOT_BYTES, b"\0")

    @classmethod
    def unpack(cls, record: bytes) -> WorkerRecord:
        """Reads a used slot; raises PoolFileError when it is damaged."""
        state, crc = _SLOT_HEAD.unpack_from(record)
        body = record[_SLOT_HEAD.size : _SLOT_HEAD.size + _SLOT_BODY.size]
        if state != SLOT_USED or zlib.crc32(body, state) != crc:
            raise PoolFileError("a worker slot fails its checksum")
        (worker_id, boot_id, device, inode, pid, start, kernel, namespace, epoch, attempt, capacity, seqs) = (
            _SLOT_BODY.unpack(body)
        )
        return cls(
            worker_id=bytes(worker_id).rstrip(b"\0").decode(),
            boot_id=bytes(boot_id),
            lock_device=device,
            lock_inode=inode,
            pid=pid,
            process_start_time_ticks=start,
            kernel_boot_id=bytes(kernel).rstrip(b"\0").decode(),
            epoch=epoch,
            attempt=attempt,
            kv_capacity_tokens=capacity,
            max_seqs=seqs,
            pid_namespace=namespace,
        )


@dataclass(slots=True)
class Content:
    """What a sealed block holds. `static_crc` saves work: the header CRC over all that holders do not change."""

    content_hash: bytes
    parent_hash: bytes
    num_tokens: int
    data_checksum: int
    tenant_digest: bytes
    generation: int
    static_crc: int = 0
    # The data is as its checksum says, in this life of the manager: sealed in it, or verified since.
    verified: bool = True


def pack_plain_body(generation: int) -> bytes:
    """The body of a LEASED or VOID header. Its generation is the epoch of the session that took the block."""
    return HEADER_BODY.pack(generation, 0, 0, NO_HASH, NO_HASH, NO_TENANT)


def pack_body(content: Content) -> bytes:
    """The body of a SEALED header: all that holders do not change."""
    return HEADER_BODY.pack(
        content.generation,
        content.num_tokens,
        content.data_checksum,
        content.content_hash,
        content.parent_hash,
        content.tenant_digest,
    )


def static_crc(state: int, body: bytes) -> int:
    """The CRC of a header's state and body; finish_crc adds its holders."""
    return zlib.crc32(body, state)


def pack_head(state: int, crc_so_far: int, holders: int) -> bytes:
    """The first 16 bytes of a header: one aligned store changes holders and CRC together."""
    return HEADER_HEAD.pack(state, zlib.crc32(_HOLDERS.pack(holders), crc_so_far), holders)


# A header as read back: LEASED, SEALED or VOID, its holders, and what a SEALED block holds. A plain tuple, because a start
# reads a million of them.
BlockHeader = tuple[int, int, Content | None]


def unpack_headers(records: bytes) -> Iterator[BlockHeader | None]:
    """Reads headers that follow each other; None for one that is damaged, or of a FREE block."""
    crc32, start = zlib.crc32, 0
    for state, crc, holders, generation, num_tokens, checksum, content_hash, parent_hash, tenant in _HEADER.iter_unpack(
        records
    ):
        so_far = crc32(records[start + 16 : start + HEADER_BYTES], state)
        if crc32(records[start + 8 : start + 16], so_far) != crc or state not in _HELD:
            yield None
        elif state == SEALED:
            yield (
                state,
                holders,
                Content(content_hash, parent_hash, num_tokens, checksum, tenant, generation, so_far, False),
            )
        else:
            yield state, holders, None
        start += HEADER_BYTES


assert HEADER_HEAD.size + HEADER_BODY.size == HEADER_BYTES == _HEADER.size
assert _SLOT_HEAD.size + _SLOT_BODY.size <= SLOT_BYTES
assert POOL_ID_BYTES == 16
