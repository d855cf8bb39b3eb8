"""`python -m tests.chaos`: one line a seed on stdout; exit status 1 when a seed failed, 130 or 143 after a signal."""

from __future__ import annotations

import argparse
import asyncio
import logging
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import structlog

from tests.chaos.host import Serving
from tests.chaos.oracle import undisturbed, write_model
from tests.chaos.plan import make_plan
from tests.chaos.run import run_seed


def _seeds(text: str) -> range:
    first, colon, end = text.partition(":")
    try:
        return range(int(first), int(end) if end else sys.maxsize) if colon else range(int(first), int(first) + 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a seed such as 7, or seeds such as 0:20 or 100:") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--seeds", type=_seeds, default=range(20), metavar="FROM:TO", help="which seeds; 7 for one, 100: for no end")
    add("--duration", type=float, metavar="SECONDS", help="start no seed after so long")
    add("--backend", default="mlx", help="of the decoders (default mlx)")
    add("--keep", type=Path, metavar="DIR", help="where the files of failed seeds go (default: a directory in /tmp)")
    return parser


def _show(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text[:110]}")
        sys.stderr.flush()


async def _run(args: argparse.Namespace, directory: Path, keep: Path) -> int:
    began = time.monotonic()
    serving = Serving(write_model(directory / "model"), args.backend)
    _show("computing what every request gives undisturbed")
    expected = await undisturbed(directory / "undisturbed", serving)
    num_run = 0
    failed: list[int] = []
    for seed in args.seeds:
        if args.duration is not None and time.monotonic() - began > args.duration:
            break
        files = directory / f"s{seed}"  # short: the paths of sockets are
        files.mkdir()
        report = await run_seed(make_plan(seed), files, serving, expected, _show)
        _show("")
        print(report, flush=True)
        num_run += 1
        if report.problem:
            failed.append(seed)
            shutil.copytree(files, keep / f"seed-{seed}", dirs_exist_ok=True, ignore=_sockets)
            print(f"  its logs and pool: {keep / f'seed-{seed}'}", flush=True)
        shutil.rmtree(files)
    print(f"{num_run} seeds, {len(failed)} failed{': ' + ', '.join(map(str, failed)) if failed else ''}")
    return 1 if failed else 0


async def _until_signalled(args: argparse.Namespace, directory: Path, keep: Path) -> int:
    """A signal ends the services first: each has a session of its own, so that nobody else would."""
    running = asyncio.create_task(_run(args, directory, keep))
    received: list[int] = []

    def end(number: int) -> None:
        received.append(number)
        running.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, end, number)
    try:
        return await running
    except asyncio.CancelledError:
        print(f"ended by {signal.Signals(received[0]).name}", flush=True)
        return 128 + received[0]


def _sockets(directory: str, names: list[str]) -> set[str]:
    return {name for name in names if name.endswith(".sock")}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the seeds of a command line."""
    args = _parser().parse_args(argv)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    keep = args.keep or Path(tempfile.gettempdir()) / "leasehold-chaos-failed"
    with tempfile.TemporaryDirectory(prefix="chaos-") as directory:
        return asyncio.run(_until_signalled(args, Path(directory), keep))


if __name__ == "__main__":
    sys.exit(main())
