"""Structured logs for both services: JSON lines, or coloured text on a terminal; always on stderr."""

from __future__ import annotations

import logging
import sys

import structlog

LOG_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure_logs(level_name: str) -> None:
    """Sets structlog up for this process; level_name is a key of LOG_LEVELS."""
    console = sys.stderr.isatty()
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer()
    )
    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        renderer,
    ]
    if not console:
        processors.insert(-1, structlog.processors.format_exc_info)
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(LOG_LEVELS[level_name]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        # Loggers made at import follow a later configuration, such as a test's.
        cache_logger_on_first_use=False,
    )
