"""Pages are mapped ahead: of every file, the last piece included."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import numpy as np
import pytest

from services.decoder import page_mapper
from services.decoder.page_mapper import map_pages


def _resident_kb(path: Path) -> int:
    """How much of a file's mapping this process has in its tables."""
    entries = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    return sum(int(re.search(r"^Rss: +(\d+) kB", entry, re.M)[1]) for entry in entries if str(path) in entry)  # type: ignore[index]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_every_page_of_every_file_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_mapper, "_PIECE_BYTES", 1 << 20)
    paths = [tmp_path / "a", tmp_path / "b"]
    mappings = []
    for path in paths:
        path.write_bytes(bytes(5 << 19))
        with path.open("rb") as file:
            mappings.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    assert [_resident_kb(path) for path in paths] == [0, 0]
    map_pages(mappings).join(30)
    assert [_resident_kb(path) for path in paths] == [5 << 9, 5 << 9]


def test_a_kernel_that_cannot_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_mapper, "_MADV_POPULATE_READ", 12345)
    path = tmp_path / "a"
    path.write_bytes(bytes(1 << 16))
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    thread = map_pages([mapping])
    thread.join(30)
    assert not thread.is_alive()
    assert np.frombuffer(mapping, np.uint8).sum() == 0
