"""The `leasehold` command."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0 done, 1 failed, 2 usage, 130 Ctrl-C."""
    # gRPC's C core logs every lost connection on stderr; the command says the same in one line. Read at gRPC's import.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from clients.cli.app import run

    return run(sys.argv[1:] if argv is None else list(argv))
