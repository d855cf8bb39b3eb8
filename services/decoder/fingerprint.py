"""Which model this is: a hash of config.json and all weight bytes, kept beside a large checkpoint between starts.

Files are hashed in pieces, on all cores, and the fingerprint is the BLAKE2b-256 of the pieces' hashes. Those are SHA-256, because
processors have instructions for it: 2.6 times as fast as BLAKE2b where it was measured, and a first start waits for nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import structlog

from services.decoder.errors import CheckpointError

_log = structlog.get_logger(__name__)

CACHE_NAME = ".leasehold-fingerprint.json"
# Names how it was computed: one that was computed otherwise is not taken for it.
_KEPT_AS = "blake2b_of_sha256_of_16_mib_pieces"
# Hashing runs at 1 to 2 GB/s a core: what takes a fraction of a second is not worth a file.
CACHE_FROM_BYTES = 256 << 20
# The fingerprint depends on it. A piece keeps a core busy for 10 to 20 ms, so that the last ones end together.
_PIECE_BYTES = 16 << 20
# What is read at once, so that it is hashed out of the cache.
_READ_BYTES = 1 << 20
_PROGRESS_EVERY_S = 2.0


def model_fingerprint(model_dir: Path, weight_files: Sequence[Path], cache_from_bytes: int = CACHE_FROM_BYTES) -> bytes:
    """32 bytes that change whenever config.json or a weight does; raises CheckpointError when a file cannot be read."""
    files = [model_dir / "config.json", *sorted(weight_files)]
    try:
        identity = [_identity(path) for path in files]
        is_large = sum(size for _, _, size, _ in identity) >= cache_from_bytes
        cached = _read_cache(model_dir, identity) if is_large else None
        if cached is not None:
            return cached
        fingerprint = _hash(files)
    except OSError as error:
        raise CheckpointError(
            f"{model_dir}: cannot be read ({error}); check the files and their permissions"
        ) from error
    if is_large:
        _write_cache(model_dir, identity, fingerprint)
    return fingerprint


_Identity = tuple[str, int, int, int]  # name, inode, size, mtime_ns


def _identity(path: Path) -> _Identity:
    stat = path.stat()
    return path.name, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _hash(files: Sequence[Path]) -> bytes:
    sizes = [path.stat().st_size for path in files]
    pieces = [(path, at) for path, size in zip(files, sizes, strict=True) for at in range(0, size, _PIECE_BYTES)]
    digest = hashlib.blake2b(digest_size=32)
    # How many files and of what size, so that bytes cannot move from one to the next unnoticed.
    for number in (len(files), *sizes):
        digest.update(number.to_bytes(8, "little"))
    began = reported = time.monotonic()
    with ThreadPoolExecutor(_num_cores(), thread_name_prefix="fingerprint") as threads:  # hashlib lets go of the GIL
        for index, hashed in enumerate(threads.map(_hash_piece, pieces)):
            digest.update(hashed)
            now = time.monotonic()
            if now - reported >= _PROGRESS_EVERY_S:
                reported = now
                _log.info("hashing the model", percent=100 * index // len(pieces), after_s=round(now - began, 1))
    return digest.digest()


def _hash_piece(piece: tuple[Path, int]) -> bytes:
    path, at = piece
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_READ_BYTES))
    left = _PIECE_BYTES
    with path.open("rb", buffering=0) as file:
        file.seek(at)
        while left and (size := file.readinto(buffer[: min(left, _READ_BYTES)])):
            digest.update(buffer[:size])
            left -= size
    return digest.digest()


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read_cache(model_dir: Path, identity: Sequence[_Identity]) -> bytes | None:
    try:
        cache = json.loads((model_dir / CACHE_NAME).read_text(encoding="utf-8"))
        fingerprint = bytes.fromhex(cache[_KEPT_AS])
        unchanged = [tuple(entry) for entry in cache["files"]] == list(identity)
    except (OSError, ValueError, KeyError, TypeError):  # absent, or not ours: hashing again mends it
        return None
    return fingerprint if unchanged and len(fingerprint) == 32 else None


def _write_cache(model_dir: Path, identity: Sequence[_Identity], fingerprint: bytes) -> None:
    content = json.dumps({"files": identity, _KEPT_AS: fingerprint.hex()})
    try:
        with tempfile.NamedTemporaryFile("w", dir=model_dir, prefix=CACHE_NAME, delete=False, encoding="utf-8") as file:
            file.write(content)
        os.chmod(file.name, 0o644)  # for the decoders of other users: it is no secret
        os.replace(file.name, model_dir / CACHE_NAME)
    except OSError as error:  # a read-only checkpoint is hashed at every start
        _log.info("the model's fingerprint cannot be kept beside it", model=str(model_dir), error=str(error))
