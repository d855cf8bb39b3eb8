"""What the manager counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """What happened since the start."""

    num_acquired: int = 0
    num_extended: int = 0
    num_released: int = 0
    num_exhausted: int = 0
    num_revoked: int = 0
    num_looked_up: int = 0
    num_hits: int = 0
    num_seals: int = 0
    num_deduplicated: int = 0
    num_preempted: int = 0
    num_corrupt: int = 0
