"""What a benchmark's figures were measured on."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

_TELLING_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx_vnni",
    "amx_int8",
    "asimddp",
)


def describe_cpu() -> dict[str, Any]:
    """The processor's name, the cores this process may use, and the instruction sets that matter here."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if platform.system() == "Linux" else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return {
        "cpu": fields.get("model name", platform.processor()),
        "family_model": f"{fields.get('cpu family', '?')}/{fields.get('model', '?')}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "isa": [flag for flag in _TELLING_FLAGS if flag in flags],
    }


def process_cpu_s(pid: int) -> float:
    """CPU seconds that a process has used on all its threads, those that have ended included. Linux only.

    The clock of clock_getcpuclockid(3), because /proc counts in hundredths of a second.
    """
    return time.clock_gettime(~pid << 3 | 2)
