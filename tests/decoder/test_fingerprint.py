"""The model's fingerprint changes with every byte of config and weights, and is kept only where hashing takes long."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import structlog

from services.decoder import fingerprint
from services.decoder.errors import CheckpointError
from services.decoder.fingerprint import CACHE_NAME, model_fingerprint


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-1.safetensors").write_bytes(b"abc")
    (tmp_path / "model-2.safetensors").write_bytes(b"def")
    return tmp_path


def _of(model_dir: Path, cache_from_bytes: int = 1 << 20) -> bytes:
    return model_fingerprint(model_dir, list(model_dir.glob("*.safetensors")), cache_from_bytes)


def test_every_byte_counts_and_its_place_too(model_dir: Path) -> None:
    seen = {_of(model_dir)}
    (model_dir / "model-1.safetensors").write_bytes(b"abcd")
    (model_dir / "model-2.safetensors").write_bytes(b"ef")
    seen.add(_of(model_dir))
    (model_dir / "config.json").write_text("{ }")
    seen.add(_of(model_dir))
    assert len(seen) == 3
    assert {len(value) for value in seen} == {32}
    assert not (model_dir / CACHE_NAME).exists(), "a small checkpoint is left as it is"


def test_a_large_one_is_hashed_once_until_a_file_changes(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _of(model_dir, cache_from_bytes=0)
    with monkeypatch.context() as patch:
        patch.setattr(fingerprint, "_hash", lambda files: pytest.fail("hashed again"))
        assert _of(model_dir, cache_from_bytes=0) == first
    weights = model_dir / "model-2.safetensors"
    weights.write_bytes(b"xyz")
    os.utime(weights, ns=(1, 1))
    assert _of(model_dir, cache_from_bytes=0) != first


@pytest.mark.parametrize(
    "content", ["", "[]", '{"files": 3, "fingerprint": "00"}', json.dumps({"blake2b_of_sha256_of_16_mib_pieces": "zz"})]
)
def test_a_broken_cache_is_mended(model_dir: Path, content: str) -> None:
    first = _of(model_dir, cache_from_bytes=0)
    (model_dir / CACHE_NAME).write_text(content)
    assert _of(model_dir, cache_from_bytes=0) == first
    assert json.loads((model_dir / CACHE_NAME).read_text())["blake2b_of_sha256_of_16_mib_pieces"] == first.hex()


def test_pieces_are_hashed_in_their_order_whatever_the_number_of_threads(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "_PIECE_BYTES", 4)
    monkeypatch.setattr(fingerprint, "_READ_BYTES", 3)
    content = b"0123456789abc"
    (model_dir / "model-1.safetensors").write_bytes(content)
    numbers = b"".join(number.to_bytes(8, "little") for number in (3, 2, 13, 3))
    pieces = [b"{}", b"0123", b"4567", b"89ab", b"c", b"def"]
    digests = b"".join(hashlib.sha256(piece).digest() for piece in pieces)
    expected = hashlib.blake2b(numbers + digests, digest_size=32).digest()
    for cores in (1, 7):
        monkeypatch.setattr(fingerprint, "_num_cores", lambda cores=cores: cores)
        assert _of(model_dir) == expected


def test_a_fingerprint_that_was_computed_otherwise_is_not_taken(model_dir: Path) -> None:
    first = _of(model_dir, cache_from_bytes=0)
    kept = json.loads((model_dir / CACHE_NAME).read_text())
    (model_dir / CACHE_NAME).write_text(json.dumps({"files": kept["files"], "fingerprint": "00" * 32}))
    assert _of(model_dir, cache_from_bytes=0) == first


def test_hashing_that_takes_long_shows_its_progress(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_PROGRESS_EVERY_S", 0.0)
    with structlog.testing.capture_logs() as logs:
        _of(model_dir)
    assert [entry["percent"] for entry in logs if entry["event"] == "hashing the model"] == [0, 33, 66]


def test_a_missing_file_is_an_error_of_the_checkpoint(model_dir: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be read .*gone.safetensors.*check the files"):
        model_fingerprint(model_dir, [model_dir / "gone.safetensors"])
