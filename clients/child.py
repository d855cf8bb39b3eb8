"""Runs a program that is told to end when the process that started it ends, however that happens.

Started as `python -I -S child.py PARENT_PID PROGRAM ARGUMENT...`, so that nothing forks without exec and no code runs
between fork and exec in a process with threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Asks the kernel for SIGTERM at the parent's end where it can be asked, then becomes the program."""
    parent_pid, program = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
        if os.getppid() != parent_pid:  # it ended before the kernel was asked
            sys.exit(1)
    os.execv(program[0], program)


if __name__ == "__main__":
    main()
