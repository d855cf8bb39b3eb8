"""Flags: what is accepted, and that everything else is refused by name before anything is opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.kv_manager.config import Config, parse_args, parse_size


def test_the_defaults_are_the_documented_ones() -> None:
    assert parse_args(["--pool-dir", "/p"]) == Config(pool_dir=Path("/p"), listen="127.0.0.1:50050", block_size=16)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("4096", 4096), ("2GiB", 2 << 30), ("1.5KiB", 1536), ("3MB", 3_000_000), ("2 tib", 2 << 40), ("7B", 7)],
)
def test_sizes_are_read_with_their_units(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes
    assert parse_args(["--pool-dir", "/p", "--pool-bytes", text]).pool_bytes == num_bytes


def test_quotas_name_a_tenant_or_all_others() -> None:
    config = parse_args(
        ["--pool-dir", "/p", "--tenant-quota", "a=b=7", "--tenant-quota", "*=3", "--tenant-quota", "=9"]
    )
    assert [config.quota_of(tenant) for tenant in ("a=b", "anyone", "")] == [7, 3, 9]
    assert parse_args(["--pool-dir", "/p"]).quota_of("anyone") is None


def test_the_background_scrub_is_off_unless_it_has_a_rate() -> None:
    assert parse_args(["--pool-dir", "/p"]).scrub_bytes_per_s == 0
    assert parse_args(["--pool-dir", "/p", "--scrub-rate", "64MiB"]).scrub_bytes_per_s == 64 << 20


@pytest.mark.parametrize("text", ["", "GiB", "-1", "2XB", "1e9", "2 iB", "0x10"])
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], "--pool-dir"),
        (["--pool-dir", "/p", "--num-blocks", "0"], "--num-blocks"),
        (["--pool-dir", "/p", "--num-blocks", "many"], "--num-blocks"),
        (["--pool-dir", "/p", "--num-blocks", "4", "--pool-bytes", "4KiB"], "--pool-bytes"),
        (["--pool-dir", "/p", "--pool-bytes", "0"], "--pool-bytes"),
        (["--pool-dir", "/p", "--pool-bytes", "lots"], "not a size"),
        (["--pool-dir", "/p", "--block-size", "12"], "--block-size"),
        (["--pool-dir", "/p", "--block-size", "512"], "--block-size"),
        (["--pool-dir", "/p", "--pool-memory", "disk"], "--pool-memory"),
        (["--pool-dir", "/p", "--device", "1"], "--pool-memory cuda"),
        (["--pool-dir", "/p", "--pool-memory", "cuda", "--device", "-1"], "--device"),
        (["--pool-dir", "/p", "--ttl", "0"], "--ttl"),
        (["--pool-dir", "/p", "--ttl", "nan"], "--ttl"),
        (["--pool-dir", "/p", "--hang-limit", "1"], "--hang-limit"),
        (["--pool-dir", "/p", "--listen", "nowhere"], "--listen"),
        (["--pool-dir", "/p", "--log-level", "loud"], "--log-level"),
        (["--pool-dir", "/p", "--pool", "4"], "--pool"),
        (["--pool-dir", "/p", "--tenant-quota", "alice"], "--tenant-quota"),
        (["--pool-dir", "/p", "--tenant-quota", "alice=0"], "--tenant-quota"),
        (["--pool-dir", "/p", "--preempt-timeout", "0"], "--preempt-timeout"),
        (["--pool-dir", "/p", "--scrub-rate", "fast"], "--scrub-rate"),
    ],
)
def test_a_bad_flag_is_refused_by_name_with_status_2(
    flags: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_args(flags)
    assert caught.value.code == 2
    assert named in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_args(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for part in ("--pool-dir", "2GiB", "when the first decoder registers", "power of two"):
        assert part in text
