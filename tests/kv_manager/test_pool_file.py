"""The pool's files: when they appear, with what rights, and which are refused."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import stat
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from protos import kv_manager_pb2 as pb
from protos.pool_format import DataHeader
from services.kv_manager.block_pool import BlockState
from services.kv_manager.errors import LockProofError, PoolFileError, PoolMismatchError, PoolSizeError, StorageFullError
from services.kv_manager.geometry import Geometry
from services.kv_manager.pool_file import find_pool
from services.kv_manager.translate import registration
from tests.kv_manager.helpers import Manager, chain_of, geometry

MakeManager = Callable[..., Manager]


def pool_files(manager: Manager) -> list[Path]:
    return sorted(path for path in manager.pool_dir.iterdir() if path.suffix in (".kv", ".meta", ".new"))


def test_s11_the_pool_is_made_by_the_first_registration_and_not_before(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=4)
    assert pool_files(manager) == []
    assert manager.lessor.pool is None
    manager.join()
    kv, meta = pool_files(manager)
    assert (kv.suffix, meta.suffix, kv.stem) == (".kv", ".meta", meta.stem)
    assert manager.lessor.pool is not None
    assert DataHeader.unpack(kv.read_bytes()[:4096]).pool_id.hex() == kv.stem
    manager.check()


def test_both_files_are_for_their_owner_only_whatever_the_umask(make_manager: MakeManager) -> None:
    old = os.umask(0)
    try:
        manager = make_manager(num_blocks=4)
        manager.join()
    finally:
        os.umask(old)
    for path in pool_files(manager):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((manager.pool_dir / "workers").stat().st_mode) == 0o700
    manager.check()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layer_ids": [0, 1, 2]}, "layer_ids"),
        ({"num_kv_heads": 4}, "num_kv_heads"),
        ({"kv_dtype": pb.KV_DTYPE_BF16}, "kv_dtype"),
        ({"kv_dtype": pb.KV_DTYPE_INT8}, "kv_dtype"),
        ({"layout": pb.KV_LAYOUT_NHD}, "layout"),
        ({"model_fingerprint": bytes(32)}, "model_fingerprint"),
    ],
)
def test_s14_s15_the_geometry_is_fixed_by_the_first_registration(
    make_manager: MakeManager, change: dict[str, object], named: str
) -> None:
    manager = make_manager(num_blocks=4)
    manager.join("w1")
    request = manager.worker("w2").request()
    request.geometry.CopyFrom(geometry(**change))
    for _ in range(2):
        with pytest.raises(PoolMismatchError, match=named) as caught:
            manager.lessor.register(registration(request))
        assert "another --pool-dir" in caught.value.message
        assert caught.value.metadata == {"differing_fields": named}
        manager.crash_and_restart()
    manager.check()


@pytest.mark.parametrize("field", ["kv_dtype", "layout"])
def test_a_superblock_with_a_dtype_or_layout_of_a_later_version_is_refused(field: str) -> None:
    known = Geometry((0, 1), 2, 8, 0, "int8", "nhd", bytes(32))
    assert Geometry.from_json(known.to_json()) == known
    with pytest.raises(PoolFileError, match=r"x9.* unknown to this version"):
        Geometry.from_json(replace(known, **{field: "x9"}).to_json())


def test_pool_bytes_below_one_block_are_refused_by_name(make_manager: MakeManager) -> None:
    manager = make_manager(pool_bytes=4095)
    with pytest.raises(PoolSizeError, match="--pool-bytes"):
        manager.join()
    assert pool_files(manager) == []


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"num_blocks": 5}, "--num-blocks"),
        ({"pool_bytes": 1 << 20}, "--pool-bytes"),
        ({"block_size": 8}, "--block-size"),
    ],
)
def test_flags_that_differ_from_the_pool_are_refused_by_name(
    make_manager: MakeManager, flags: dict[str, object], named: str
) -> None:
    manager = make_manager(num_blocks=4)
    manager.join()
    manager.stop()
    with pytest.raises(PoolFileError, match=named):
        make_manager(**flags)
    manager.crash_and_restart()
    manager.check()


def _flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        (".kv", lambda path: path.write_bytes(b"x" * path.stat().st_size), "magic"),
        (".kv", lambda path: os.truncate(path, 5000), "truncated"),
        (".kv", lambda path: os.truncate(path, 0), "magic"),
        (".meta", lambda path: os.truncate(path, 30_000), "truncated"),
        (".meta", lambda path: os.truncate(path, 0), "magic"),
        (".meta", lambda path: _flip(path, 60), "checksum"),
        (".meta", lambda path: _flip(path, 4096), "checksum"),
    ],
)
def test_damaged_files_are_refused_with_what_to_do(
    make_manager: MakeManager, suffix: str, damage: Callable[[Path], None], message: str
) -> None:
    manager = make_manager(num_blocks=4)
    manager.join()
    manager.stop()
    (path,) = manager.pool_dir.glob(f"*{suffix}")
    damage(path)
    with pytest.raises(PoolFileError, match=message) as caught:
        manager.crash_and_restart()
    assert str(path) in caught.value.message
    assert "delete" in caught.value.message


@pytest.mark.parametrize("suffix", [".kv", ".meta"])
def test_a_pool_of_another_format_version_is_refused(make_manager: MakeManager, suffix: str) -> None:
    manager = make_manager(num_blocks=4)
    manager.join()
    manager.stop()
    (path,) = manager.pool_dir.glob(f"*{suffix}")
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, 8, 99)
    path.write_bytes(data)
    with pytest.raises(PoolFileError, match="version 99"):
        manager.crash_and_restart()


@pytest.mark.parametrize("suffix", [".kv", ".meta"])
def test_half_a_pool_is_removed_and_its_worker_must_map_anew(make_manager: MakeManager, suffix: str) -> None:
    manager = make_manager(num_blocks=4)
    worker = manager.worker()
    session = manager.register(worker).session
    manager.acquire(session, 1, 2)
    assert manager.lessor.pool is not None
    old_id = manager.lessor.pool.files.pool_id
    manager.stop()
    (path,) = manager.pool_dir.glob(f"*{suffix}")
    path.unlink()
    manager.crash_and_restart()
    assert pool_files(manager) == []
    answer = manager.lessor.register(registration(worker.request(old_id, {1: [0, 1]})))
    assert not answer.claims_accepted
    assert not answer.session.leases
    manager.check()


def test_two_pools_in_one_directory_are_refused(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=4)
    manager.join()
    for path in pool_files(manager):
        (manager.pool_dir / f"{'ab' * 16}{path.suffix}").write_bytes(path.read_bytes())
    with pytest.raises(PoolFileError, match="2 pools"):
        find_pool(manager.pool_dir)
    manager.check()


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 256 KiB on the pool directory; skips where it cannot be mounted."""
    target = tmp_path / "pool"
    target.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", os.fsencode(target), b"tmpfs", 0, b"size=256k") != 0:
        pytest.skip(f"cannot mount a tmpfs here: {os.strerror(ctypes.get_errno())}")
    yield target
    libc.umount2(os.fsencode(target), 2)


