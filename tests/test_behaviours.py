"""Every behaviour that this system keeps from the one it re-creates is named by a test: `test_s05_...`, or "S5" in its docstring."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent

# What the original does, and what is kept of it here. A row that is still to come is not in the table yet.
ROWS: dict[str, str] = {
    "S1": "step buffers grow only when a step needs more, and smaller steps reuse them",
    "S2": "compiled steps, by exact batch shape after a few sightings, are emptied before the old buffers go; a failure latches",
    "S3": "growth may be geometric, and is bounded by max_num_batched_tokens",
    "S4": "block-table and context-length buffers survive growth between admission and decode, at 16 and more sequences",
    "S5": "Acquire of a known cache id does nothing",
    "S6": "capacity = min(model maximum, --kv-capacity); a bad value is refused at start",
    "S7": "paged unless --no-paged",
    "S8": "block size 16 by default; 8 and 32 work",
    "S9": "max_seqs 32 by default",
    "S10": "the default pool: max_seqs × ceil(capacity / block_size); --pool-bytes overrides",
    "S11": "the pool is made on the first registration",
    "S12": "one block holds all layers",
    "S13": "one pool in either layout, hnd or nhd, for decode and prefill alike; it changes no token",
    "S14": "the geometry is fixed at registration",
    "S15": "the geometry is fixed at registration, and survives exhaustion",
    "S16": "freed blocks, caches and buffers are reused last-in first-out",
    "S17": "a paged cache is metadata only",
    "S18": "a contiguous cache holds its own K/V",
    "S19": "limits use the exact capacity, never the rounded one",
    "S20": "--kv-dtype bf16, f16, f32, or int8 with a scale for each token and head",
    "S21": "blocks on demand, or with --reserve full all of them at once; all or nothing",
    "S22": "an exception inside the manager leaves the pool consistent",
    "S23": "a decoder without its manager refuses and says so",
    "S24": "an exhausted request leaves its id unregistered and leaks nothing",
    "S25": "the message of exhaustion names cache id, blocks needed and free, and the settings",
    "S26": "what failures leave behind is bounded, after a million of them",
    "S27": "the padding of tables is never read; 0 is a real block",
    "S28": "new or recycled, a cache begins empty in all layers",
    "S29": "a cache is never visible half-built",
    "S30": "the caller always gets the error",
    "S31": "all layers share one table and length",
    "S32": "one attention call a layer for the whole mixed batch",
    "S33": "contiguous mode has no pool and needs no manager",
    "S34": "a recycled row shows nothing of a longer old table",
    "S35": "growth makes the paged buffers only where their dimensions were pinned",
}


def _tests() -> Iterator[tuple[str, str]]:
    """Name and docstring of every test."""
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test_"):
                yield f"{path.relative_to(TESTS)}::{node.name}", f"{node.name}\n{ast.get_docstring(node) or ''}"


def _rows_named(text: str) -> set[str]:
    return {f"S{int(number)}" for number in re.findall(r"(?:_s|\bS)0*(\d{1,2})(?![A-Za-z0-9])", text)}


@pytest.fixture(scope="module")
def named() -> dict[str, list[str]]:
    """The tests that name each row."""
    found: dict[str, list[str]] = {}
    for test, text in _tests():
        for row in _rows_named(text):
            found.setdefault(row, []).append(test)
    return found


def test_every_row_is_named_by_a_test(named: dict[str, list[str]]) -> None:
    missing = {row: text for row, text in ROWS.items() if row not in named}
    assert not missing, f"no test names {', '.join(missing)}: {missing}"


def test_rows_are_read_off_names_and_docstrings() -> None:
    assert _rows_named("test_row_s8_block_sizes\nRows S9 and S10; not S3x.") == {"S8", "S9", "S10"}
    assert _rows_named("test_s05_acquire_s") == {"S5"}
    assert _rows_named("test_rows_s4_s9_a_batch") == {"S4", "S9"}
