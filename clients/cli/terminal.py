"""Small things about terminals: safe text, plain tables."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

# A model's text must not move the cursor, retitle the window or ring: control characters but tab and newline go.
_CONTROL = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}

_NUMBER = re.compile(r"^(?:[+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?: ?m?s| ?%)?|-|=|)$")


def printable(text: str) -> str:
    """The text unchanged for a file or a pipe; without control characters for a terminal."""
    return text.translate(_CONTROL) if sys.stdout.isatty() else text


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A plain table: numbers to the right, all else to the left, two spaces between."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(line[column]) for line in [list(header), *cells]) for column in range(len(header))]
    to_right = [all(_NUMBER.match(line[column]) for line in cells) for column in range(len(header))]
    lines = []
    for line in [list(header), *cells]:
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, to_right, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
