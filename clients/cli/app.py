"""Runs a subcommand: signals, exit codes, and what must not show as a traceback."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence

from clients.cli import arguments, chat, generate, status, top, up, upkeep

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


def run(argv: Sequence[str]) -> int:
    """The exit code of a command line."""
    try:
        args = arguments.build_parser().parse_args(arguments.normalize(argv))
    except SystemExit as stop:  # argparse has printed the help or what is wrong
        return stop.code if isinstance(stop.code, int) else EXIT_USAGE
    try:
        return _dispatch(args)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone; the interpreter must not complain while it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


def _dispatch(args: argparse.Namespace) -> int:
    if args.command == "chat":
        return chat.run(args, arguments.DEFAULT_DECODER)
    commands: dict[str, Callable[[], Coroutine[object, object, int]]] = {
        "loadtest": lambda: _loadtest(args),
        "generate": lambda: generate.run(args, arguments.DEFAULT_DECODER),
        "status": lambda: status.run(args),
        "top": lambda: top.run(args),
        "flush": lambda: upkeep.flush(args),
        "scrub": lambda: upkeep.scrub(args),
        "up": lambda: up.run(args),
    }
    # A supervisor that ends `up` with SIGTERM gets what it asked for.
    return run_cancellable(commands[args.command](), EXIT_DONE if args.command == "up" else EXIT_TERMINATED)


async def _loadtest(args: argparse.Namespace) -> int:
    from clients.loadtest import command  # only its own command waits for all of the harness to load

    return await command.run(args, arguments.DEFAULT_DECODER)


def run_cancellable(main: Coroutine[object, object, int], terminated: int = EXIT_TERMINATED) -> int:
    """Runs to the end; SIGINT, SIGTERM and SIGHUP cancel it, as often as they come, and give 130 or `terminated`."""
    received: list[int] = []

    async def supervised() -> int:
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(main)

        def cancel(number: int) -> None:
            received.append(number)
            task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, cancel, number)
        try:
            return await task
        except asyncio.CancelledError:
            if not received:
                raise
            return EXIT_INTERRUPTED if received[0] == signal.SIGINT else terminated

    return asyncio.run(supervised())