def test_a_full_file_system_is_an_error_of_acquire_and_never_a_sigbus(
    small_tmpfs: Path, make_manager: MakeManager
) -> None:
    manager = make_manager(num_blocks=4096)
    with pytest.raises(StorageFullError, match="--num-blocks"):
        manager.join()  # the headers alone do not fit
    assert pool_files(manager) == []
    manager.flags = {"num_blocks": 300}
    manager.crash_and_restart()
    session = manager.join("w2")

    def fill() -> None:
        for cache_id in range(300):
            manager.acquire(session, cache_id, 1)

    with pytest.raises(StorageFullError) as caught:
        fill()
    assert caught.value.metadata["path"].endswith(".kv")
    counts = manager.lessor.counts()
    assert 0 < counts[BlockState.LEASED] < 60
    assert counts[BlockState.LEASED] == len(session.leases)
    manager.check()
    manager.release(session, 0)
    assert len(manager.acquire(session, 1000, 1).blocks) == 1
    manager.check()


def test_on_a_full_file_system_cached_blocks_give_way_because_they_have_their_room(
    small_tmpfs: Path, make_manager: MakeManager
) -> None:
    assert small_tmpfs.is_dir()
    manager = make_manager(num_blocks=300)
    session = manager.join(kv_capacity_tokens=16 * 300)
    manager.acquire(session, 1, 4)
    manager.seal_all(session, 1, chain_of("a", 4))
    manager.release(session, 1)

    def fill() -> None:
        for cache_id in range(2, 400):
            manager.acquire(session, cache_id, 1)

    with pytest.raises(StorageFullError):
        fill()
    counts = manager.lessor.counts()
    assert counts[BlockState.CACHED] == 0
    assert counts[BlockState.LEASED] == len(session.leases)
    manager.check()


def test_a_pool_dir_that_is_deleted_under_a_manager_is_a_clear_error_and_leases_go_on(
    make_manager: MakeManager,
) -> None:
    manager = make_manager(num_blocks=8)
    session = manager.join()
    manager.acquire(session, 1, 2)
    second = manager.worker("w2")
    shutil.rmtree(manager.pool_dir)
    with pytest.raises(LockProofError, match="cannot open the lock file"):
        manager.register(second)
    assert manager.lessor.book.extend(session, 1, 4).blocks == [0, 1, 2, 3]
    manager.check()


def test_blocks_get_room_before_they_are_handed_out(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=1024)
    session = manager.join()
    kv, _ = pool_files(manager)
    assert kv.stat().st_blocks * 512 < 100_000
    manager.acquire(session, 1, 1)
    assert kv.stat().st_blocks * 512 >= 1 << 20
    manager.check()


def test_a_file_size_limit_is_reported_like_a_full_disk(make_manager: MakeManager) -> None:
    manager = make_manager(num_blocks=1024)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(StorageFullError):
            manager.join()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert pool_files(manager) == []
    manager.join("w2")
    manager.check()
