"""`python -m services.decoder`: exit status 0 after a clean stop, 1 when it cannot start, 2 for a wrong flag."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

import structlog

from services import serving
from services.decoder.config import DecoderConfig, parse_args
from services.decoder.errors import ConfigError, DecoderError
from services.decoder.service import DecoderService
from services.logs import configure_logs


async def run(config: DecoderConfig) -> None:
    """Serves until SIGTERM or SIGINT; raises what keeps it from starting. A second signal ends the process at once."""
    stop = serving.stop_event_on_signals()
    service = DecoderService(config)
    starting = asyncio.create_task(service.start())
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            await stopping
        structlog.get_logger().info("stopping", grace_s=config.grace_s)
    finally:
        starting.cancel()
        stopping.cancel()
        await asyncio.wait({starting, stopping})
        await service.stop()
        if service.is_loading:
            # A thread in the midst of a library's call must not meet the interpreter's teardown. No lease was taken yet.
            os._exit(0)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the decoder; see the module's docstring for the exit status."""
    try:
        config = parse_args(sys.argv[1:] if argv is None else argv)
        configure_logs(config.log_level)
        serving.run(run(config))
    except (DecoderError, serving.AddressError) as error:
        print(f"python -m services.decoder: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
