"""`python -m services.kv_manager`: exit status 0 after a clean stop, 1 when it cannot start, 2 for a wrong flag."""

from __future__ import annotations

import sys

import structlog

from services import serving
from services.kv_manager.config import parse_args
from services.kv_manager.errors import ManagerError
from services.kv_manager.service import serve
from services.logs import configure_logs


def main() -> int:
    """Runs the manager; see the module's docstring for the exit status."""
    config = parse_args()
    configure_logs(config.log_level)
    try:
        serving.run(serve(config))
    except (ManagerError, serving.AddressError, OSError) as error:
        structlog.get_logger("kv_manager").error("cannot start", error=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
