"""How many threads the team should have."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_TOPOLOGY = Path("/sys/devices/system/cpu")
_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def available_cores() -> int:
    """Physical cores that this process may run on, no more than its cgroup's CPU quota."""
    cores = {_core_of(cpu) for cpu in os.sched_getaffinity(0)}
    return max(1, min(len(cores), _quota_cpus()))


def _core_of(cpu: int) -> str:
    """Names the physical core; two hardware threads of one core share its arithmetic units."""
    try:
        return (_TOPOLOGY / f"cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii").strip()
    except OSError:
        return str(cpu)


def _quota_cpus() -> int:
    with contextlib.suppress(OSError, ValueError):
        quota, period = _CGROUP_QUOTA.read_text(encoding="ascii").split()
        return max(1, int(quota) // int(period))
    return 1 << 16
