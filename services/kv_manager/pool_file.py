"""A pool's files on disk: making them, finding them again, and where the bytes are.

`DataFile` is the one place that knows that K/V lies in a file; a pool in GPU memory would be another class with the
same methods.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import zlib
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from protos.pool_format import DATA_OFFSET_BYTES, PAGE_BYTES, POOL_ID_BYTES, DataHeader
from services.kv_manager import meta_file
from services.kv_manager.errors import PoolFileError, StorageFullError
from services.kv_manager.geometry import Geometry
from services.kv_manager.meta_file import MetaFile
from services.kv_manager.meta_format import RESET_HINT, Superblock

_CHUNK_BYTES = 1 << 20
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_POOL_FILE_NAME = re.compile(r"^[0-9a-f]{32}\.(kv|meta|meta\.new)$")


class DataFile:
    """The K/V bytes of all blocks, in a sparse file that decoders map."""

    def __init__(self, path: Path, header: DataHeader) -> None:
        self.path = path
        self.header = header
        self._stride = header.shape.stride_bytes
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        self._blocks_per_chunk = max(1, _CHUNK_BYTES // self._stride)
        self._has_room = bytearray(-(-header.num_blocks // self._blocks_per_chunk))

    @classmethod
    def create(cls, path: Path, header: DataHeader) -> DataFile:
        """Makes the file, sparse, with its header page."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, header.file_bytes)
            os.posix_fallocate(fd, 0, PAGE_BYTES)
            os.pwrite(fd, header.pack(), 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        return cls(path, header)

    @classmethod
    def open(cls, path: Path) -> DataFile:
        """Opens a file made before; raises PoolFileError when its header or its size is wrong."""
        with path.open("rb") as file:
            page = file.read(PAGE_BYTES)
        try:
            header = DataHeader.unpack(page)
        except ValueError as error:
            raise PoolFileError(f"{path}: {error}; {RESET_HINT}") from error
        size = path.stat().st_size
        if size == PAGE_BYTES:
            raise PoolFileError(f"{path} is of a pool in GPU memory; start with --pool-memory cuda, or {RESET_HINT}")
        if size != header.file_bytes:
            raise PoolFileError(
                f"{path} has {size} bytes and should have {header.file_bytes}: it was truncated; {RESET_HINT}"
            )
        return cls(path, header)

    def ensure(self, blocks: Iterable[int]) -> None:
        """Makes the file system set space aside for blocks; raises StorageFullError when it has none.

        Without it a full disk would show as a SIGBUS in a decoder's kernel.
        """
        per_chunk = self._blocks_per_chunk
        for block in blocks:
            chunk = block // per_chunk
            if self._has_room[chunk]:
                continue
            first = chunk * per_chunk
            try:
                self._allocate(first, min(per_chunk, self.header.num_blocks - first))
                self._has_room[chunk] = 1
            except StorageFullError:
                if per_chunk == 1:
                    raise
                self._allocate(block, 1)  # the last free bytes of a disk serve, too

    def _allocate(self, first: int, count: int) -> None:
        try:
            os.posix_fallocate(self._fd, DATA_OFFSET_BYTES + first * self._stride, count * self._stride)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise _storage_full(self.path, count * self._stride, error) from error

    def checksum(self, block: int) -> int:
        """CRC-32 of the block's K/V bytes, without its padding. Reads, never maps: a truncated file is a wrong sum."""
        offset = DATA_OFFSET_BYTES + block * self._stride
        end = offset + self.header.shape.block_bytes
        crc = 0
        while offset < end:
            piece = os.pread(self._fd, min(_CHUNK_BYTES, end - offset), offset)
            if not piece:
                break
            crc = zlib.crc32(piece, crc)
            offset += len(piece)
        return crc

    @property
    def is_absent(self) -> bool:
        """Whether the bytes are with workers that have not come back since the manager's start: in GPU memory only."""
        return False

    def close(self) -> None:
        """Closes the file; decoders keep their mappings."""
        os.close(self._fd)


def _storage_full(path: Path, num_bytes: int, error: OSError) -> StorageFullError:
    return StorageFullError(
        f"{path.parent} has no room for {num_bytes} more bytes ({error.strerror}): free some space there, or start the"
        " manager with a smaller --num-blocks or --pool-bytes, or with another --pool-dir",
        {"path": str(path), "needed_bytes": str(num_bytes)},
        str(path.parent),
    )


class Storage(Protocol):
    """Where a pool's bytes are: `DataFile` itself, or what makes and opens others like it."""

    def create(self, path: Path, header: DataHeader) -> DataFile:
        """Makes a data file and room for its blocks."""
        ...

    def open(self, path: Path) -> DataFile:
        """Opens one that was made before; raises PoolFileError when it cannot serve."""
        ...


@dataclass(frozen=True)
class PoolFiles:
    """Both files of a pool, open, and what they say of themselves."""

    data: DataFile
    meta: MetaFile
    geometry: Geometry

    @property
    def pool_id(self) -> bytes:
        """The 16 bytes that stand in both files and their names."""
        return self.meta.superblock.pool_id

    @property
    def num_blocks(self) -> int:
        """Size of the pool in blocks."""
        return self.meta.superblock.num_blocks

    @property
    def block_size(self) -> int:
        """Tokens a block."""
        return self.meta.superblock.block_size

    def close(self) -> None:
        """Closes both files."""
        self.data.close()
        self.meta.close()

    def delete(self) -> None:
        """Closes and removes both files; a start that finds only the second removes it too."""
        self.close()
        for path in (self.meta.path, self.data.path):
            path.unlink(missing_ok=True)


def create_pool(
    pool_dir: Path, geometry: Geometry, block_size: int, num_blocks: int, storage: Storage = DataFile
) -> PoolFiles:
    """Makes a new pool's files; raises StorageFullError when there is no room, and leaves nothing behind then."""
    pool_id = secrets.token_bytes(POOL_ID_BYTES)
    header = DataHeader(pool_id, num_blocks, geometry.shape(block_size))
    superblock = Superblock(pool_id, num_blocks, block_size, geometry.to_json())
    superblock.pack()  # raises before any file is made
    kv_path = pool_dir / f"{pool_id.hex()}.kv"
    meta_path = kv_path.with_suffix(".meta")
    data = None
    try:
        # The .meta comes last: a pool exists when its .meta does.
        data = storage.create(kv_path, header)
        meta_file.create(meta_path, superblock)
        return PoolFiles(data, MetaFile(meta_path), geometry)
    except BaseException as error:
        if data is not None:
            data.close()
        kv_path.unlink(missing_ok=True)
        meta_path.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise _storage_full(kv_path, header.file_bytes, error) from error
        raise


def find_pool(pool_dir: Path, storage: Storage = DataFile) -> tuple[PoolFiles | None, list[str]]:
    """Opens the pool that lies in the directory, if any, and tells which leftovers it removed.

    A .kv alone is a creation that was cut short, or its .meta was deleted; a .meta alone has lost its bytes. Neither
    can serve, and decoders that still map such a file keep it until they re-register. Raises PoolFileError for files
    that are damaged or of another version.
    """
    names = {entry.name for entry in os.scandir(pool_dir) if _POOL_FILE_NAME.match(entry.name)}
    stems = {name.split(".")[0] for name in names}
    whole = sorted(stem for stem in stems if {f"{stem}.kv", f"{stem}.meta"} <= names)
    if len(whole) > 1:
        raise PoolFileError(
            f"--pool-dir: {pool_dir} holds {len(whole)} pools ({', '.join(whole)}), and a manager serves one; move the"
            " others away"
        )
    kept = {f"{stem}.{suffix}" for stem in whole for suffix in ("kv", "meta")}
    removed = sorted(names - kept)
    files = _open_pool(pool_dir / whole[0], storage) if whole else None
    for name in removed:
        (pool_dir / name).unlink()
    return files, removed


def _open_pool(stem: Path, storage: Storage) -> PoolFiles:
    with ExitStack() as undo:
        meta = MetaFile(stem.with_suffix(".meta"))
        undo.callback(meta.close)
        data = storage.open(stem.with_suffix(".kv"))
        undo.callback(data.close)
        geometry = Geometry.from_json(meta.superblock.geometry_json)
        _require_pair(stem, meta.superblock, data.header, geometry)
        undo.pop_all()
        return PoolFiles(data, meta, geometry)


def _require_pair(stem: Path, superblock: Superblock, header: DataHeader, geometry: Geometry) -> None:
    if superblock.pool_id != header.pool_id or superblock.pool_id.hex() != stem.name:
        raise PoolFileError(f"{stem}.meta and .kv are of different pools, or renamed; {RESET_HINT}")
    if (superblock.num_blocks, geometry.shape(superblock.block_size)) != (header.num_blocks, header.shape):
        raise PoolFileError(f"{stem}.meta and .kv state different geometries; {RESET_HINT}")
