"""Which model this is: BLAKE2b-256 over config.json and all weight bytes, kept beside a large checkpoint between starts."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import structlog

from services.decoder.errors import CheckpointError

_log = structlog.get_logger(__name__)

CACHE_NAME = ".leasehold-fingerprint.json"
# Hashing runs at 0.7 GB/s: what takes less than half a second is not worth a file.
CACHE_FROM_BYTES = 256 << 20
_CHUNK_BYTES = 16 << 20


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
    digest = hashlib.blake2b(digest_size=32)
    for path in files:
        with path.open("rb") as file:
            # Length-prefixed, so that bytes cannot move from one file to the next unnoticed.
            digest.update(os.fstat(file.fileno()).st_size.to_bytes(8, "little"))
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.digest()


def _read_cache(model_dir: Path, identity: Sequence[_Identity]) -> bytes | None:
    try:
        cache = json.loads((model_dir / CACHE_NAME).read_text(encoding="utf-8"))
        fingerprint = bytes.fromhex(cache["fingerprint"])
        unchanged = [tuple(entry) for entry in cache["files"]] == list(identity)
    except (OSError, ValueError, KeyError, TypeError):  # absent, or not ours: hashing again mends it
        return None
    return fingerprint if unchanged and len(fingerprint) == 32 else None


def _write_cache(model_dir: Path, identity: Sequence[_Identity], fingerprint: bytes) -> None:
    content = json.dumps({"files": identity, "fingerprint": fingerprint.hex()})
    try:
        with tempfile.NamedTemporaryFile("w", dir=model_dir, prefix=CACHE_NAME, delete=False, encoding="utf-8") as file:
            file.write(content)
        os.chmod(file.name, 0o644)  # for the decoders of other users: it is no secret
        os.replace(file.name, model_dir / CACHE_NAME)
    except OSError as error:  # a read-only checkpoint is hashed at every start
        _log.info("the model's fingerprint cannot be kept beside it", model=str(model_dir), error=str(error))
